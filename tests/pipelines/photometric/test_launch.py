import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.distributed.world import has_nvidia_device
from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.draws import draws
from fasttrain.pipelines.views.draw import View, ViewRecipe, draw_parameters
from tests.pipelines.photometric import cases, stress

DEVICE = "cuda" if has_nvidia_device() else "cpu"  # where there is none, the kernel is interpreted


def by_kernel(pixels, draws, look, dtype=torch.float32):
    return stress.by_kernel(pixels, draws, look, dtype, DEVICE)


@pytest.mark.parametrize("size", [1, 3, 17, 32])
def test_everything_is_the_definition(size):
    stress.check("everything", 7, size, torch.float32, DEVICE)


@pytest.mark.parametrize("use", stress.USES)
def test_every_use_is_the_definition(use):
    stress.check(use, 5, 20, torch.float32, DEVICE)


def test_normalised_lab():
    pixels, draws = cases.pixels(3, 16), cases.draws(3, blurred=False)
    raw, look = by_kernel(pixels, draws, cases.look("lab")), cases.normalised()
    expected = raw * torch.from_numpy(look.scale) + torch.from_numpy(look.shift)
    torch.testing.assert_close(by_kernel(pixels, draws, look), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    pixels, draws, look = cases.pixels(3, 16), cases.draws(3), cases.look()
    assert torch.equal(by_kernel(pixels, draws, look, dtype), by_kernel(pixels, draws, look).to(dtype))


def test_images_beside_it_do_not_matter():
    pixels, draws = cases.pixels(6, 16), cases.draws(6)
    whole, rows = by_kernel(pixels, draws, cases.look()), np.array([4, 1])
    assert torch.equal(by_kernel(pixels[rows], draws.of(rows), cases.look()), whole[rows])


def test_what_a_recipe_draws_is_what_the_kernel_takes():
    """Of arrays it takes the memory, whatever their strides."""
    pixels, view = cases.pixels(5, 16), View(16, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)
    sizes = np.full(5, 16)
    drawn = draws(view, 3, draw_parameters(ViewRecipe((view,)), 0, 0, np.arange(5), sizes, sizes), 0)
    found, expected = (
        by_kernel(pixels, drawn, cases.look()),
        reference.finish(torch.from_numpy(pixels), drawn, cases.look()),
    )
    assert ((found - expected).abs() > 0.5).double().mean() < 2e-3


def test_no_use_spills():
    """Compiled for A100, H100 and B200 in a process of its own, since this one interprets its kernels."""
    root = Path(__file__).parents[3]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "bench.kernels.aot_photometric", "--check"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 bytes spilled") == 24
