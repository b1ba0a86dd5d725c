"""RandAugment's operations and strengths, compared with timm."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops

from fasttrain.pipelines import View, ViewRecipe, draw_parameters
from fasttrain.pipelines.views.rand_augment import MOST, OPERATIONS
from tests.pipelines.rendering import S, pictures, render

TIMM = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}  # the names that differ
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def number(name):
    return 1 + OPERATIONS.index(name)


def layers(*values):
    """Operation numbers or strengths [MOST] of the first layers."""
    return [*values, *[0] * (MOST - len(values))]


def augmented(images, name, strength=0.0, flip=False):
    view = View(len(images[0]), rand_augment=2)
    return render(images, view, operation=layers(number(name)), strength=layers(strength), flip=flip)


def by_timm(image, name, *arguments):
    """timm's operation on pixels [S, S, C]."""
    fill = (124, 116, 104) if image.shape[-1] == 3 else 117
    operation = timm_ops.NAME_TO_OP[TIMM.get(name, name)]
    result = operation(Image.fromarray(image.squeeze()), *arguments, fillcolor=fill, resample=Image.Resampling.BILINEAR)
    return np.asarray(result, float).reshape(image.shape)


def assert_near(view, expected, largest, mean, fraction=1.0):
    """Check the mean difference, and that a fraction of the values differs by at most ``largest`` levels of 255."""
    difference = np.abs(view - expected)
    assert (difference <= largest).mean() >= fraction
    assert difference.mean() <= mean


def test_operations_are_timms():
    assert [TIMM.get(name, name) for name in OPERATIONS] == timm_ops._RAND_TRANSFORMS


@pytest.mark.parametrize("magnitude", [0.3, 5.0, 10.0])
def test_strengths_follow_timm(magnitude):
    recipe, size = ViewRecipe((View(S, rand_augment=5, rand_augment_magnitude=magnitude),)), np.full(30000, 64)
    p = draw_parameters(recipe, 0, 0, np.arange(30000), size, size)
    operation, strength = p.operation[0], p.strength[0].astype(float)
    assert (strength[operation == 0] == 0).all()
    rng = np.random.default_rng(0)
    levels = np.clip(rng.normal(magnitude, 0.5, 4000), 0, 10)
    for name in OPERATIONS:
        argument = timm_ops.LEVEL_TO_ARG[TIMM.get(name, name)]
        values = strength[operation == number(name)]
        if argument is None:
            assert (values == 0).all()
        else:
            expected = np.array([argument(level, {})[0] for level in levels], float)
            expected = np.abs(expected) * rng.choice([-1, 1], len(expected)) if (values < 0).any() else expected
            assert stats.ks_2samp(values.round(4), expected.round(4)).pvalue > 1e-3, name
            assert (values < 0).any() == (name in MOVES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "strength", "arguments", "largest", "mean"),
    [
        ("Invert", 0, (), 0, 0),
        *(("Posterize", bits, (bits,), 0, 0) for bits in (1, 4)),
        *(("Solarize", threshold, (threshold,), 0, 0) for threshold in (100, 256)),
        *(("SolarizeAdd", sum_, (sum_,), 0, 0) for sum_ in (7, 110)),
        ("AutoContrast", 0, (), 1, 0.01),
        *((name, f, (f,), 1, 0.02) for name in ("Brightness", "Color", "Contrast", "Sharpness") for f in (0.1, 1.9)),
    ],
)
def test_operation_equals_timm(channels, name, strength, arguments, largest, mean):
    images = pictures(channels=channels)
    if name == "AutoContrast":
        images = [image // 3 + 40 for image in images]
        images[0][..., 0] = 77  # a channel of one value
    for image, view in zip(images, augmented(images, name, strength), strict=True):
        assert_near(view, by_timm(image, name, *arguments), largest, mean=mean)


def test_posterize_to_no_bits_is_black():
    """Like older versions of PIL. Today's PIL rejects 0."""
    assert (augmented(pictures(), "Posterize", 0) == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_equalize_equals_timm_for_many_pixels(channels):
    images = pictures(channels=channels, size=224)
    images[0][..., 0] = 77  # a channel of one value
    for image, view in zip(images, augmented(images, "Equalize"), strict=True):
        assert_near(view, by_timm(image, "Equalize"), largest=2, mean=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "strength"),
    [("Rotate", 30), ("Rotate", -11), ("ShearX", 0.3), ("ShearY", -0.213), ("TranslateX", 0.45), ("TranslateY", -0.31)],
)
@pytest.mark.parametrize("flip", [False, True])
def test_movement_equals_timm_after_the_flip(channels, name, strength, flip):
    images = pictures(channels=channels)
    for image, view in zip(images, augmented(images, name, strength, flip), strict=True):
        expected = by_timm(image[:, ::-1] if flip else image, name, strength)
        # PIL drops fractions. At ties along the edge of the gap, fp32 may decide otherwise.
        assert_near(view, expected, largest=2, fraction=0.999, mean=0.7)


def test_operations_follow_each_other():
    images = pictures()
    operation = [[layers(number("Invert"), number("TranslateX")), layers(), layers(number("Solarize"))]]
    strength = [[layers(0, 0.25), layers(), layers(100)]]
    views = render(images, View(S, rand_augment=2), operation=operation, strength=strength)
    assert (views[0] == by_timm((255 - images[0]), "TranslateX", 0.25)).all()
    assert (views[1] == images[1]).all()
    assert (views[2] == by_timm(images[2], "Solarize", 100)).all()
