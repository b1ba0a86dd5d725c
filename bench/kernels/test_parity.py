"""Compare the losses with their peers on the same inputs: values, gradients, memory banks and errors.

    pip install -e '.[bench]'
    pytest bench/kernels/test_parity.py

Comparisons are in fp64, because a peer that sums in half precision is the less exact of the two. A memory bank is fp32
on both sides. Tests of a peer that is not installed are skipped.
"""

import importlib
import inspect

import pytest
import torch
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
SHAPES = [(1, 4), (7, 5), (64, 32), (900, 16)]  # the last one is larger than a tile
LIGHTLY = "lightly.loss"


def peer(module, name):
    """Return a class of another project. Skip the test if the project is not installed."""
    pytest.importorskip(module.partition(".")[0], reason="pip install -e '.[bench]'")
    return getattr(importlib.import_module(module), name)


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outcome(loss, *inputs):
    """Return value and gradients of a loss. A view without a partner has no gradient or 0, which count as equal."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def assert_agree(ours, theirs, *inputs, rtol=1e-9):
    torch.testing.assert_close(outcome(ours, *inputs), outcome(theirs, *inputs), rtol=rtol, atol=rtol / 100)


def same_seed(kinds, *arguments, **options):
    """Construct each class from the same random state."""
    instances = []
    for kind in kinds:
        torch.manual_seed(0)
        instances.append(kind(*arguments, **options))
    return instances


@pytest.mark.parametrize(
    ("ours", "module"),
    [
        (NTXentLoss, LIGHTLY),
        (NegativeCosineSimilarity, LIGHTLY),
        (MemoryBankModule, "lightly.models.modules.memory_bank"),
        (DINOLoss, LIGHTLY),
        (SwaVLoss, LIGHTLY),
        (InfoNCE, "info_nce"),
    ],
)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_those_of_the_peer(ours, module, method):
    def positional(kind):
        parameters = inspect.signature(getattr(kind, method)).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(peer(module, ours.__name__))


# lightly


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_matches_lightly(temperature, shape):
    theirs = peer(LIGHTLY, "NTXentLoss")
    assert_agree(NTXentLoss(temperature), theirs(temperature), draw(shape), draw(shape, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_negative_cosine_matches_lightly(shape):
    theirs = peer(LIGHTLY, "NegativeCosineSimilarity")
    assert_agree(NegativeCosineSimilarity(), theirs(), draw(shape), draw(shape, 1), rtol=1e-12)


@pytest.mark.parametrize("size", [(20, 16), (64, 16), (8, 16), (5, 16)])
def test_nt_xent_with_a_bank_matches_lightly(size):
    ours, theirs = same_seed((NTXentLoss, peer(LIGHTLY, "NTXentLoss")), 0.1, size)
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    for step in range(7):
        a, b = draw((8, 16), step, torch.float32), draw((8, 16), step + 100, torch.float32)
        assert_agree(ours, theirs, a, b, rtol=1e-4)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    before = theirs.memory_bank.bank.clone()
    assert ours(a, b).item() == pytest.approx(theirs(a, b).item(), rel=1e-5)  # no gradient, so nothing is enqueued
    torch.testing.assert_close(ours.memory_bank.bank, before)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_moco_matches_lightly_with_detached_keys(temperature):
    ours, theirs = same_seed((MoCoLoss, peer(LIGHTLY, "NTXentLoss")), temperature, (32, 16))
    for step in range(6):
        a, b = draw((8, 16), step, torch.float32), draw((8, 16), step + 100, torch.float32)
        assert_agree(lambda q, k=b: ours(q, k), lambda q, k=b: theirs(q, k), a, rtol=1e-4)
    torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)


@pytest.mark.parametrize("first", [False, True])
def test_memory_bank_matches_lightly(first):
    kinds = (MemoryBankModule, peer("lightly.models.modules.memory_bank", "MemoryBankModule"))
    ours, theirs = same_seed(kinds, (13, 4), feature_dim_first=first)
    for step, count in enumerate([5, 8, 13, 2, 30, 4, 4, 4, 4, 1]):
        batch = draw((count, 4), step, torch.float32)
        assert torch.equal(*(bank(batch, update=True)[1] for bank in (ours, theirs)))
        assert torch.equal(ours.bank_ptr, theirs.bank_ptr)
    assert torch.equal(ours.bank, theirs.bank)


def random_views(seed):
    """Return unit features per view, the number of views that the teacher sees, and prototypes."""
    generator = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    views, batch, dim, count = number(2, 6), number(1, 40), number(2, 20), number(2, 70)
    features = [normalize(draw((batch, dim), 10 * seed + v), dim=1) for v in range(views)]
    return features, number(1, views), normalize(draw((count, dim), 10 * seed + 9), dim=1)


@pytest.mark.parametrize("seed", range(200))
def test_dino_and_its_center_match_lightly(seed):
    """The tolerance is 1e-6, because lightly rounds its teacher temperature to fp32."""
    student, teachers, w = random_views(seed)
    teacher = [x.roll(1, 0) for x in student[:teachers]]
    options = (len(w), 0.02 + 0.001 * (seed % 20), 0.06, 5, 0.1 + 0.01 * (seed % 9), 0.5 + 0.1 * (seed % 5))
    from_logits, from_features, theirs = DINOLoss(*options), DINOLoss(*options), peer(LIGHTLY, "DINOLoss")(*options)
    prototypes = {"teacher_prototypes": w.flip(0), "student_prototypes": w}

    def of_logits(loss, *arguments):
        return outcome(lambda *s: loss([t @ w.flip(0).T for t in teacher], [x @ w.T for x in s], *arguments), *student)

    for step, arguments in enumerate([(), (0.05,), (None, seed % 7)]):
        logits = of_logits(from_logits, *arguments)
        features = outcome(lambda *s, a=arguments: from_features(teacher, s, *a, **prototypes), *student)
        expected = of_logits(theirs, *arguments)
        for ours, loss in ((logits, from_logits), (features, from_features)):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, msg=lambda m, s=step: f"step {s}: {m}")
            torch.testing.assert_close(loss.center, theirs.center.to(loss.center), rtol=1e-5, atol=1e-7)
    theirs.load_state_dict(from_logits.state_dict())  # strict in both directions
    from_features.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("seed", range(200))
def test_swav_matches_lightly(seed):
    """The tolerance is 1e-5, because our codes are fp32 for scores of every type."""
    views, high, w = random_views(seed)
    queues = [normalize(draw((1 + seed % 30, w.shape[1]), 10 * seed + 7 + i), dim=1) for i in range(high)]
    options = (0.1 + 0.01 * (seed % 9), 1 + seed % 5, 0.05 + 0.01 * (seed % 4))
    ours, theirs = SwaVLoss(*options), peer(LIGHTLY, "SwaVLoss")(*options)

    def scores(x):
        return None if x is None else [z @ w.T for z in x]

    for queue in (None, queues):
        expected, logits = (
            outcome(lambda *z, q=queue, loss=loss: loss(scores(z[:high]), scores(z[high:]), scores(q)), *views)
            for loss in (theirs, ours)
        )
        features = outcome(lambda *z, q=queue: ours(z[:high], z[high:], q, prototypes=w), *views)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", ["fasttrain.losses", LIGHTLY])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DINOLoss", {"output_dim": 4, "center_mode": "median"}, r"Unknown mode 'median'. Valid modes are \['mean'\]."),
        *(("NTXentLoss", {"temperature": t}, "Illegal temperature") for t in (0.0, -1e-9, 1e-9)),
        *(("NTXentLoss", {"memory_bank_size": s}, "emory bank size") for s in (-1, 4096, (8,), (8, -1), (8, 2, 2))),
    ],
)
def test_invalid_options_raise_in_both(module, name, options, message):
    with pytest.raises(ValueError, match=message):
        peer(module, name)(**options)


@pytest.mark.parametrize("module", ["fasttrain.losses", LIGHTLY])
def test_dino_with_one_view_raises_in_both(module):
    with pytest.raises(ValueError, match="at least two views"):
        peer(module, "DINOLoss")(4)([draw((3, 4))], [draw((3, 4), 1)])


# info-nce-pytorch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_info_nce_matches_info_nce_pytorch(temperature, shape):
    assert_agree(InfoNCELoss(temperature), peer("info_nce", "InfoNCE")(temperature), draw(shape), draw(shape, 1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_info_nce_with_unpaired_negatives_matches(temperature):
    theirs = peer("info_nce", "InfoNCE")(temperature, negative_mode="unpaired")
    assert_agree(InfoNCELoss(temperature), theirs, draw((16, 8)), draw((16, 8), 1), draw((50, 8), 2))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [None, (50, 8), (16, 5, 8)])
def test_info_nce_adapter_matches_info_nce_pytorch(shape, reduction):
    options = (0.2, reduction, "paired" if shape and len(shape) == 3 else "unpaired")
    inputs = draw((16, 8)), draw((16, 8), 1), *([] if shape is None else [draw(shape, 2)])
    ours, theirs = InfoNCE(*options), peer("info_nce", "InfoNCE")(*options)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-9, atol=1e-11)
    assert_agree(lambda *x: ours(*x).square().sum(), lambda *x: theirs(*x).square().sum(), *inputs)


def test_info_nce_defaults_match_info_nce_pytorch():
    assert_agree(InfoNCELoss(), peer("info_nce", "InfoNCE")(), draw((16, 8)), draw((16, 8), 1))


# pytorch-metric-learning and open_clip


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_losses_match_pytorch_metric_learning(temperature):
    """The tolerance is 1e-7, because the peer adds the smallest normal number inside the logarithm."""
    module = "pytorch_metric_learning.losses"
    theirs, wrapper = peer(module, "NTXentLoss")(temperature), peer(module, "SelfSupervisedLoss")
    a, b = draw((16, 8)), draw((16, 8), 1)
    assert_agree(NTXentLoss(temperature), wrapper(theirs), a, b, rtol=1e-7)
    assert_agree(InfoNCELoss(temperature), wrapper(theirs, symmetric=False), a, b, rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_symmetric_info_nce_matches_open_clip(temperature, shape):
    loss = peer("open_clip.loss", "ClipLoss")()

    def theirs(a, b):
        return loss(normalize(a, dim=1), normalize(b, dim=1), 1 / temperature)

    assert_agree(InfoNCELoss(temperature, symmetric=True), theirs, draw(shape), draw(shape, 1))


def test_learned_scale_matches_open_clip():
    ours = InfoNCELoss(0.07, symmetric=True, learnable_temperature=True)
    theirs = torch.tensor(1 / 0.07).log().requires_grad_()
    assert ours.logit_scale.shape == theirs.shape
    images, texts = draw((16, 8), 0, torch.float32), draw((16, 8), 1, torch.float32)
    ours(images, texts).backward()
    peer("open_clip.loss", "ClipLoss")()(normalize(images, dim=1), normalize(texts, dim=1), theirs.exp()).backward()
    torch.testing.assert_close(ours.logit_scale.grad, theirs.grad, rtol=1e-5, atol=1e-6)
