"""Random pixels and parameters for comparisons of the photometric implementations."""

import numpy as np
from PIL import Image

from fasttrain.pipelines.photometric.draws import Draws, Look, color_matrix
from fasttrain.pipelines.views.color import normalisation
from fasttrain.pipelines.views.recipe import sides

# CMC's recipe.
LAB_MEAN = (50.0, 6.025, -6.6895)
LAB_STD = (50.0, 92.208, 101.1675)


def look(space="rgb", channels=3):
    """Return a look that leaves values of 0 to 255, or of Lab, unchanged."""
    unit = 1.0 if space == "lab" else 1 / 255
    return Look(space, *normalisation(space, (0.0,) * channels, (unit,) * channels))


def normalised():
    return Look("lab", *normalisation("lab", LAB_MEAN, LAB_STD))


def pixels(count, size, channels=3, seed=0):
    """Return smooth pictures, with noise in every third place."""
    rng = np.random.default_rng(seed)
    height, width = sides(size)
    images = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    for k in range(count):
        if k % 3 and height > 5:
            planes = [Image.fromarray(plane) for plane in images[k, :5, :5].transpose(2, 0, 1)]
            smooth = [np.array(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
            images[k] = np.stack(smooth, -1)
    return images


def draws(count, channels=3, *, colored=True, blurred=True, seed=0):
    """Return random steps. A third of the images is not blurred."""
    rng = np.random.default_rng(seed)
    color = np.stack([*rng.uniform(0.4, 1.6, (3, count)), rng.uniform(-0.2, 0.2, count)], 1).astype(np.float32)
    color[::4, 2] = 0
    matrix, share = color_matrix(color, channels) if colored else (None, None)
    sigma = np.where(rng.random(count) < 2 / 3, rng.uniform(0.1, 2.5, count), 0) * blurred
    hue = color[:, 3] * np.float32(colored and channels == 3)
    solarize, flip = rng.random(count) < 0.4, rng.random(count) < 0.5
    return Draws(hue, matrix, share, sigma.astype(np.float32), solarize, flip)
