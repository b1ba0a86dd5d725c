"""The tile shapes, and the kernels compiled for them without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.kernels.similarity.tiles import backward_tile, forward_tile, prototype_tile

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 100, 128, 200, 256, 257, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [0, 80, 89, 90, 120])
def test_tiles_have_sizes_that_tl_dot_takes(dim, dtype, capability):
    """The compiler needs powers of two from 16 up, which the interpreter does not check."""
    forward = [forward_tile(dim, dtype, capability, columns=columns) for columns in (False, True)]
    for tile in (*forward, backward_tile(dim, dtype, capability), prototype_tile(dim, dtype, capability)):
        for size in (tile.block_m, tile.block_n, tile.block_d, tile.block_out):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tile.block_m % tile.block_n == 0  # a span of the symmetric grid has whole blocks of rows
        if dim <= tile.block_d:
            assert tile.block_out == tile.block_d  # the gradient uses the tile of y that was read


@pytest.mark.slow
def test_no_bf16_kernel_spills_and_all_fit_the_chip():
    """Compiled for six GPUs in another process, because this one interprets its kernels.

    128 and 256 features are what the recipes use. ``python -m bench.kernels.aot`` compiles for all sizes and types.
    """
    command = [sys.executable, "-m", "bench.kernels.aot", "--check", "--types", "bf16", "--dims", "128", "256"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d{3} kernels: no bf16 spill, all within shared memory", done.stdout)
