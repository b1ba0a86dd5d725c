import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import prototype_sinkhorn_center, sinkhorn
from fasttrain.kernels.sinkhorn import chunks


def swav(scores, epsilon, iterations):
    """Sinkhorn as in SwAV's official code: rescale the matrix, prototypes first."""
    q = (scores.double() / epsilon).exp().T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= b
    return (q * b).T


@pytest.mark.parametrize("backend", ["auto", "eager"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 20), st.integers(1, 5), st.integers(0, 1000))
def test_assignment_equals_the_rescaled_matrix(backend, rows, columns, iterations, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    assignment = sinkhorn(scores, epsilon=0.1, iterations=iterations, backend=backend)
    torch.testing.assert_close(assignment.double(), swav(scores, 0.1, iterations), rtol=2e-4, atol=1e-6)


def test_half_precision_scores_stay_finite():
    """exp(1 / 0.05) is 4.9e8, above fp16's range: the usual code gives NaN."""
    assignment = sinkhorn(torch.eye(4, dtype=torch.float16))
    assert assignment.isfinite().all()
    torch.testing.assert_close(assignment.diagonal(), torch.ones(4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.rand(3, 3), {"backend": "cuda"}, "backend"),
        *(
            (torch.rand(3, 3), options, "sinkhorn")
            for options in ({"iterations": 0}, {"epsilon": 0.0}, {"epsilon": -1.0})
        ),
        (1e6 * torch.rand(3, 3), {"iterations": 0}, "sinkhorn"),  # scores for the reference
        *((scores, {}, "scores") for scores in (torch.rand(3), torch.rand(0, 3), torch.ones(3, 3, dtype=torch.long))),
    ],
)
def test_invalid_argument_is_named(scores, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sinkhorn(scores, **options)


@pytest.mark.parametrize("chunk", [1 << 24, 40])
@pytest.mark.parametrize("iterations", [1, 3])
def test_center_without_scores_gives_the_rescaled_matrix(chunk, iterations, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    rows, prototypes = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (17, 10))
    rows, prototypes = (torch.nn.functional.normalize(x, dim=1) for x in (rows, prototypes))
    center = prototype_sinkhorn_center(rows, prototypes, epsilon=0.07, iterations=iterations)
    assignment = ((rows @ prototypes.T - center) / 0.07).softmax(1)
    torch.testing.assert_close(assignment, swav(rows @ prototypes.T, 0.07, iterations), rtol=1e-10, atol=1e-12)


def test_center_without_rows_is_finite():
    assert not prototype_sinkhorn_center(torch.ones(0, 4), torch.ones(5, 4)).any()


def test_center_of_rows_far_apart_stays_finite():
    """exp(200 / 0.05) overflows even fp64: the sums are of logarithms."""
    center = prototype_sinkhorn_center(200 * torch.eye(4), torch.eye(4))
    assert center.isfinite().all()


@pytest.mark.parametrize("options", [{"iterations": 0}, {"epsilon": 0.0}])
def test_invalid_argument_without_scores_is_named(options):
    with pytest.raises(ValueError, match="^sinkhorn"):
        prototype_sinkhorn_center(torch.rand(3, 3), torch.rand(3, 3), **options)
