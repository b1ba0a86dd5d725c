import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines.views.crops import crop
from tests.pipelines.test_dali import pictures

_STARTS_THREADS = """
import os, numpy as np, torch
from concurrent.futures import ThreadPoolExecutor
from fasttrain.pipelines.views.crops import crop
torch.set_num_threads(4)
count = lambda: len(os.listdir("/proc/self/task"))
image = np.zeros((400, 500, 3), np.uint8)
corners = np.array([1, 1], np.float32), np.array([390, 480], np.float32)
with ThreadPoolExecutor(1) as pool:
    before = pool.submit(count).result()
    for mode in ("linear", "cubic"):
        pool.submit(crop, image, *corners, 224, mode).result()
    print(count() - before)
"""
PIL = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("box", "size"), [((3, 7, 60, 45), 96), ((0, 0, 64, 64), 20), ((10, 4, 11, 9), 64)])
def test_is_pils(interpolation, channels, box, size):
    image = pictures(1, 64, channels)[0]
    top, left, bottom, right = box
    ours = crop(image, np.array([top, left], np.float32), np.array([bottom, right], np.float32), size,
                interpolation)  # fmt: skip
    part = Image.fromarray(
        image[top:bottom, left:right].squeeze(-1) if channels == 1 else image[top:bottom, left:right]
    )
    theirs = np.asarray(part.resize((size, size), PIL[interpolation]), float).reshape(size, size, channels)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.1


def test_starts_no_threads_beside_the_loaders():
    command = [sys.executable, "-c", _STARTS_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "0\n"
