import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels.normalize import normalize_rows


def _draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 1), (0, 5)])
def test_rows_and_gradient_are_torch_s(shape):
    ours, theirs = (_draw(*shape).requires_grad_() for _ in range(2))
    weight = _draw(*shape).exp()
    (normalize_rows(ours) * weight).sum().backward()
    (normalize(theirs, dim=-1) * weight).sum().backward()
    assert torch.equal(normalize_rows(ours), normalize(theirs, dim=-1))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_rows_of_zeros_stay_and_have_torch_s_gradient():
    ours, theirs = (torch.cat([torch.zeros(1, 4), _draw(1, 4, dtype=torch.float32)]).requires_grad_() for _ in range(2))
    normalize_rows(ours).sum().backward()
    normalize(theirs, dim=-1).sum().backward()
    assert torch.equal(normalize_rows(ours)[0], torch.zeros(4))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_gradient_is_that_of_differences():
    assert torch.autograd.gradcheck(normalize_rows, _draw(4, 3).requires_grad_())


def test_single_precision_is_as_near_to_double_as_torch_s():
    wide = _draw(64, 256)
    gradients = []
    for x, function in (
        (wide, normalize_rows),
        (wide.float(), normalize_rows),
        (wide.float(), lambda x: normalize(x, dim=-1)),
    ):
        x = x.clone().requires_grad_()
        function(x).square().mul(wide).sum().backward()
        gradients.append(x.grad.double())
    exact, ours, torchs = gradients
    assert (ours - exact).norm() <= 1.2 * (torchs - exact).norm()


def test_a_second_derivative_is_refused():
    x = _draw(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(normalize_rows(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_the_rows_and_their_lengths_are_kept():
    x = _draw(64, 32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        normalize_rows(x)
    assert sorted(kept) == [64, 64 * 32]
