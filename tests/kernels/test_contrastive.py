import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fasttrain.kernels import nt_xent


def _golden_pair():
    """The pair of the published golden values: seed 0, two draws of randn(8, 16) in fp64."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [normalize(x, dim=1) for x in draw]


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 2.8516984563063827), (0.1, 4.97905201050417)])
def test_equals_lightly_1_6(temperature, expected):
    # Values of lightly 1.6.0's NTXentLoss on the same input.
    assert nt_xent(*_golden_pair(), temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_equals_cross_entropy_over_the_other_rows():
    z0, z1 = _golden_pair()
    z = torch.cat([z0, z1])
    scores = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    targets = torch.arange(16).roll(8)
    torch.testing.assert_close(nt_xent(z0, z1, temperature=0.2), cross_entropy(scores, targets))


def test_gradients_pass_gradcheck():
    z0, z1 = (z[:3, :4].clone().requires_grad_() for z in _golden_pair())
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.3), (z0, z1))
