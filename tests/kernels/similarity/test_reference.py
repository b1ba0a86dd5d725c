import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels.similarity.reference import row_logsumexp


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_equals_its_definition_term_by_term(exclude, biased):
    y, bias = draw(7, 3), draw(7) if biased else None
    expected = []
    for i in range(5):
        scores = [2.5 * sum(float(a) * float(b) for a, b in zip(y[i], row, strict=True)) for row in y]
        terms = [
            score + (float(bias[j]) if biased else 0) for j, score in enumerate(scores) if not (exclude and i == j)
        ]
        expected.append(math.log(sum(map(math.exp, terms))))
    lse = row_logsumexp(y[:5], y, scale=2.5, bias=bias, excluded=0 if exclude else None)
    torch.testing.assert_close(lse, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_excluded_column_places_a_rank_among_gathered_rows():
    z = normalize(draw(8, 4), dim=1)
    halves = [row_logsumexp(z[i : i + 4], z, scale=5.0, excluded=i) for i in (0, 4)]
    torch.testing.assert_close(torch.cat(halves), row_logsumexp(z, z, scale=5.0, excluded=0))
