"""The coding rate against its definition and its known values."""

import math

import pytest
import torch

from fasttrain.kernels import coding_rate


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12)], ids=["more rows", "more dimensions"])
def test_equals_the_definition_with_its_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, dim = shape[1:]
    expected = torch.stack([(torch.eye(dim) + dim / (rows * 0.3) * view.T @ view).logdet() / 2 for view in z])
    actual = coding_rate(z, eps=0.3)
    torch.testing.assert_close(actual, expected)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gradients = [torch.autograd.grad(value, z, weights, retain_graph=True)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_is_between_one_direction_and_all():
    """Equal rows span one direction, and an orthonormal basis has equal moments in all."""
    equal = torch.eye(6, dtype=torch.float64)[:1].expand(1, 6, 6)
    assert coding_rate(equal, eps=0.5).item() == pytest.approx(0.5 * math.log(1 + 6 / 0.5))
    assert coding_rate(torch.eye(6, dtype=torch.float64)[None], eps=0.5).item() == pytest.approx(3 * math.log(1 + 2))
    assert coding_rate(torch.zeros(1, 4, 6), eps=0.5).item() == 0


def test_half_precision_is_computed_in_fp32():
    z = torch.nn.functional.normalize(torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(1)), dim=2)
    z = z.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rate = coding_rate(z, eps=0.05)
    assert rate.dtype == torch.float32
    torch.testing.assert_close(rate, coding_rate(z.double(), eps=0.05).float())


@pytest.mark.parametrize(
    ("z", "eps", "message"),
    [
        (torch.ones(4, 3), 0.5, r"z: .*\(4, 3\)"),
        (torch.ones(1, 0, 3), 0.5, "none of them 0"),
        (torch.ones(1, 4, 3, dtype=torch.int64), 0.5, "int64"),
        (torch.ones(1, 4, 3), 0.0, "eps"),
    ],
)
def test_bad_input_is_named(z, eps, message):
    with pytest.raises(ValueError, match=message):
        coding_rate(z, eps=eps)
