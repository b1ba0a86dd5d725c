import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels.similarity.reference import bidirectional_logsumexp, row_logsumexp


def _loop(x, y, scale, bias, exclude):
    rows = []
    for i in range(len(x)):
        terms = [
            scale * sum(float(a) * float(b) for a, b in zip(x[i], y[j], strict=True))
            + (0 if bias is None else float(bias[j]))
            for j in range(len(y))
            if not (exclude and i == j)
        ]
        rows.append(math.log(sum(math.exp(t) for t in terms)) if terms else -math.inf)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_its_definition_term_by_term(exclude, biased):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = torch.cat([x, torch.randn(2, 3, generator=generator, dtype=torch.float64)])
    bias = torch.randn(7, generator=generator, dtype=torch.float64) if biased else None
    got = row_logsumexp(x, y, scale=2.5, bias=bias, excluded=0 if exclude else None)
    torch.testing.assert_close(got, _loop(x, y, 2.5, bias, exclude), rtol=1e-12, atol=1e-12)


def test_a_single_row_without_itself_has_nothing_to_sum_and_no_gradient():
    x = normalize(torch.randn(1, 4), dim=1).requires_grad_()
    lse = row_logsumexp(x, x, scale=10.0, excluded=0)
    assert lse.item() == -math.inf


def test_the_excluded_column_places_a_rank_among_the_gathered_rows():
    z = normalize(torch.randn(8, 4, dtype=torch.float64), dim=1)
    whole = row_logsumexp(z, z, scale=5.0, excluded=0)
    halves = [row_logsumexp(z[i : i + 4], z, scale=5.0, excluded=i) for i in (0, 4)]
    torch.testing.assert_close(torch.cat(halves), whole)


def test_both_directions_are_the_rows_of_the_matrix_and_of_its_transpose():
    x, y = torch.randn(5, 3), torch.randn(7, 3)
    rows, columns = bidirectional_logsumexp(x, y, scale=2.0)
    torch.testing.assert_close(rows, row_logsumexp(x, y, scale=2.0))
    torch.testing.assert_close(columns, row_logsumexp(y, x, scale=2.0))


def test_bias_shift_moves_every_row_by_the_shift():
    x, y, bias = torch.randn(6, 3), torch.randn(9, 3), torch.randn(9)
    base = row_logsumexp(x, y, scale=1.0, bias=bias)
    torch.testing.assert_close(row_logsumexp(x, y, scale=1.0, bias=bias + 3), base + 3)


def test_autocast_does_not_round_the_similarities():
    z = normalize(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = row_logsumexp(z, z, scale=20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_logsumexp(z, z, scale=20.0), expected)
