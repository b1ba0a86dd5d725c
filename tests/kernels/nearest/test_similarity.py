import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import nearest_similarity
from fasttrain.kernels.nearest import cpu, launch
from fasttrain.kernels.similarity import launch as tile_launch
from fasttrain.kernels.similarity.tiles import Tile
from tests.kernels.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 3), (33, 16), (70, 40)]


def rows(count, dim, dtype=torch.float64):
    draw = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return normalize(draw, dim=1).to(DEVICE, dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 16)
    monkeypatch.setattr(launch, "forward_tile", lambda *_, **__: Tile(16, 16, 16, 16, 4, 1))
    monkeypatch.setattr(tile_launch, "splits", lambda x, programs, tiles: min(tiles, 3))


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.usefixtures("small_tiles")
def test_backends_equal_the_reference(backend, dtype, exclude_self):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel takes no fp64")
    for size in SIZES:
        x = rows(*size, dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        values, places = nearest_similarity(x, exclude_self=exclude_self, backend=backend)
        expected, expected_places = nearest_similarity(exact, exclude_self=exclude_self, backend="eager")
        assert torch.equal(places, expected_places)
        assert_close(values.detach(), expected.detach(), max(dtype, torch.float32, key=lambda t: t.itemsize), 1.0)
        weights = torch.linspace(0.5, 1.5, size[0], device=DEVICE)
        gradients = [torch.autograd.grad((v * weights).sum(), z)[0] for v, z in ((values, x), (expected, exact))]
        assert_close(*gradients, dtype, 1.0)


def test_untouched_tiles_find_the_maximum_of_every_row():
    x = rows(1000, 8, torch.float32)
    scores = (x @ x.T).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(nearest_similarity(x)[0], scores.amax(1))


def test_gradient_passes_gradcheck():
    x = rows(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nearest_similarity(x)[0], (x,))


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
def test_a_row_of_nan_is_the_nearest_of_all(backend):
    x = rows(20, 4, torch.float32)
    x[3] = torch.nan
    values, places = nearest_similarity(x, backend=backend)
    assert values.isnan().all()
    assert (places[torch.arange(20) != 3] == 3).all()


def test_no_matrix_of_all_scores_is_stored():
    x = rows(5000, 16, torch.float32).cpu().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        nearest_similarity(x, backend="cpu")[0].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cpu._TILE**2 < 4 * 5000**2 / 40


def test_search_compiles_into_one_graph():
    def loss(x):
        return nearest_similarity(x)[0].sum()

    x = rows(9, 4, torch.float32).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(loss(x), x))
    torch.library.opcheck(torch.ops.fasttrain.nearest.default, (x.detach(), None, 0, "cpu"))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(1, 4), {}, r"^x: .*at least 2 rows.*\(1, 4\)"),
        (torch.ones(0, 4), {}, r"^x .*\(0, 4\)"),
        (torch.ones(3, 4, dtype=torch.long), {}, "^x .*int64"),
        (torch.ones(3, 4), {"backend": "cuda"}, "^backend .*'cuda'"),
    ],
)
def test_invalid_argument_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_similarity(x, **options)
