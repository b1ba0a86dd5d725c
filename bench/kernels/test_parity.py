"""The losses beside their peers, live: the same inputs, values, gradients, banks and refusals.

    pip install -e '.[bench]'
    pytest bench/kernels/test_parity.py

Compared in fp64, since a peer that sums in half precision is the less exact of the two; a memory bank is fp32 in both.
"""

import inspect

import info_nce
import lightly.loss
import pytest
import pytorch_metric_learning.losses as metric_learning
import torch
from lightly.models.modules.memory_bank import MemoryBankModule as TheirMemoryBank
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize

from fasttrain.losses import (
    DINOLoss,
    InfoNCELoss,
    MemoryBankModule,
    MoCoLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
)
from fasttrain.losses.compat.info_nce import InfoNCE

TEMPERATURES = [0.02, 0.07, 0.5, 3.0]
SHAPES = [(1, 4), (7, 5), (64, 32), (900, 16)]  # the last one is more than a tile


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outcome(loss, *inputs):
    """Value and gradients of a loss; a view that meets nobody has none or 0, which is the same."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def agree(ours, theirs, *inputs, rtol=1e-9):
    torch.testing.assert_close(outcome(ours, *inputs), outcome(theirs, *inputs), rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NTXentLoss, lightly.loss.NTXentLoss),
        (NegativeCosineSimilarity, lightly.loss.NegativeCosineSimilarity),
        (MemoryBankModule, TheirMemoryBank),
        (DINOLoss, lightly.loss.DINOLoss),
        (SwaVLoss, lightly.loss.SwaVLoss),
        (InfoNCE, info_nce.InfoNCE),
    ],
)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_a_call_of_theirs_is_a_call_of_ours(ours, theirs, method):
    def positional(kind):
        parameters = inspect.signature(getattr(kind, method)).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_of_lightly(temperature, shape):
    agree(NTXentLoss(temperature), lightly.loss.NTXentLoss(temperature), draw(shape), draw(shape, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_negative_cosine_of_lightly(shape):
    theirs = lightly.loss.NegativeCosineSimilarity()
    agree(NegativeCosineSimilarity(), theirs, draw(shape), draw(shape, 1), rtol=1e-12)


@pytest.mark.parametrize("size", [(20, 16), (64, 16), (8, 16), (5, 16)])
def test_steps_against_a_memory_bank_of_lightly(size):
    pair = []
    for kind in (NTXentLoss, lightly.loss.NTXentLoss):
        torch.manual_seed(0)
        pair.append(kind(0.1, size))
    ours, theirs = pair
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    for step in range(7):
        a, b = draw((8, 16), step, torch.float32), draw((8, 16), step + 100, torch.float32)
        agree(ours, theirs, a, b, rtol=1e-4)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    before = theirs.memory_bank.bank.clone()
    assert ours(a, b).item() == pytest.approx(theirs(a, b).item(), rel=1e-5)  # no gradient, so no enqueue
    torch.testing.assert_close(ours.memory_bank.bank, before)


@pytest.mark.parametrize("first", [False, True])
def test_the_memory_bank_of_lightly(first):
    torch.manual_seed(0)
    ours = MemoryBankModule((13, 4), feature_dim_first=first)
    torch.manual_seed(0)
    theirs = TheirMemoryBank((13, 4), feature_dim_first=first)
    for step, count in enumerate([5, 8, 13, 2, 30, 4, 4, 4, 4, 1]):
        batch = draw((count, 4), step, torch.float32)
        found = [bank(batch, update=True)[1] for bank in (ours, theirs)]
        assert torch.equal(*found)
        assert torch.equal(ours.bank_ptr, theirs.bank_ptr)
    assert torch.equal(ours.bank, theirs.bank)


def random_views(seed):
    """Unit features of S views of a batch, how many of them the teacher (or the codes) see, and prototypes."""
    generator = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    views, batch, dim, count = number(2, 6), number(1, 40), number(2, 20), number(2, 70)
    features = [normalize(draw((batch, dim), 10 * seed + v), dim=1) for v in range(views)]
    return features, number(1, views), normalize(draw((count, dim), 10 * seed + 9), dim=1)


@pytest.mark.parametrize("seed", range(200))
def test_dino_of_lightly_and_its_centre(seed):
    # Its teacher temperature is rounded to fp32, hence 1e-6.
    student, teachers, w = random_views(seed)
    teacher = [x.roll(1, 0) for x in student[:teachers]]
    options = (len(w), 0.02 + 0.001 * (seed % 20), 0.06, 5, 0.1 + 0.01 * (seed % 9), 0.5 + 0.1 * (seed % 5))
    by_logits, by_features, theirs = DINOLoss(*options), DINOLoss(*options), lightly.loss.DINOLoss(*options)
    prototypes = {"teacher_prototypes": w.flip(0), "student_prototypes": w}
    for step, how in enumerate([(), (0.05,), (None, seed % 7)]):
        found = outcome(
            lambda *s, how=how: by_logits([t @ w.flip(0).T for t in teacher], [x @ w.T for x in s], *how), *student
        )
        lean = outcome(lambda *s, how=how: by_features(teacher, s, *how, **prototypes), *student)
        expected = outcome(
            lambda *s, how=how: theirs([t @ w.flip(0).T for t in teacher], [x @ w.T for x in s], *how), *student
        )
        for ours, loss in ((found, by_logits), (lean, by_features)):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, msg=lambda m, s=step: f"step {s}: {m}")
            torch.testing.assert_close(loss.center, theirs.center.to(loss.center), rtol=1e-5, atol=1e-7)
    theirs.load_state_dict(by_logits.state_dict())  # strict, and so is the way back
    by_features.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("seed", range(200))
def test_swav_of_lightly(seed):
    views, high, w = random_views(seed)
    queues = [normalize(draw((1 + seed % 30, w.shape[1]), 10 * seed + 7 + i), dim=1) for i in range(high)]
    options = (0.1 + 0.01 * (seed % 9), 1 + seed % 5, 0.05 + 0.01 * (seed % 4))
    ours, theirs = SwaVLoss(*options), lightly.loss.SwaVLoss(*options)
    for queue in (None, queues):

        def scores(x):
            return None if x is None else [z @ w.T for z in x]

        expected = outcome(lambda *z, q=queue: theirs(scores(z[:high]), scores(z[high:]), scores(q)), *views)
        found = outcome(lambda *z, q=queue: ours(scores(z[:high]), scores(z[high:]), scores(q)), *views)
        lean = outcome(lambda *z, q=queue: ours(z[:high], z[high:], q, prototypes=w), *views)
        # Our codes are fp32 whatever the scores are.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [DINOLoss, lightly.loss.DINOLoss])
def test_both_refuse_a_single_view_and_another_mode(kind):
    with pytest.raises(ValueError, match="at least two views"):
        kind(4)([draw((3, 4))], [draw((3, 4), 1)])
    with pytest.raises(ValueError, match=r"Unknown mode 'median'. Valid modes are \['mean'\]."):
        kind(4, center_mode="median")


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1e-9}, {"temperature": 1e-9}])
@pytest.mark.parametrize("kind", [NTXentLoss, lightly.loss.NTXentLoss])
def test_both_refuse_the_temperature(kind, options):
    with pytest.raises(ValueError, match="Illegal temperature"):
        kind(**options)


@pytest.mark.parametrize("size", [-1, 4096, (8,), (8, -1), (8, 2, 2)])
@pytest.mark.parametrize("kind", [NTXentLoss, lightly.loss.NTXentLoss])
def test_both_refuse_the_size(kind, size):
    with pytest.raises(ValueError, match="emory bank size"):
        kind(memory_bank_size=size)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_moco_is_lightly_s_bank_with_detached_keys(temperature):
    pair = []
    for kind in (MoCoLoss, lightly.loss.NTXentLoss):
        torch.manual_seed(0)
        pair.append(kind(temperature, (32, 16)))
    ours, theirs = pair
    for step in range(6):
        a, b = draw((8, 16), step, torch.float32), draw((8, 16), step + 100, torch.float32)
        agree(lambda q, k=b: ours(q, k), lambda q, k=b: theirs(q, k), a, rtol=1e-4)
    torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_one_direction_of_info_nce_pytorch(temperature, shape):
    agree(InfoNCELoss(temperature), info_nce.InfoNCE(temperature), draw(shape), draw(shape, 1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_unpaired_negatives_of_info_nce_pytorch(temperature):
    inputs = draw((16, 8)), draw((16, 8), 1), draw((50, 8), 2)
    agree(InfoNCELoss(temperature), info_nce.InfoNCE(temperature, negative_mode="unpaired"), *inputs)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [None, (50, 8), (16, 5, 8)])
def test_the_adapter_of_info_nce_pytorch(shape, reduction):
    options = (0.2, reduction, "paired" if shape and len(shape) == 3 else "unpaired")
    inputs = draw((16, 8)), draw((16, 8), 1), *([] if shape is None else [draw(shape, 2)])
    ours, theirs = InfoNCE(*options), info_nce.InfoNCE(*options)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-9, atol=1e-11)
    agree(lambda *x: ours(*x).square().sum(), lambda *x: theirs(*x).square().sum(), *inputs)


def test_the_defaults_of_info_nce_pytorch():
    agree(InfoNCELoss(), info_nce.InfoNCE(), draw((16, 8)), draw((16, 8), 1))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_and_one_direction_of_pytorch_metric_learning(temperature):
    # It adds the smallest normal number inside the logarithm.
    a, b = draw((16, 8)), draw((16, 8), 1)
    theirs = metric_learning.NTXentLoss(temperature)
    agree(NTXentLoss(temperature), metric_learning.SelfSupervisedLoss(theirs), a, b, rtol=1e-7)
    agree(InfoNCELoss(temperature), metric_learning.SelfSupervisedLoss(theirs, symmetric=False), a, b, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_both_directions_of_open_clip(temperature, shape):
    def theirs(a, b):
        return ClipLoss()(normalize(a, dim=1), normalize(b, dim=1), 1 / temperature)

    agree(InfoNCELoss(temperature, symmetric=True), theirs, draw(shape), draw(shape, 1))


def test_the_learnt_scale_of_open_clip():
    ours = InfoNCELoss(0.07, symmetric=True, learnable_temperature=True)
    theirs = torch.tensor(1 / 0.07).log().requires_grad_()
    assert ours.logit_scale.shape == theirs.shape
    images, texts = draw((16, 8), 0, torch.float32), draw((16, 8), 1, torch.float32)
    ours(images, texts).backward()
    ClipLoss()(normalize(images, dim=1), normalize(texts, dim=1), theirs.exp()).backward()
    torch.testing.assert_close(ours.logit_scale.grad, theirs.grad, rtol=1e-5, atol=1e-6)
