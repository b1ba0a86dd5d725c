import pytest
import torch

from fasttrain.kernels import bidirectional_logsumexp, nt_xent, row_logsumexp
from tests.kernels.similarity.uses import rows

_OPERATORS = torch.ops.fasttrain


def _pair(columns):
    x, y = rows(5, 4, 0).requires_grad_(), rows(6, 4, 1).requires_grad_()
    bias = torch.zeros(6, dtype=torch.float64).requires_grad_()
    return x, y, None if columns else bias, None, 2.0, None, True, columns, "cpu"


@pytest.mark.parametrize("columns", [False, True])
def test_opcheck_of_the_pair(columns):
    torch.library.opcheck(_OPERATORS.pair_lse.default, _pair(columns))


@pytest.mark.parametrize("gain", [None, 1.5])
def test_opcheck_of_the_symmetric_case(gain):
    x = rows(5, 4, 0).requires_grad_()
    gain = None if gain is None else torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(_OPERATORS.self_lse.default, (x, gain, 2.0, True, True, "cpu"))


def test_opcheck_of_the_gradients():
    x, y, lse = rows(5, 4, 0), rows(6, 4, 1), torch.ones(5, dtype=torch.float64)
    empty = lse[:0]
    torch.library.opcheck(
        _OPERATORS.pair_lse_backward.default,
        (x, y, None, None, lse, empty, lse, None, 2.0, None, True, True, True, "cpu"),
    )
    kept = x @ x.T
    torch.library.opcheck(_OPERATORS.self_lse_backward.default, (x, None, lse, kept, lse, 2.0, True, True, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_comes_out_in_the_type_of_accumulation(dtype):
    x = rows(5, 4, 0, dtype).requires_grad_()
    lse = row_logsumexp(x, x, scale=2.0)
    lse.sum().backward()
    assert (lse.dtype, x.grad.dtype) == (torch.float32, dtype)


def test_compiles_into_one_graph():
    def loss(a, b):
        queue = row_logsumexp(a, b, scale=3.0, bias=b.detach()[:, 0])
        both = bidirectional_logsumexp(a, b, scale=2.0)
        return nt_xent(a, b, temperature=0.2) + queue.mean() + both[0].mean() + both[1].mean()

    eager = [rows(6, 4, s, torch.float32).requires_grad_() for s in (0, 1)]
    compiled = [t.detach().clone().requires_grad_() for t in eager]
    expected, got = loss(*eager), torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, compiled), torch.autograd.grad(expected, eager), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_rounds_nothing():
    x = rows(32, 8, 0, torch.float32).requires_grad_()
    expected = row_logsumexp(x, x, scale=20.0)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = row_logsumexp(x, x, scale=20.0)
        (same,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(got, expected)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("same", [True, False])
def test_a_second_derivative_is_refused(same):
    x, y = rows(5, 4, 0).requires_grad_(), rows(5, 4, 1).requires_grad_()
    lse = row_logsumexp(x, x if same else y, scale=2.0, backend="cpu")
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; kernels with backend='eager' have"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("use", ["rows", "self", "both"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_scale_that_is_a_tensor_gets_its_gradient(use, backend):
    kind = torch.float64 if backend == "cpu" else torch.float32
    found = []
    for chosen, dtype in ((backend, kind), ("eager", torch.float64)):
        x, y = rows(6, 4, 0, dtype), rows(7, 4, 1, dtype)
        scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
        kwargs = {"scale": scale, "backend": chosen}
        lses = {
            "rows": lambda x=x, y=y, kw=kwargs: [row_logsumexp(x, y, **kw)],
            "self": lambda x=x, kw=kwargs: [row_logsumexp(x, x, exclude_self=True, **kw)],
            "both": lambda x=x, y=y, kw=kwargs: bidirectional_logsumexp(x, y, **kw),
        }[use]()
        sum((lse * torch.arange(len(lse))).sum() for lse in lses).backward()
        found.append(scale.grad.double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
