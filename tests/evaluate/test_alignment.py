"""Alignment and uniformity are the means over all pairs in the paper's definition."""

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.evaluate.alignment import alignment, uniformity


def test_alignment_equals_the_mean_over_pairs_of_views():
    views = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    z = normalize(views.double(), dim=-1)
    pairs = [(z[:, i] - z[:, j]).square().sum(-1) for i in range(4) for j in range(i)]
    assert alignment(views) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
    assert alignment(views[:, :1].expand(7, 3, 5)) == pytest.approx(0, abs=1e-12)


def test_uniformity_equals_the_mean_over_pairs_of_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=generator)
    distances = torch.pdist(normalize(rows, dim=1))
    assert uniformity(rows) == pytest.approx(float((-2 * distances.square()).exp().mean().log()), abs=1e-5)
    assert uniformity(torch.ones(50, 8)) == pytest.approx(0, abs=1e-5)
    spread = torch.randn(4000, 128, generator=generator)
    assert uniformity(spread) == pytest.approx(-3.94, abs=0.01)  # -4 + log 0F1(; 64; 4)
    assert abs(uniformity(torch.zeros(5, 3))) < 100  # finite


@pytest.mark.parametrize(("measure", "rows"), [(alignment, torch.ones(4, 1, 3)), (uniformity, torch.ones(1, 3))])
def test_too_few_rows_are_refused(measure, rows):
    with pytest.raises(ValueError, match="needs two"):
        measure(rows)
