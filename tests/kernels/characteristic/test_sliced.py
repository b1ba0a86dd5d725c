import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import sliced_characteristic
from fasttrain.kernels.characteristic import cpu, launch
from fasttrain.kernels.similarity.tiles import Tile
from tests.kernels.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0, dtype=torch.float64):
    draw = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw.to(DEVICE, dtype)


def directions(dim, count, dtype=torch.float64):
    return normalize(draw(dim, count, seed=1), dim=0).to(dtype)


def published(z, slices, knots=17, limit=3.0):
    """SIGReg as in the authors' README: all angles at once, weights that count t and -t."""
    t = torch.linspace(0, limit, knots, dtype=z.dtype)
    weights = torch.full_like(t, 2 * limit / (knots - 1))
    weights[[0, -1]] /= 2
    normal = torch.exp(-t.square() / 2)
    angles = (z @ slices)[..., None] * t
    errors = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
    return (errors @ (weights * normal) * z.shape[-2]).mean()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "_ROWS", 5)
    monkeypatch.setattr(cpu, "_SLICES", 4)
    monkeypatch.setattr(launch, "_tile", lambda z: Tile(16, 16, 16, 16, 4, 1))


def results(z, slices, backend, **options):
    z = z.clone().requires_grad_()
    value = sliced_characteristic(z, slices, backend=backend, **options)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("options", [{}, {"knots": 2}, {"knots": 6, "limit": 5.0}])
@pytest.mark.usefixtures("small_tiles")
def test_statistic_equals_the_published_one(backend, options):
    z, slices = (2 * draw(3, 13, 6) + 0.5).cpu(), directions(6, 9).cpu()
    exact = z.clone().requires_grad_()
    expected = published(exact, slices, **options)
    actual = results(z, slices, backend, **options)
    torch.testing.assert_close(actual, (expected.detach(), torch.autograd.grad(expected, exact)[0]))
    torch.testing.assert_close(sliced_characteristic(z[0], slices), published(z[0], slices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.usefixtures("small_tiles")
def test_backends_and_types_equal_the_reference(backend, dtype):
    for size in ((2, 20, 20, 17), (1, 3, 33, 18)):
        z, slices = draw(*size[:3], dtype=dtype), directions(*size[2:], dtype=dtype)
        value, gradient = results(z, slices, backend)
        expected, exact = results(z.double(), slices.double(), "eager")
        assert_close(value, expected, torch.float32, 40.0)  # angles of up to 3 * 4: an error of a few roundings
        assert_close(gradient, exact, dtype, 40.0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_recurrence_is_exact_for_large_angles(backend):
    """Angles around multiples of pi, where the recurrence amplifies rounding most."""
    z = torch.linspace(-40, 40, 300, device=DEVICE)[:, None]
    slices = torch.ones(1, 1, device=DEVICE)
    value, gradient = results(z, slices, backend)
    expected, exact = results(z.double(), slices.double(), "eager")
    assert_close(value, expected, torch.float32, 100.0)
    assert_close(gradient, exact, torch.float32, 1000.0)


def test_gradient_passes_gradcheck():
    z, slices = draw(2, 5, 3).cpu().requires_grad_(), directions(3, 4).cpu()
    assert torch.autograd.gradcheck(lambda z: sliced_characteristic(z, slices, backend="cpu"), (z,))


def test_normal_rows_have_the_expected_distance_whatever_their_number():
    """E T = integral (1 - exp(-t^2)) exp(-t^2 / 2) dt, and a law of half the width is N times its distance."""
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    for count in (100, 1000):
        z, slices = draw(50, count, 8), directions(8, 32)
        assert sliced_characteristic(z, slices).item() == pytest.approx(expected, rel=0.15)
    assert sliced_characteristic(z / 2, slices) > 10 * expected


def test_no_number_per_row_and_knot_is_stored():
    z, slices = torch.randn(4, 300, 8).requires_grad_(), torch.randn(8, 500)
    with torch.profiler.profile(profile_memory=True) as profile:
        sliced_characteristic(z, slices, backend="cpu").backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * 4 * 2 * 16 * 500 < 4 * 4 * 300 * 500 * 17 / 30


def test_statistic_compiles_into_one_graph():
    z, slices = torch.randn(2, 9, 4).requires_grad_(), torch.randn(4, 6)
    compiled = torch.compile(sliced_characteristic, fullgraph=True, backend="aot_eager")(z, slices)
    value = sliced_characteristic(z, slices)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, z), torch.autograd.grad(value, z))
    torch.library.opcheck(torch.ops.fasttrain.characteristic_sums.default, (z.double(), slices.double(), 5, 3.0, "cpu"))


def test_second_derivative_is_an_error():
    z = torch.randn(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(sliced_characteristic(z, torch.randn(3, 4)), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


Z, A = torch.ones(3, 4), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Z, torch.ones(3, 2)), {}, r"^slices .*D = 4.*\(3, 2\)"),
        ((torch.ones(0, 4), A), {}, r"^z .*\(0, 4\)"),
        ((Z.long(), A), {}, "^z .*int64"),
        ((Z, A), {"knots": 1}, "^knots .*got 1"),
        ((Z, A), {"limit": 0.0}, "^limit .*got 0"),
        ((Z, A), {"backend": "cuda"}, "^backend .*'cuda'"),
    ],
)
def test_invalid_argument_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sliced_characteristic(*arguments, **options)
