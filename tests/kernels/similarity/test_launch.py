"""The Triton kernels, on a GPU if there is one, else interpreted."""

import pytest
import torch

from fasttrain.kernels import row_logsumexp
from fasttrain.kernels.similarity import launch, tiles
from tests.kernels.similarity import stress
from tests.kernels.similarity.uses import USES, check, results, rows, uses_and_types

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("use", "dtype"), uses_and_types(torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 1, 2), 1000.0), ((17, 130, 100), 0.01), pytest.param((129, 70, 300), 39.0, marks=pytest.mark.slow)],
)
def test_triton_equals_the_reference(use, dtype, size, scale):
    check(use, "triton", *size, dtype, scale, device=DEVICE)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("unit_norm", [True, False], ids=["bounded", "running maximum"])
def test_many_small_tiles_give_the_same(use, unit_norm, monkeypatch):
    """Several tiles of rows per program, ragged ends, spans of columns, features in parts."""

    def small(dim, *_, **__):
        return tiles.Tile(16, 16, 16, 16 if dim <= 16 else 32, 4, 1)

    monkeypatch.setattr(launch, "forward_tile", small)
    monkeypatch.setattr(launch, "backward_tile", small)
    monkeypatch.setattr(launch, "_MOST_SLOTS", 2)
    for size in ((70, 45, 40), (45, 70, 16)):
        check(use, "triton", *size, torch.float32, 10.0, unit_norm=unit_norm, device=DEVICE)


@pytest.mark.parametrize("use", ["rows", "rows with bias"])
def test_few_rows_are_split_into_spans_of_columns(use, monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda x, programs, tiles: min(tiles, 3))
    check(use, "triton", 5, 700, 32, torch.float32, 20.0, device=DEVICE)


@pytest.mark.parametrize("use", stress.LEARNT)
def test_scale_of_0_has_a_finite_gradient(use):
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        scale = torch.zeros(1, device=DEVICE, requires_grad=True)
        x, y = (rows(count, 8, seed, dtype, DEVICE) for seed, count in enumerate((20, 30)))
        lses = stress.LEARNT[use](x, y, scale=scale, backend=backend)
        gradients += torch.autograd.grad(sum(lse.sum() for lse in lses), scale)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_fp16_gradients_of_a_mean_do_not_underflow():
    """A gradient of 1e-7 per row times a probability is far below fp16's smallest number."""
    x = rows(200, 32, 0, torch.float16, DEVICE).requires_grad_()
    expected = x.detach().double().requires_grad_()
    for z, options in ((x, {"unit_norm": True, "backend": "triton"}), (expected, {"backend": "eager"})):
        (row_logsumexp(z, z, scale=5.0, **options).mean() * 1e-3).backward()
    # In fp16 the result loses digits below 6e-5, but not its size.
    assert x.grad.double().norm() == pytest.approx(float(expected.grad.norm()), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("reference", "rows with bias"),
        ("same bits", "self with bias"),
        ("several blocks of rows", "self without own"),
        ("several blocks of rows", "both directions"),
        ("offsets beyond 2^31", "rows"),
        *(("learnt scale, strided rows", use) for use in stress.LEARNT),
    ],
)
def test_check_for_gpus_accepts_the_kernels(kind, use, dtype, monkeypatch):
    monkeypatch.setattr(stress, "REPEATS", 2)
    stress.KINDS[kind](use, 70, 45, 20, dtype, 10.0, True, DEVICE)


@pytest.mark.parametrize("use", stress.LARGE)
def test_chunked_results_equal_the_reference(use):
    x, y = rows(25, 6, 0), rows(17, 6, 1)
    symmetric = use == "self without own"
    parts = stress.chunked_results(x, x if symmetric else y, 8.0, symmetric, chunk=10)
    expected = results(use, "eager", x, y, y[:, 0], 8.0, True)
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-12)
