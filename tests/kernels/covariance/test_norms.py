import pytest
import torch

from fasttrain.kernels import covariance_norms
from tests.kernels.tolerances import assert_close

SHAPES = [(1, 1), (4, 9), (9, 4), (6, 6)]  # the Gram side, the other side, and both of one size


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(z, y):
    """Sum over features pair by pair."""
    c = torch.stack([torch.stack([(z[:, j] * y[:, k]).sum() for k in range(y.shape[1])]) for j in range(z.shape[1])])
    return (c**2).sum(), c.diagonal()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_equal_the_written_sums(shape, backend):
    z, y = draw(*shape), draw(*shape, seed=1)
    torch.testing.assert_close(covariance_norms(z, y, backend=backend), written(z, y))
    torch.testing.assert_close(covariance_norms(z, backend=backend), written(z, z))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_pass_gradcheck(shape):
    z, y = draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(covariance_norms, (z, y))
    assert torch.autograd.gradcheck(covariance_norms, (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_types_are_summed_in_fp32(dtype, shape, autocast):
    z = draw(*shape).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        norm, diagonal = covariance_norms(z)
        (norm / 1000 + diagonal.sum()).backward()
    exact = z.detach().double().requires_grad_()
    expected = covariance_norms(exact, backend="eager")
    (expected[0] / 1000 + expected[1].sum()).backward()
    for value, reference in zip((norm, diagonal), expected, strict=True):
        assert_close(value.detach(), reference.detach(), torch.float32, 1.0)
    assert_close(z.grad, exact.grad, dtype, 1.0)


def test_norms_of_views_are_those_of_each():
    for shape in ((3, 4, 9), (3, 9, 4)):
        z, y = draw(*shape), draw(*shape, seed=1)
        each = [covariance_norms(a, b) for a, b in zip(z, y, strict=True)]
        torch.testing.assert_close(covariance_norms(z, y), tuple(torch.stack(x) for x in zip(*each, strict=True)))


def test_no_matrix_of_features_is_stored():
    z = draw(16, 2000).float().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        covariance_norms(z)[0].backward()
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) <= 4 * z.numel()


def test_norms_compile_into_one_graph():
    def loss(z):
        norm, diagonal = covariance_norms(z)
        return norm - diagonal.square().sum()

    z = draw(5, 7).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(compiled, loss(z))
    torch.testing.assert_close(torch.autograd.grad(compiled, z), torch.autograd.grad(loss(z), z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4), torch.ones(3, 5)), r"^z and other .*\(3, 4\) and \(3, 5\)"),
        ((torch.ones(3, 4), torch.ones(3, 4).double()), "^z and other .*type"),
        ((torch.ones(0, 4),), r"^z .*\(0, 4\)"),
    ],
)
def test_invalid_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        covariance_norms(*arguments)
