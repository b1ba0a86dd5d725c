import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import sinkhorn


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
