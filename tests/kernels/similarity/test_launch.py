"""The Triton kernels: on the GPU where there is one, else interpreted."""

import pytest
import torch

from fasttrain.kernels.similarity import launch, tiles
from tests.kernels.similarity.uses import USES, check, uses_and_types

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SIZES = [(1, 1, 2), (17, 130, 100), (129, 70, 300)]


@pytest.mark.parametrize(("use", "dtype"), uses_and_types(torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_equals_the_reference(use, dtype, size):
    scale = {1: 1000.0, 17: 0.01, 129: 39.0}[size[0]]
    check(use, "triton", *size, dtype, scale, device=_DEVICE)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("unit_norm", [True, False], ids=["bounded", "running maximum"])
def test_many_small_tiles_give_the_same(use, unit_norm, monkeypatch):
    """Several tiles of rows a program, ragged ends, spans of columns, features in parts."""
    monkeypatch.setattr(launch, "forward_tile", lambda dim, *args, **kwargs: _small(dim))
    monkeypatch.setattr(launch, "backward_tile", lambda dim, *args: _small(dim))
    monkeypatch.setattr(launch, "_MOST_SLOTS", 2)
    check(use, "triton", 70, 45, 40, torch.float32, 10.0, unit_norm=unit_norm, device=_DEVICE)
    check(use, "triton", 45, 70, 16, torch.float32, 10.0, unit_norm=unit_norm, device=_DEVICE)


def _small(dim):
    return tiles.Tile(16, 16, 16, 16 if dim <= 16 else 32, 4, 1)


def test_few_rows_are_cut_into_spans_of_columns(monkeypatch):
    monkeypatch.setattr(launch, "splits", lambda x, programs, tiles: min(tiles, 3))
    check("rows", "triton", 5, 700, 32, torch.float32, 20.0, device=_DEVICE)
    check("rows with bias", "triton", 5, 700, 32, torch.float32, 20.0, device=_DEVICE)


def test_fp16_gradients_of_a_mean_over_many_rows_do_not_underflow():
    """A gradient of 1e-7 a row times a probability is far below fp16's smallest number."""
    x = torch.nn.functional.normalize(torch.randn(200, 32), dim=1).to(_DEVICE, torch.float16).requires_grad_()
    from fasttrain.kernels import row_logsumexp

    (row_logsumexp(x, x, scale=5.0, unit_norm=True, backend="triton").mean() * 1e-3).backward()
    expected = x.detach().double().requires_grad_()
    (row_logsumexp(expected, expected, scale=5.0, backend="eager").mean() * 1e-3).backward()
    # Held in fp16 the result itself loses digits below 6e-5, but not its size.
    assert x.grad.double().norm() == pytest.approx(float(expected.grad.norm()), rel=0.02)
