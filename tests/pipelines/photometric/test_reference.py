"""The definition, and the CPU's form of it, against torchvision; figures are mean absolute differences of 255."""

import colorsys
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as tv

from fasttrain.pipelines.photometric import cpu, reference
from fasttrain.pipelines.photometric.draws import Draws, Look, color_matrix
from fasttrain.pipelines.views.color import normalisation
from tests.pipelines.photometric import cases


def by_reference(pixels, draws, look):
    return reference.finish(torch.from_numpy(pixels), draws, look)


def by_cpu(pixels, draws, look):
    out, scratch = np.empty(pixels.shape, np.float32), cpu.Scratch()
    cpu.finish(pixels, draws, look, out, scratch)
    return torch.from_numpy(out)


def of(images, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, **changes):
    """Draws that do the same to all images."""
    color = np.tile(np.array([brightness, contrast, saturation, hue], np.float32), (len(images), 1))
    channels = images.shape[-1]
    matrix, share = color_matrix(color, channels)
    zero, no = np.zeros(len(images), np.float32), np.zeros(len(images), bool)
    hue = color[:, 3] if channels == 3 else zero
    return dataclasses.replace(Draws(hue, matrix, share, zero, no, no), **changes)


@pytest.fixture(params=[by_reference, by_cpu])
def finish(request):
    return lambda images, draws: request.param(images, draws, cases.look(channels=images.shape[-1]))


@pytest.fixture(params=[24, 96, 224])
def images(request):
    """Noise and two smooth pictures."""
    return cases.pixels(3, request.param)


def theirs(images, operation):
    chw = torch.from_numpy(images).permute(0, 3, 1, 2)
    return operation(chw).permute(0, 2, 3, 1).double()


def assert_close(ours, expected, mean):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < mean


def test_grey(finish, images):
    assert_close(finish(images, of(images, saturation=0)), theirs(images, lambda x: tv.rgb_to_grayscale(x, 3)), 0.7)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_blur(finish, images, sigma):
    window = 2 * int(np.ceil(3 * sigma)) + 1
    draws = of(images, sigma=np.full(len(images), sigma, np.float32))
    assert_close(finish(images, draws), theirs(images, lambda x: tv.gaussian_blur(x, [window] * 2, [sigma] * 2)), 0.8)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_blur_does_not_depend_on_how_wide_its_window_is(finish, images, sigma):
    """Three sigmas to either side, against the fixed window of BYOL's and SimCLR's code, a tenth of the view."""
    draws = of(images, sigma=np.full(len(images), sigma, np.float32))
    window = max(23, images.shape[1] // 10 | 1)
    assert_close(finish(images, draws), theirs(images, lambda x: tv.gaussian_blur(x, [window] * 2, [sigma] * 2)), 1.0)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_brightness_and_saturation(finish, images, factor):
    assert_close(finish(images, of(images, factor)), theirs(images, lambda x: tv.adjust_brightness(x, factor)), 0.7)
    ours = finish(images, of(images, saturation=factor))
    assert_close(ours, theirs(images, lambda x: tv.adjust_saturation(x, factor)), 0.7)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast(finish, images, factor):
    dark = images // 2  # so that the mean is far from 128
    assert_close(finish(dark, of(dark, contrast=factor)), theirs(dark, lambda x: tv.adjust_contrast(x, factor)), 1.0)


@pytest.mark.parametrize("order", list(itertools.permutations(["brightness", "contrast", "saturation"])))
def test_the_order_of_jitters_after_hue_matters_where_values_are_cut_off_only(order):
    """torchvision draws it for each view. Nothing here leaves 0..255."""
    images = (96 + cases.pixels(3, 48).astype(float) / 4).astype(np.uint8)
    factors = {"hue": 0.1, "brightness": 1.2, "contrast": 0.7, "saturation": 0.8}
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    for name in ("hue", *order):
        expected = getattr(tv, f"adjust_{name}")(expected, factors[name])
    ours = by_reference(images, of(images, **factors), cases.look())
    assert (ours - 255 * expected.permute(0, 2, 3, 1)).abs().max() < 1.2  # hue has 8 bits again


def test_solarisation_is_exact(finish, images):
    draws = of(images, solarize=np.ones(len(images), bool))
    draws = dataclasses.replace(draws, matrix=None, mean_share=None)
    assert_close(finish(images, draws), theirs(images, lambda x: tv.solarize(x, 128)), 1e-5)


def test_flip_is_exact(finish, images):
    draws = dataclasses.replace(of(images, flip=np.ones(len(images), bool)), matrix=None, mean_share=None)
    assert_close(finish(images, draws), theirs(images, tv.hflip), 1e-5)


def test_neutral_colours_change_nothing(finish, images):
    assert_close(finish(images, of(images)), torch.from_numpy(images).double(), 1e-5)


@pytest.mark.parametrize("hue", [0.1, -0.1, 0.37, 0.5, -0.5])
def test_hue(finish, images, hue):
    assert_close(finish(images, of(images, hue=hue)), theirs(images, lambda x: tv.adjust_hue(x, hue)), 0.7)


@given(pixel=st.tuples(*[st.integers(0, 255)] * 3), hue=st.floats(-0.5, 0.5))
def test_a_turn_of_hue_is_hsv_s(pixel, hue):
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    expected = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v), dtype=torch.float64)
    torch.testing.assert_close(reference.turn(torch.tensor(pixel).double(), hue), expected, atol=1e-9, rtol=0)


def test_views_are_normalised():
    images = cases.pixels(2, 16)
    look = Look("rgb", *normalisation("rgb", (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)))
    expected = (torch.from_numpy(images) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.1])
    for finish in (by_reference, by_cpu):
        torch.testing.assert_close(finish(images, of(images), look).float(), expected, atol=2e-5, rtol=1e-5)
