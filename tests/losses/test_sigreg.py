import pytest
import torch
from lightly.loss.lejepa_loss import SIGReg as Theirs

from fasttrain.losses import SIGRegLoss
from tests.losses.pairs import draw, gradients


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("options", [{}, {"knots": 5, "t_max": 2.0, "num_vectors": 7}])
def test_sigreg_equals_lightly_in_value_and_gradient(options, backend):
    """Both draw the same directions from torch's generator."""
    results = []
    for loss in (SIGRegLoss(**options, backend=backend), Theirs(**options)):
        torch.manual_seed(0)
        results.append(gradients(loss, draw(3, 20, 6) * 2 + 1))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)  # their weights are fp32


def test_directions_are_a_function_of_the_seed():
    loss, z = SIGRegLoss(num_vectors=4), draw(9, 3)
    assert torch.equal(loss(z, seed=1), loss(z, seed=1))
    assert not torch.equal(loss(z, seed=1), loss(z, seed=2))


def test_half_precision_is_summed_in_fp32():
    z = draw(200, 8).bfloat16().requires_grad_()
    loss = SIGRegLoss()(z, seed=0)
    loss.backward()
    assert (loss.dtype, z.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(
        loss.double(), SIGRegLoss(backend="eager")(z.float(), seed=0).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SIGRegLoss(knots=1), "^knots must"),
        (lambda: SIGRegLoss(t_max=0.0), "^t_max must"),
        (lambda: SIGRegLoss(num_vectors=0), "^num_vectors must"),
        (lambda: SIGRegLoss()(draw(4)), r"^proj must be floating point \[..., N, D\]"),
    ],
)
def test_invalid_argument_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
