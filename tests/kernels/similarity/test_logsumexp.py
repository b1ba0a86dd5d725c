import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import bidirectional_logsumexp, row_logsumexp
from fasttrain.kernels.similarity import reference
from tests.kernels.similarity.uses import rows

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
sizes = st.integers(1, 30)


@pytest.mark.parametrize("excluded", [None, 0])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_equals_its_definition_term_by_term(excluded, biased):
    y, bias = 2 * rows(7, 3, 0), rows(7, 2, 1)[:, 0] if biased else torch.zeros(7)
    expected = []
    for i in range(5):
        scores = [2.5 * sum(a * b for a, b in zip(y[i].tolist(), row, strict=True)) for row in y.tolist()]
        terms = [math.exp(scores[j] + bias[j].item()) for j in range(7) if excluded is None or i != j]
        expected.append(math.log(sum(terms)))
    lse = reference.row_logsumexp(y[:5], y, scale=2.5, bias=bias if biased else None, excluded=excluded)
    torch.testing.assert_close(lse, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_excluded_column_places_a_rank_among_gathered_rows():
    z = rows(8, 4, 0)
    halves = [reference.row_logsumexp(z[i : i + 4], z, scale=5.0, excluded=i) for i in (0, 4)]
    torch.testing.assert_close(torch.cat(halves), reference.row_logsumexp(z, z, scale=5.0, excluded=0))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.floats(0.01, 1000), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_logsumexp_follows_its_algebra(n, m, k, scale, shift, seed):
    """Permutations, a shift of the bias, more columns, and the transpose."""
    x, y, z = (rows(count, 4, seed + i) for i, count in enumerate((n, m, k)))
    lse = row_logsumexp(x, y, scale=scale)
    order = torch.randperm(n)
    bias = rows(m, 2, seed)[:, 0]
    biased = row_logsumexp(x, y, scale=scale, bias=bias)
    by_row, by_column = bidirectional_logsumexp(x, y, scale=scale)
    for value, expected in (
        (row_logsumexp(x[order], y[torch.randperm(m)], scale=scale), lse[order]),
        (row_logsumexp(x, y, scale=scale, bias=bias + shift), biased + shift),
        (row_logsumexp(x, torch.cat([y, z]), scale=scale), torch.logaddexp(lse, row_logsumexp(x, z, scale=scale))),
        (by_row, lse),
        (by_column, row_logsumexp(y, x, scale=scale)),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("scale", [0.0, 10.0, 300.0])
def test_empty_sum_is_minus_infinity_without_gradient(backend, scale):
    x, y = (rows(1, 4, seed, torch.float32).requires_grad_() for seed in (0, 1))
    for other in (x, y):
        lse = row_logsumexp(x, other, scale=scale, exclude_self=True, unit_norm=True, backend=backend)
        assert lse.item() == -math.inf
        if backend != "eager":  # autograd of the definition gives NaN
            assert all(not gradient.any() for gradient in torch.autograd.grad(lse.sum(), {x, other}))


@BACKENDS
def test_bias_of_minus_infinity_removes_a_column(backend):
    x, y = rows(5, 4, 0, torch.float32).requires_grad_(), rows(6, 4, 1, torch.float32).requires_grad_()
    bias = torch.zeros(6)
    bias[[0, 3]] = -torch.inf
    lse = row_logsumexp(x, y, scale=2.0, bias=bias, backend=backend)
    torch.testing.assert_close(lse, row_logsumexp(x, y[[1, 2, 4, 5]], scale=2.0, backend="eager"))
    lse.sum().backward()
    assert y.grad[[0, 3]].abs().max() < 1e-20


@BACKENDS
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_nan_stays_in_its_row(backend, scale):
    x, y = rows(5, 4, 0, torch.float32), rows(6, 4, 1, torch.float32)
    x[2, 1] = torch.nan
    lse = row_logsumexp(x.requires_grad_(), y, scale=scale, unit_norm=True, backend=backend)
    lse.sum().backward()
    for values in (lse, x.grad[:, 0]):
        assert values.isnan().tolist() == [False, False, True, False, False]


@BACKENDS
def test_broken_promise_of_unit_norm_is_exact_up_to_80_nats(backend):
    x, y = (2 * rows(9, 4, seed, torch.float32) for seed in (0, 0))
    results = []
    for z, options in ((x, {"unit_norm": True, "backend": backend}), (y.double(), {"backend": "eager"})):
        lse = row_logsumexp(z.requires_grad_(), z, scale=20.0, **options)
        results.append([lse, *torch.autograd.grad(lse.sum(), z)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@BACKENDS
def test_strided_rows_and_features_are_read(backend):
    wide = rows(8, 12, 0, torch.float32)
    for view in (wide[:, 2:7], wide[::2], wide.T, wide[:, ::3]):
        expected = row_logsumexp(view.contiguous(), view.contiguous(), scale=2.0, backend="eager")
        torch.testing.assert_close(row_logsumexp(view, view, scale=2.0, backend=backend), expected)


@BACKENDS
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradient_exists_only_where_needed(backend, needs):
    x, y = (rows(5 + k, 4, k, torch.float32).requires_grad_(need) for k, need in enumerate(needs))
    row_logsumexp(x, y, scale=2.0, backend=backend).sum().backward()
    assert (x.grad is not None, y.grad is not None) == needs


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(3, 4), {}, r"^x .*\(0, 4\)"),
        (torch.zeros(3, 4), torch.zeros(3, 0), {}, r"^y .*\(3, 0\)"),
        (torch.zeros(3), torch.zeros(3, 4), {}, r"^x .*\(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 5), {}, r"^x and y .*\(3, 4\) and \(3, 5\)"),
        (torch.zeros(3, 4), torch.zeros(3, 4).half(), {}, r"^x and y .*float32.*float16"),
        (torch.zeros(3, 4).int(), torch.zeros(3, 4).int(), {}, r"^x .*torch.int32"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"scale": math.nan}, r"^scale .*nan"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"scale": torch.ones(2)}, r"^scale .*\(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"bias": torch.zeros(4)}, r"^bias .*\[3\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"bias": torch.zeros(3), "group": object()}, r"^bias "),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"backend": "cuda"}, r"^backend .*'cuda'"),
    ],
)
def test_invalid_argument_is_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        row_logsumexp(x, y, **{"scale": 1.0, **options})
