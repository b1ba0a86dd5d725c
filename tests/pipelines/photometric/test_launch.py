import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.distributed.world import has_nvidia_device
from fasttrain.pipelines import View, ViewRecipe, draw_parameters
from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.draws import draws
from tests.pipelines.photometric import cases, stress

DEVICE = "cuda" if has_nvidia_device() else "cpu"  # without a GPU the kernel is interpreted


def by_kernel(pixels, draws, look, dtype=torch.float32):
    return stress.by_kernel(pixels, draws, look, dtype, DEVICE)


@pytest.mark.parametrize(
    ("use", "size"), [*(("everything", size) for size in (1, 3, 17, (32, 20))), *((use, 20) for use in stress.USES)]
)
def test_every_use_equals_the_reference(use, size):
    stress.check(use, 5, size, torch.float32, DEVICE)


def test_lab_is_normalised():
    pixels, draws = cases.pixels(3, 16), cases.draws(3, blurred=False)
    raw, look = by_kernel(pixels, draws, cases.look("lab")), cases.normalised()
    expected = raw * torch.from_numpy(look.scale) + torch.from_numpy(look.shift)
    torch.testing.assert_close(by_kernel(pixels, draws, look), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    pixels, draws, look = cases.pixels(3, 16), cases.draws(3), cases.look()
    assert torch.equal(by_kernel(pixels, draws, look, dtype), by_kernel(pixels, draws, look).to(dtype))


def test_kernel_takes_strided_draws_of_a_recipe():
    """The kernel reads memory: arrays must be copied whatever their strides."""
    pixels, view = cases.pixels(5, 16), View(16, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)
    sizes = np.full(5, 16)
    steps = draws(view, 3, draw_parameters(ViewRecipe((view,)), 0, 0, np.arange(5), sizes, sizes), 0)
    expected = reference.finish(torch.from_numpy(pixels), steps, cases.look())
    assert ((by_kernel(pixels, steps, cases.look()) - expected).abs() > 0.5).double().mean() < 2e-3


@pytest.mark.slow
def test_no_use_spills():
    """Compiled for A100, H100 and B200 in another process, because this one interprets its kernels."""
    root = Path(__file__).parents[3]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "bench.kernels.aot_photometric", "--check"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 bytes spilled") == 24
