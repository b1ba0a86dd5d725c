import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines.views.crops import crop
from tests.pipelines.rendering import pictures

COUNT_THREADS = """
import os, numpy as np, torch
from fasttrain.pipelines.views.crops import crop
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
for mode in ("linear", "cubic"):
    crop(np.zeros((400, 500, 3), np.uint8), np.float32([1, 1]), np.float32([390, 480]), 224, mode)
print(len(os.listdir("/proc/self/task")) - before)
"""
PIL = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", PIL)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("box", "size"), [((3, 7, 60, 45), 96), ((0, 0, 64, 64), 20), ((10, 4, 11, 9), 64)])
def test_crop_equals_pil(interpolation, channels, box, size):
    image = pictures(1, 64, channels)[0]
    top, left, bottom, right = box
    view = crop(image, np.array(box[:2], np.float32), np.array(box[2:], np.float32), size, interpolation)
    part = image[top:bottom, left:right]
    resized = Image.fromarray(part[..., 0] if channels == 1 else part).resize((size, size), PIL[interpolation])
    difference = np.abs(view - np.asarray(resized, float).reshape(size, size, channels))
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_crop_starts_no_threads():
    assert subprocess.check_output([sys.executable, "-c", COUNT_THREADS], text=True, timeout=100) == "0\n"
