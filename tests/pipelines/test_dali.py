"""The DALI graph and the assembly of views, compared with torchvision, PIL and the photometric reference."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from fasttrain.pipelines import DataError, View, ViewRecipe, dali, draw_parameters
from fasttrain.pipelines.assemble import make_views
from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.draws import Look, draws

from .rendering import EVERYTHING, S, make, neutral, pictures, raw, render, run_graph

COLOURS = {"jitter": (0.4, 0.4, 0.2, 0.1), "grey": 0.2, "blur": 0.5}


def drawn(recipe, count, size=64, seed=0):
    return draw_parameters(recipe, seed, 0, np.arange(count), np.full(count, size), np.full(count, size))


def chw(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def hwc(tensor):
    return tensor.permute(1, 2, 0).numpy().astype(float)


def assert_close(views, expected, mean):
    """Check the mean absolute difference in units of 1/255."""
    assert views.shape == expected.shape
    assert np.abs(views - expected).mean() <= mean


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [16, 48, 80])
def test_crop_and_resize_equal_torchvision(interpolation, size):
    images = pictures(size=64)
    views = render(images, View(size, flip=0), interpolation, start=[5, 9], end=[47, 51])
    mode = InterpolationMode.BICUBIC if interpolation == "cubic" else InterpolationMode.BILINEAR
    for image, view in zip(images, views, strict=True):
        assert_close(view, hwc(tv.resized_crop(chw(image), 5, 9, 42, 42, [size, size], mode, antialias=True)), mean=2)
    black = np.full((64, 64, 3), 255, np.uint8)
    black[5:15, 9:30] = 0
    # No pixel outside of a crop has influence.
    assert render([black], View(size, flip=0), interpolation, start=[5, 9], end=[15, 30]).max() == 0


def test_shrunk_noise_is_antialiased():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    smooth = hwc(tv.resize(chw(noise), [16, 16], InterpolationMode.BICUBIC, antialias=True))
    assert_close(render([noise], View(16))[0], smooth, mean=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_equal_the_photometric_reference(channels):
    """Colours, blur, solarisation and flip of plain views: every parameter reaches its place."""
    images = pictures(12, channels=channels)
    view = dataclasses.replace(EVERYTHING, rotate=0, scale=(1, 1), ratio=(1, 1))
    recipe = ViewRecipe((view, dataclasses.replace(view, local=True)), channels, (0.4,) * channels, (0.2,) * channels)
    parameters = drawn(recipe, 12, S)
    views = make(recipe, images, parameters)
    for number, made in enumerate(views):
        steps = draws(view, channels, parameters, number)
        expected = reference.finish(torch.from_numpy(np.stack(images)), steps, Look.of(recipe)).numpy()
        difference = np.abs(made - expected) * 255 * 0.2  # in levels
        assert difference.max() <= 4
        assert difference.mean() <= 0.5
    assert_close(render(images), np.stack(images).astype(float), mean=0.1)


def test_colours_and_blur_inside_the_graph_equal_those_outside():
    """With RandAugment they are DALI's operators. Without drawn operations, the view is the same."""
    view = View(S, flip=0, **COLOURS)
    images, parameters = pictures(12), drawn(raw(view), 12, S, seed=3)
    parameters = dataclasses.replace(neutral(images), color=parameters.color, sigma=parameters.sigma)
    outside, inside = (
        make(raw(dataclasses.replace(view, rand_augment=operations)), images, parameters)[0] for operations in (0, 1)
    )
    assert np.abs(outside - inside).mean() < 0.6
    assert np.abs(outside - inside).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_equals_pil_with_black_corners(channels):
    images = pictures(channels=channels)
    for image, view in zip(images, render(images, angle=30), strict=True):
        turned = Image.fromarray(image.squeeze()).rotate(30, Image.Resampling.BILINEAR)
        assert_close(view, np.asarray(turned, float).reshape(view.shape), mean=2)
        assert (view[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_error_in_a_thread_is_raised():
    images, recipe = pictures(2, 64), ViewRecipe((View(80, **COLOURS),))
    parameters = drawn(recipe, 2)
    empty, outputs = dataclasses.replace(parameters, end=parameters.start), run_graph(recipe, images, parameters)
    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match="size"):
        make_views(recipe, outputs, empty, device="cpu", pool=pool, parts=2)


def test_graph_has_only_the_operators_of_its_views():
    operators = {"Rotate", "ColorTwist", "BrightnessContrast", "GaussianBlur", "Resize", "Split", "Merge"}

    def used(view, channels=3):
        text = dali.build(raw(view, channels=channels), 1, lambda: dali.Feed(), encoded=False).serialize()
        return {name for name in operators if name.encode() in text}

    everything = dataclasses.replace(EVERYTHING, rand_augment=1)
    assert used(dataclasses.replace(EVERYTHING, size=96, rotate=0)) == set()
    assert used(EVERYTHING) == {"Resize", "Rotate"}
    assert used(View(S, rand_augment=1, jitter=(0.4, 0.4, 0, 0))) == {"Resize", "BrightnessContrast", "Split", "Merge"}
    assert used(View(S, rand_augment=1, grey=0.2)) == {"Resize", "ColorTwist", "Split", "Merge"}
    assert used(everything) == operators - {"BrightnessContrast"}
    assert used(everything, channels=1) == operators - {"ColorTwist"}


def test_dali_is_imported_when_needed(monkeypatch):
    code = "import sys, fasttrain.pipelines; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match="DALI is not installed"):
        dali.require_dali()


def test_arguments_are_of_the_views_in_the_graph():
    recipe = ViewRecipe((View(S, blur=0.1), View(96, blur=0.1), View(96, rotate=3)))
    box = ["start", "end"]
    assert dali.arguments(recipe, "cpu") == [(0, name) for name in box] + [(2, name) for name in [*box, "angle"]]
    assert dali.arguments(recipe, "cuda") == [(v, name) for v in (0, 1, 2) for name in [*box, "angle"][: 2 + (v > 1)]]
