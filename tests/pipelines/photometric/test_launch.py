import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.distributed import has_nvidia_device
from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.launch import finish
from tests.pipelines.photometric import cases

DEVICE = "cuda" if has_nvidia_device() else "cpu"  # where there is none, the kernel is interpreted


def by_kernel(pixels, draws, look, dtype=torch.float32):
    given = torch.from_numpy(pixels).to(DEVICE)
    out = torch.full(given.shape, torch.nan, dtype=dtype, device=DEVICE)
    finish(given, draws, look, out=out)
    return out.cpu()


def assert_same(pixels, draws, look):
    """A sum that fp32 rounds to the other side of a half is another level, and Lab's slope is steep there."""
    ours, expected = by_kernel(pixels, draws, look), reference.finish(torch.from_numpy(pixels), draws, look)
    apart = (ours - expected).abs()
    assert (apart > 1e-3 * (1 + expected.abs())).double().mean() < 1e-3
    assert apart.mean() < 1e-3


@pytest.mark.parametrize("size", [1, 3, 17, 32])
def test_everything_is_the_definition(size):
    assert_same(cases.pixels(7, size), cases.draws(7), cases.look())


@pytest.mark.parametrize(("colored", "blurred"), [(True, False), (False, True), (False, False)])
def test_each_part_alone(colored, blurred):
    assert_same(cases.pixels(5, 20), cases.draws(5, colored=colored, blurred=blurred), cases.look())


def test_one_channel():
    assert_same(cases.pixels(5, 20, 1), cases.draws(5, 1), cases.look(channels=1))


@pytest.mark.parametrize("space", ["lab", "ycbcr"])
def test_colour_spaces(space):
    assert_same(cases.pixels(4, 24), cases.draws(4), cases.look(space))


def test_normalised_lab():
    assert_same(cases.pixels(3, 16), cases.draws(3, blurred=False), cases.normalised())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    pixels, draws, look = cases.pixels(3, 16), cases.draws(3), cases.look()
    assert torch.equal(by_kernel(pixels, draws, look, dtype), by_kernel(pixels, draws, look).to(dtype))


def test_images_beside_it_do_not_matter():
    pixels, draws = cases.pixels(6, 16), cases.draws(6)
    whole, rows = by_kernel(pixels, draws, cases.look()), np.array([4, 1])
    assert torch.equal(by_kernel(pixels[rows], draws.of(rows), cases.look()), whole[rows])


def test_no_use_spills():
    """Compiled for A100, H100 and B200 in a process of its own, since this one interprets its kernels."""
    root = Path(__file__).parents[3]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "bench/aot_photometric.py", "--check"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 bytes spilled") == 21
