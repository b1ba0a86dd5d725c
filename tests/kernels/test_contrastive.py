import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fasttrain.kernels import info_nce, nt_xent


def pair():
    """The pair of the published values: seed 0, two draws of randn(8, 16) in fp64."""
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(8, 16, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


@pytest.mark.parametrize(
    ("loss", "temperature", "expected"),
    [
        (nt_xent, 0.5, 2.8516984563063827),  # lightly 1.6.0's NTXentLoss
        (nt_xent, 0.1, 4.97905201050417),
        (info_nce, 0.1, 3.6847536887636574),  # info-nce-pytorch 0.1.4's InfoNCE
    ],
)
def test_loss_equals_published_value(loss, temperature, expected):
    assert loss(*pair(), temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("in_batch", [None, False, True])
def test_queue_equals_cross_entropy_over_its_rows(in_batch):
    q, k = pair()
    queue = normalize(torch.randn(11, 16, dtype=torch.float64), dim=1)
    logits = [(q * k).sum(1, keepdim=True), q @ queue.T]
    if in_batch:
        logits.append((q @ k.T).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf))
    expected = cross_entropy(torch.cat(logits, dim=1) / 0.2, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(info_nce(q, k, queue, temperature=0.2, in_batch=in_batch), expected)


def test_gradients_pass_gradcheck():
    tensors = [z[:4, :5].clone().requires_grad_() for z in (*pair(), pair()[0])]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda q, k, queue, t: info_nce(q, k, queue, temperature=t, in_batch=True),
        lambda a, b, _, t: nt_xent(a, b, temperature=t),
    ):
        assert torch.autograd.gradcheck(loss, (*tensors, temperature))


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.float32),
        *((backend, t) for backend in ("cpu", "triton") for t in (torch.float32, torch.bfloat16)),
    ],
)
def test_backends_and_types_agree(loss, backend, dtype):
    z = [x.to(dtype) for x in pair()]
    value = loss(*z, temperature=0.1, backend=backend)
    assert value.dtype == torch.float32
    expected = loss(*(x.double() for x in z), temperature=0.1, backend="eager")
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((3, 4), (4, 4)), 0.1, r"same shape, got \(3, 4\) and \(4, 4\)"),
        (((0, 4), (0, 4)), 0.1, r"N >= 1 .*got \(0, 4\)"),
        (((3, 0), (3, 0)), 0.1, r"D >= 1, got \(3, 0\)"),
        *((((3, 4), (3, 4)), t, f"^temperature .*got {t}") for t in (0.0, -0.1, math.nan)),
    ],
)
def test_invalid_argument_is_named(loss, shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        loss(*(torch.ones(shape) for shape in shapes), temperature=temperature)


def test_info_nce_with_invalid_negatives_is_an_error():
    with pytest.raises(ValueError, match=r"^in_batch"):
        info_nce(*pair(), temperature=0.1, in_batch=False)
    with pytest.raises(ValueError, match=r"^q and queue .*\(8, 16\) and \(5, 3\)"):
        info_nce(*pair(), torch.ones(5, 3, dtype=torch.float64), temperature=0.1)
