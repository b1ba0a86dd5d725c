import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines import View, ViewRecipe, evaluation_view
from tests.pipelines.photometric.cases import LAB_MEAN, LAB_STD
from tests.pipelines.rendering import make, neutral

S = 16


def render(image, space, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), evaluate=False):
    """Pixels [S, S, 3] of the first view of an image in a colour space."""
    recipe = ViewRecipe((View(S),), mean=mean, std=std, color_space=space)
    return make(evaluation_view(recipe, S) if evaluate else recipe, [image], neutral([image]))[0][0]


def lab(rgb):
    """CIE Lab in fp64 from the definitions: sRGB, D65, the piecewise cube root."""
    v = rgb.astype(np.float64) / 255
    linear = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    xyz = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    t = linear @ np.array(xyz).T / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.moveaxis(np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


NOISE = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
GREYS = np.repeat(np.arange(256, dtype=np.uint8).reshape(S, S, 1), 3, -1)
IMAGES = [NOISE, GREYS, NOISE // 16]  # dark colours: there Lab's cube root is a straight line


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("evaluate", [False, True])
def test_lab_equals_its_definition(image, evaluate):
    np.testing.assert_allclose(render(image, "lab", evaluate=evaluate), lab(image), atol=2e-3)


def test_lab_is_normalised_in_its_own_units():
    view = render(NOISE, "lab", LAB_MEAN, LAB_STD)
    np.testing.assert_allclose(view, (lab(NOISE) - LAB_MEAN) / LAB_STD, atol=1e-4)


@pytest.mark.parametrize("image", IMAGES)
def test_ycbcr_equals_pil(image):
    view = render(image, "ycbcr", std=(1 / 255,) * 3)
    difference = np.abs(view - np.asarray(Image.fromarray(image).convert("YCbCr"), float))
    assert difference.max() <= 1
    assert difference.mean() < 0.05
    half = render(image, "ycbcr", mean=(0.5,) * 3, std=(0.25,) * 3, evaluate=True)
    np.testing.assert_allclose(half, (view / 255 - 0.5) / 0.25, atol=1e-4)
