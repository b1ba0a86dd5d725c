"""Alignment and uniformity are the means over all pairs that their paper writes."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.evaluate.alignment import alignment, uniformity


def test_alignment_is_the_mean_over_all_pairs_of_views():
    views = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    z = normalize(views.double(), dim=-1)
    pairs = [(z[:, i] - z[:, j]).square().sum(-1) for i in range(4) for j in range(i)]
    assert alignment(views) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
    assert alignment(views[:, :1].expand(7, 3, 5)) == pytest.approx(0, abs=1e-12)


def test_uniformity_is_the_log_mean_over_all_pairs_of_rows():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    distances = torch.pdist(normalize(rows, dim=1))
    assert uniformity(rows) == pytest.approx(float((-2 * distances.square()).exp().mean().log()), abs=1e-5)


def test_the_least_and_the_most_uniform():
    assert uniformity(torch.ones(50, 8)) == pytest.approx(0, abs=1e-5)
    spread = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    assert uniformity(spread) == pytest.approx(-3.94, abs=0.01)  # -4 + log 0F1(; 64; 4)
    assert math.isfinite(uniformity(torch.zeros(5, 3)))


def test_too_little_is_an_error():
    with pytest.raises(ValueError, match="two views"):
        alignment(torch.randn(4, 1, 3))
    with pytest.raises(ValueError, match="two rows"):
        uniformity(torch.randn(1, 3))
