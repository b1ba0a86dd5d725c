import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.pipelines.crops import crop
from tests.pipelines.test_graph import pictures

PIL = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("box", "size"), [((3, 7, 60, 45), 96), ((0, 0, 64, 64), 20), ((10, 4, 11, 9), 64)])
def test_is_pils(interpolation, channels, box, size):
    image = pictures(1, 64, channels)[0]
    top, left, bottom, right = box
    ours = crop(torch.from_numpy(image), np.array([top, left], np.float32), np.array([bottom, right], np.float32), size,
                interpolation)  # fmt: skip
    part = Image.fromarray(
        image[top:bottom, left:right].squeeze(-1) if channels == 1 else image[top:bottom, left:right]
    )
    theirs = np.asarray(part.resize((size, size), PIL[interpolation]), float).reshape(size, size, channels)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.1
