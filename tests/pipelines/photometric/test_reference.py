"""The photometric reference and the CPU pass, compared with torchvision. Tolerances are means in levels of 255."""

import colorsys
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.draws import Draws, color_matrix
from tests.pipelines.photometric import cases
from tests.pipelines.photometric.test_cpu import by_cpu


def by_reference(pixels, draws, look):
    return reference.finish(torch.from_numpy(pixels), draws, look)


def alike(images, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, sigma=0.0, solarize=False, flip=False):
    """Draws that are the same for all images."""
    count, channels = len(images), images.shape[-1]
    color = np.tile(np.array([brightness, contrast, saturation, hue], np.float32), (count, 1))
    changes = [np.full(count, value, np.float32) for value in (hue * (channels == 3), sigma)]
    switches = [np.full(count, value) for value in (solarize, flip)]
    return Draws(changes[0], *color_matrix(color, channels), changes[1], *switches)


def blur(window, sigma):
    return lambda x: tv.gaussian_blur(x, [window] * 2, [sigma] * 2)


OPERATIONS = [
    ({}, lambda x: x, 1e-5),
    ({"saturation": 0}, lambda x: tv.rgb_to_grayscale(x, 3), 0.7),
    ({"solarize": True}, lambda x: tv.solarize(x, 128), 1e-5),
    ({"flip": True}, tv.hflip, 1e-5),
    *(({"brightness": factor}, lambda x, f=factor: tv.adjust_brightness(x, f), 0.7) for factor in (0.6, 1.4)),
    *(({"saturation": factor}, lambda x, f=factor: tv.adjust_saturation(x, f), 0.7) for factor in (0.6, 1.4)),
    *(({"contrast": factor}, lambda x, f=factor: tv.adjust_contrast(x, f), 1.0) for factor in (0.6, 1.4)),
    *(({"hue": hue}, lambda x, h=hue: tv.adjust_hue(x, h), 0.7) for hue in (0.1, -0.1, 0.37, 0.5, -0.5)),
    *(({"sigma": s}, blur(2 * int(np.ceil(3 * s)) + 1, s), 0.8) for s in (0.1, 0.5, 1.0, 1.7, 2.0)),
    # BYOL's and SimCLR's code has a fixed window, a tenth of the view: three sigmas are as good.
    *(({"sigma": s}, blur(23, s), 1.0) for s in (0.5, 2.0)),
]


@pytest.mark.parametrize("finish", [by_reference, by_cpu])
@pytest.mark.parametrize("size", [24, 96, 224])
@pytest.mark.parametrize(("changes", "operation", "mean"), OPERATIONS)
def test_operation_equals_torchvision(finish, size, changes, operation, mean):
    images = cases.pixels(3, size)
    if "contrast" in changes:
        images //= 2  # their mean is far from 128
    draws = alike(images, **changes)
    if not set(changes) - {"solarize", "flip"}:
        draws = dataclasses.replace(draws, matrix=None, mean_share=None)
    expected = operation(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).double()
    views = finish(images, draws, cases.look())
    assert views.shape == expected.shape
    assert (views - expected).abs().mean() < mean


@pytest.mark.parametrize("order", list(itertools.permutations(["brightness", "contrast", "saturation"])))
def test_order_of_jitters_after_hue_does_not_matter(order):
    """torchvision draws it per view. It matters only for clipped values, and no value here leaves 0..255."""
    images = (96 + cases.pixels(3, 48).astype(float) / 4).astype(np.uint8)
    factors = {"hue": 0.1, "brightness": 1.2, "contrast": 0.7, "saturation": 0.8}
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    for name in ("hue", *order):
        expected = getattr(tv, f"adjust_{name}")(expected, factors[name])
    views = by_reference(images, alike(images, **factors), cases.look())
    assert (views - 255 * expected.permute(0, 2, 3, 1)).abs().max() < 1.2  # hue is rounded to 8 bits


@given(pixel=st.tuples(*[st.integers(0, 255)] * 3), hue=st.floats(-0.5, 0.5))
def test_hue_turns_in_hsv(pixel, hue):
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    expected = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v), dtype=torch.float64)
    torch.testing.assert_close(reference.turn(torch.tensor(pixel).double(), hue), expected, atol=1e-9, rtol=0)
