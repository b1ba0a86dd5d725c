import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines import View, ViewRecipe, evaluation_view
from tests.pipelines.photometric.cases import LAB_MEAN, LAB_STD
from tests.pipelines.test_dali import make, neutral

S = 16


def render(image, space, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), evaluate=False):
    """Pixels [S, S, 3] of the first view of an image in a colour space."""
    recipe = ViewRecipe((View(S),), mean=mean, std=std, color_space=space)
    recipe = evaluation_view(recipe, S) if evaluate else recipe
    return make(recipe, [image], neutral([image]))[0][0]


def lab(rgb):
    """CIE Lab in fp64 from the definitions: sRGB, D65, the piecewise cube root."""
    v = rgb.astype(np.float64) / 255
    linear = np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    xyz = (
        linear
        @ np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]).T
    )
    t = xyz / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.moveaxis(np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def noise():
    """Random colours, then every grey."""
    image = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)
    greys = np.repeat(np.arange(256, dtype=np.uint8).reshape(S, S, 1), 3, -1)
    dark = image // 16  # where the cube root is a straight line
    return [image, greys, dark]


@pytest.mark.parametrize("evaluate", [False, True])
def test_lab_is_its_definition(evaluate):
    for image in noise():
        np.testing.assert_allclose(render(image, "lab", evaluate=evaluate), lab(image), atol=2e-3)


@pytest.mark.parametrize(
    ("rgb", "expected"),  # published values, D65 and 2 degrees
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((128, 128, 128), (53.59, 0, 0)),
    ],
)
def test_lab_of_pure_colours(rgb, expected):
    image = np.full((S, S, 3), rgb, np.uint8)
    np.testing.assert_allclose(render(image, "lab")[3, 5], expected, atol=0.02)


def test_lab_is_normalised_in_its_own_units():
    image = noise()[0]
    view = render(image, "lab", LAB_MEAN, LAB_STD)
    np.testing.assert_allclose(view, (lab(image) - LAB_MEAN) / LAB_STD, atol=1e-4)
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), -1).reshape(-1, 3)
    normalised = (lab(corners) - LAB_MEAN) / LAB_STD
    np.testing.assert_allclose([normalised.min(0), normalised.max(0)], [[-1] * 3, [1] * 3], atol=1e-3)


def test_ycbcr_is_pils():
    for image in noise():
        expected = np.asarray(Image.fromarray(image).convert("YCbCr"), float)
        view = render(image, "ycbcr", std=(1 / 255,) * 3)
        assert np.abs(view - expected).max() <= 1
        assert np.abs(view - expected).mean() < 0.05
        half = render(image, "ycbcr", mean=(0.5,) * 3, std=(0.25,) * 3, evaluate=True)
        np.testing.assert_allclose(half, (view / 255 - 0.5) / 0.25, atol=1e-4)
