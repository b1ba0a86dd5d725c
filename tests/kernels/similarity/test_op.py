import pytest
import torch

from fasttrain.kernels import bidirectional_logsumexp, nt_xent, row_logsumexp
from tests.kernels.similarity.stress import LEARNT
from tests.kernels.similarity.uses import rows

OPERATORS = torch.ops.fasttrain


def leaves(dtype=torch.float64):
    return [rows(5 + k, 4, k, dtype).requires_grad_() for k in (0, 1)]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("gain", [None, 1.5])
def test_operators_pass_opcheck(columns, gain):
    x, y = leaves()
    bias = None if columns else torch.zeros(6, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(OPERATORS.pair_lse.default, (x, y, bias, None, 2.0, None, True, columns, False, "cpu"))
    queue = (x, y.detach(), None, None, 2.0, None, True, False, True, "cpu")
    torch.library.opcheck(OPERATORS.pair_lse.default, queue)
    gain = gain and torch.tensor(gain, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPERATORS.self_lse.default, (x, gain, 2.0, True, True, "cpu"))
    x, y, lse = x.detach(), y.detach(), torch.ones(5, dtype=torch.float64)
    pair = (x, y, None, None, lse, lse[:0], lse, None, 2.0, None, True, True, True, "cpu")
    torch.library.opcheck(OPERATORS.pair_lse_backward.default, pair)
    for wide in (x.T.contiguous().T, x.expand(5, 4)):
        torch.library.opcheck(OPERATORS.pair_lse_backward.default, (wide, *pair[1:]))
        torch.library.opcheck(
            OPERATORS.self_lse_backward.default, (wide, None, lse, x @ x.T, lse, 2.0, True, True, "cpu")
        )
    torch.library.opcheck(OPERATORS.self_lse_backward.default, (x, None, lse, x @ x.T, lse, 2.0, True, True, "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed_do_not_alias(needs, backend):
    x, y = (z.detach() for z in leaves(torch.float32))
    lse = torch.ones(5)
    pair = (x, y, None, None, lse, lse[:0].clone(), lse.clone(), None, 2.0, None, True, *needs, backend)
    torch.library.opcheck(OPERATORS.pair_lse_backward.default, pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_is_fp32_and_gradient_has_the_inputs_type(dtype):
    x = leaves(dtype)[0]
    lse = row_logsumexp(x, x, scale=2.0)
    lse.sum().backward()
    assert (lse.dtype, x.grad.dtype) == (torch.float32, dtype)


def test_loss_compiles_into_one_graph():
    def loss(a, b):
        queue = row_logsumexp(a, b, scale=3.0, bias=b.detach()[:, 0])
        both = bidirectional_logsumexp(a, b, scale=2.0)
        return nt_xent(a, b[:5], temperature=0.2) + queue.mean() + both[0].mean() + both[1].mean()

    x, y = leaves(torch.float32)
    expected, compiled = loss(x, y), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(torch.autograd.grad(compiled, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_autocast_changes_no_bit(backend):
    def results():
        x = rows(32, 8, 0, torch.float32).requires_grad_()
        lse = row_logsumexp(x, x, scale=20.0, backend=backend)
        return (lse, *torch.autograd.grad(lse.sum(), x)) if backend == "cpu" else (lse,)

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize("same", [True, False])
def test_second_derivative_is_an_error(same):
    x, y = leaves()
    lse = row_logsumexp(x, x if same else y, scale=2.0, backend="cpu")
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("value", [3.0, 0.0])
@pytest.mark.parametrize("use", LEARNT)
def test_tensor_scale_gets_a_gradient(use, value):
    """On the CPU. The test of stress.py checks Triton."""
    gradients = []
    for backend in ("cpu", "eager"):
        scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        lses = LEARNT[use](*(x.detach() for x in leaves()), scale=scale, backend=backend)
        gradients += torch.autograd.grad(sum((lse * torch.arange(len(lse))).sum() for lse in lses), scale)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
