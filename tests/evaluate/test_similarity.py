"""Centred kernel alignment."""

import pytest
import torch

from fasttrain.evaluate.similarity import linear_cka


def _features(rows, dim, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def test_rotation_scale_and_shift_change_nothing():
    x = _features(40, 6)
    rotation = torch.linalg.qr(_features(6, 6, seed=1))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)


def test_equals_the_definition_by_kernels():
    """The definition has N x N kernel matrices, centred on both sides."""
    x, y = _features(12, 3).double(), _features(12, 5, seed=1).double()
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(expected.item(), rel=1e-12)


def test_features_without_variance_share_nothing():
    assert linear_cka(torch.ones(4, 2), _features(4, 2)) == 0


def test_different_images_are_refused():
    with pytest.raises(ValueError, match="got 4 and 5 rows"):
        linear_cka(_features(4, 2), _features(5, 2))
