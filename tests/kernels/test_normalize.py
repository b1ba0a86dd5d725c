import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels.normalize import normalize_rows


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 1), (0, 5)])
def test_rows_and_gradient_equal_torchs(shape):
    rows, expected = (draw(*shape).requires_grad_() for _ in range(2))
    if len(shape) == 3:
        with torch.no_grad():
            rows[0, 0], expected[0, 0] = 0, 0
    weight = draw(*shape).exp()
    assert torch.equal(normalize_rows(rows), normalize(expected, dim=-1))
    (normalize_rows(rows) * weight).sum().backward()
    (normalize(expected, dim=-1) * weight).sum().backward()
    torch.testing.assert_close(rows.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_gradient_passes_gradcheck():
    assert torch.autograd.gradcheck(normalize_rows, draw(4, 3).requires_grad_())


def test_fp32_is_as_accurate_as_torch():
    wide, gradients = draw(64, 256), []
    functions = (normalize_rows, torch.float64), (normalize_rows, torch.float32), (normalize, torch.float32)
    for function, dtype in functions:
        x = wide.to(dtype, copy=True).requires_grad_()
        function(x).square().mul(wide).sum().backward()
        gradients.append(x.grad.double())
    exact, single, torchs = gradients
    assert (single - exact).norm() <= 1.2 * (torchs - exact).norm()


def test_second_derivative_is_an_error():
    x = draw(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(normalize_rows(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_rows_and_lengths_are_saved():
    x, saved = draw(64, 32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
        normalize_rows(x)
    assert sorted(saved) == [64, 64 * 32]
