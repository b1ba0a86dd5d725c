import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import siglip
from fasttrain.kernels.sigmoid import cpu, launch
from fasttrain.kernels.similarity import launch as tile_launch
from fasttrain.kernels.similarity.tiles import Tile
from tests.kernels.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(rows, dim, dtype=torch.float64):
    draw = torch.randn(2, rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [z.to(DEVICE, dtype) for z in normalize(draw, dim=2)]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 5)
    monkeypatch.setattr(launch, "attention_tile", lambda *_: Tile(16, 16, 16, 16, 4, 1))
    monkeypatch.setattr(tile_launch, "splits", lambda x, programs, tiles: min(tiles, 3))


def results(x, y, scale, bias, backend):
    """Return the loss and the gradients of all four arguments."""
    numbers = [torch.tensor(value, dtype=torch.float64, device=x.device) for value in (scale, bias)]
    leaves = [t.clone().requires_grad_() for t in (x, y, *numbers)]
    loss = siglip(*leaves[:2], scale=leaves[2], bias=leaves[3], backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.usefixtures("small_tiles")
def test_backends_equal_the_reference(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel takes no fp64")
    wide = max(dtype, torch.float32, key=lambda t: t.itemsize)
    for size, scale, bias in (((35, 20), 10.0, -10.0), ((1, 3), 0.0, 2.0), ((18, 33), 60.0, 5.0)):
        x, y = pair(*size, dtype)
        actual = results(x, y, scale, bias, backend)
        expected = results(x.double(), y.double(), scale, bias, "eager")
        for number, (value, exact) in enumerate(zip(actual, expected, strict=True)):
            kind = wide if number in (0, 3, 4) else dtype
            assert_close(value, exact, kind, max(scale, 40.0), f"output {number}", least=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_bf16_gradient_of_a_well_fitted_loss_is_accurate(backend):
    """If the own pair were subtracted after rounding G, its gradient of 1e-3 would be lost in a sigmoid of almost 1."""
    x = torch.eye(16, device=DEVICE).bfloat16()
    _, gradient, *_ = results(x, x, 14.0, -7.0, backend)
    _, exact, *_ = results(x.double(), x.double(), 14.0, -7.0, "eager")
    assert_close(gradient, exact, torch.bfloat16, 1.0)


@pytest.mark.usefixtures("small_tiles")
def test_gradients_pass_gradcheck():
    x, y = (z.cpu().requires_grad_() for z in pair(7, 3))
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -1.0)]
    assert torch.autograd.gradcheck(
        lambda x, y, scale, bias: siglip(x, y, scale=scale, bias=bias, backend="cpu"), (x, y, *numbers)
    )


@pytest.mark.parametrize("needs", [(), (0,), (1,), (2,), (3,)])
def test_each_argument_may_be_the_only_one_with_a_gradient(needs):
    x, y = (z.cpu() for z in pair(6, 4))
    leaves = [x, y, torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    for need in needs:
        leaves[need].requires_grad_()
    loss = siglip(*leaves[:2], scale=leaves[2], bias=leaves[3], backend="cpu")
    assert loss.requires_grad is bool(needs)
    expected = results(*(t.detach() for t in leaves[:2]), 2.0, -1.0, "eager")
    torch.testing.assert_close(loss.detach(), expected[0])
    for need in needs:
        torch.testing.assert_close(torch.autograd.grad(loss, leaves[need])[0], expected[need + 1])


def test_no_matrix_of_all_scores_is_stored():
    x, y = (z.float().cpu().requires_grad_() for z in pair(4000, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        siglip(x, y, scale=10.0, bias=-10.0, backend="cpu").backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cpu._TILE**2 < 4 * 4000**2 / 25


def test_loss_compiles_into_one_graph():
    def loss(x, y, scale):
        return siglip(x, y, scale=scale, bias=-1.0)

    x, y = (z.float().cpu().requires_grad_() for z in pair(6, 4))
    scale = torch.tensor(3.0, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y, scale)
    torch.testing.assert_close(compiled, loss(x, y, scale))
    leaves = (x, y, scale)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss(*leaves), leaves))
    double = [t.detach().double().requires_grad_() for t in leaves]
    torch.library.opcheck(
        torch.ops.fasttrain.sigmoid_terms.default, (*double, double[2].detach() - 4, 0, True, True, "cpu")
    )


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 4), (4, 4)), {}, r"^x and y must have the same shape, got \(3, 4\) and \(4, 4\)"),
        (((0, 4), (0, 4)), {}, r"^x .*\(0, 4\)"),
        (((3, 4), (3, 4)), {"scale": float("inf")}, "^scale .*inf"),
        (((3, 4), (3, 4)), {"bias": torch.zeros(2)}, r"^bias .*\(2,\)"),
        (((3, 4), (3, 4)), {"backend": "cuda"}, "^backend .*'cuda'"),
    ],
)
def test_invalid_argument_is_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        siglip(*(torch.ones(shape) for shape in shapes), **{"scale": 1.0, "bias": 0.0, **options})
