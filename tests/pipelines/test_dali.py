import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from fasttrain.pipelines import DataError, Parameters, View, ViewRecipe, dali, draw_parameters
from fasttrain.pipelines.assemble import make_views
from fasttrain.pipelines.views.rand_augment import MOST

S = 48  # pixels of the test images and views
EVERYTHING = View(
    S, rotate=10, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5, solarize=0.2
)  # so that each operator is in the graph; the parameters say which of them acts


def pictures(count=3, size=S, channels=3):
    """Smooth random images, uint8 [size, size, C]: noise would make every interpolation look wrong."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 6, 6, channels), dtype=np.uint8)
    resized = [Image.fromarray(c.squeeze()).resize((size, size), Image.Resampling.BICUBIC) for c in coarse]
    return [np.array(r).reshape(size, size, channels) for r in resized]


def neutral(images, views=1):
    """Parameters that change nothing."""
    count, shape = len(images), (views, len(images))
    ends = np.array([image.shape[:2] for image in images], np.float32)
    return Parameters(
        start=np.zeros((*shape, 2), np.float32),
        end=np.broadcast_to(ends, (views, count, 2)).copy(),
        angle=np.zeros(shape, np.float32),
        flip=np.zeros(shape, bool),
        color=np.broadcast_to(np.array([1, 1, 1, 0], np.float32), (*shape, 4)).copy(),
        sigma=np.zeros(shape, np.float32),
        operation=np.zeros((*shape, MOST), np.int32),
        strength=np.zeros((*shape, MOST), np.float32),
        solarize=np.zeros(shape, bool),
    )


def make(recipe, images, parameters):
    """All views of decoded images, [B, size, size, C] each."""
    fed = dali.feed(recipe, images, parameters)
    outputs = dali.build(recipe, len(images), lambda: fed, encoded=False, prefetch=1).run()
    return [view.numpy() for group in make_views(recipe, outputs, parameters, device="cpu") for view in group]


def render(images, view=EVERYTHING, interpolation="cubic", **changes):
    """Pixels [B, size, size, C] in 0..255 of the first view, with some of the neutral parameters changed."""
    channels = images[0].shape[-1]
    zero, unit = (0.0,) * channels, (1 / 255,) * channels
    recipe = ViewRecipe((view,), channels, zero, unit, interpolation)
    parameters = neutral(images)
    given = {k: np.broadcast_to(np.asarray(v, getattr(parameters, k).dtype), getattr(parameters, k).shape).copy()
             for k, v in changes.items()}  # fmt: skip
    return make(recipe, images, dataclasses.replace(parameters, **given))[0]


def chw(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def hwc(tensor):
    return tensor.permute(1, 2, 0).numpy().astype(float)


def assert_close(ours, theirs, mean):
    """Mean absolute difference in units of 1/255."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() <= mean


def color(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    return [brightness, contrast, saturation, hue]


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [16, 48, 80])
def test_crop_and_resize_are_torchvisions(interpolation, size):
    images = pictures(size=64)
    ours = render(images, View(size, flip=0), interpolation, start=[5, 9], end=[47, 51])
    mode = InterpolationMode.BICUBIC if interpolation == "cubic" else InterpolationMode.BILINEAR
    for image, view in zip(images, ours, strict=True):
        theirs = tv.resized_crop(chw(image), 5, 9, 42, 42, [size, size], mode, antialias=True)
        assert_close(view, hwc(theirs), mean=2)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [16, 48, 80])
def test_nothing_beyond_a_crop_is_in_it(interpolation, size):
    white = np.full((64, 64, 3), 255, np.uint8)
    white[5:15, 9:30] = 0
    view = View(size, flip=0, ratio=(1, 3))
    assert render([white], view, interpolation, start=[5, 9], end=[15, 30]).max() == 0


def test_shrinking_noise_is_antialiased():
    noise = [np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)]
    theirs = tv.resize(chw(noise[0]), [16, 16], InterpolationMode.BICUBIC, antialias=True)
    assert_close(render(noise, View(16))[0], hwc(theirs), mean=2)
    aliased = tv.resize(chw(noise[0]), [16, 16], InterpolationMode.BICUBIC, antialias=False)
    assert np.abs(hwc(theirs) - hwc(aliased)).mean() > 30


def test_neutral_parameters_change_nothing():
    images = pictures()
    assert_close(render(images), np.stack(images).astype(float), mean=0.1)


def test_grey_is_pils():
    images = pictures()
    for image, view in zip(images, render(images, color=color(saturation=0)), strict=True):
        grey = np.asarray(Image.fromarray(image).convert("L"), float)
        assert_close(view, np.repeat(grey[..., None], 3, -1), mean=0.7)


@pytest.mark.parametrize("factor", [0.5, 1.4])
def test_brightness_and_saturation_are_torchvisions(factor):
    images = pictures()
    brighter, richer = render(images, color=color(factor)), render(images, color=color(saturation=factor))
    for k, image in enumerate(images):
        assert_close(brighter[k], hwc(tv.adjust_brightness(chw(image), factor)), mean=0.7)
        assert_close(richer[k], hwc(tv.adjust_saturation(chw(image), factor)), mean=0.7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "operations"), [(S, 0), (80, 0), (S, 1)])
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast_is_torchvisions(channels, size, operations, factor):
    """About the view's mean grey, also in DALI's dali, where the views of RandAugment are coloured."""
    view = View(size, jitter=(0, 0.4, 0, 0), rand_augment=operations)
    images = [image // 2 for image in pictures(channels=channels)]  # dark, so that the mean is far from 128
    ours = render(images, view, color=color(contrast=factor))
    uncolored = np.rint(render(images, view)).astype(np.uint8)
    expected = [hwc(tv.adjust_contrast(chw(image), factor)) for image in uncolored]
    assert_close(ours, np.stack(expected), mean=1.0)


def test_hue_turns_the_colours_round():
    red = [np.full((S, S, 3), (200, 60, 60), np.uint8)]
    third = render(red, color=color(hue=1 / 3))[0, 0, 0]
    assert third.argmax() == 1  # a third of a turn leads from red to green, as in torchvision
    assert np.argmax(hwc(tv.adjust_hue(chw(red[0]), 1 / 3))[0, 0]) == 1
    assert_close(render(red, color=color(hue=1.0))[0], red[0].astype(float), mean=1.5)


def test_blur_is_torchvisions_and_spares_the_others():
    images = pictures()
    ours = render(images, sigma=[[0, 0.7, 2.0]])
    assert_close(ours[0], images[0].astype(float), mean=0.1)
    for k, sigma in ((1, 0.7), (2, 2.0)):
        window = 2 * int(np.ceil(3 * sigma)) + 1
        assert_close(ours[k], hwc(tv.gaussian_blur(chw(images[k]), [window, window], [sigma, sigma])), mean=0.7)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_is_torchvisions_and_spares_the_others(channels):
    images = pictures(channels=channels)
    images[1][0, :3, 0] = (127, 128, 255)
    ours = render(images, solarize=[[False, True, False]])
    assert (ours[0] == images[0]).all()
    assert (ours[1] == hwc(tv.solarize(chw(images[1]), 128))).all()
    assert ours[1, 0, :3, 0].tolist() == [127, 127, 0]


def test_flip_is_left_to_right():
    images = pictures()
    ours = render(images, flip=[[True, False, True]])
    assert (ours == np.stack([images[0][:, ::-1], images[1], images[2][:, ::-1]])).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_is_pils_with_black_corners(channels):
    images = pictures(channels=channels)
    for image, view in zip(images, render(images, angle=30), strict=True):
        turned = Image.fromarray(image.squeeze()).rotate(30, Image.Resampling.BILINEAR)
        assert_close(view, np.asarray(turned, float).reshape(view.shape), mean=2)
        assert (view[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_normalisation_and_several_views():
    images = pictures(channels=1)
    recipe = ViewRecipe((View(S, 2), View(16, local=True)), 1, (0.4,), (0.2,))
    parameters = neutral(images, views=3)
    parameters.flip[1] = True
    first, second, third = make(recipe, images, parameters)
    expected = (np.stack(images) / 255 - 0.4) / 0.2
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_allclose(second, expected[:, :, ::-1], atol=1e-4)
    assert third.shape == (3, 16, 16, 1)


def test_jigsaw_patches_are_where_the_flipped_crop_has_them():
    ramp = np.arange(96, dtype=np.uint8) * 2
    image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((96, 96), np.uint8)], -1)  # red counts columns, green rows
    views = (View(S), View(S, 9, scale=(1.0, 1.0), ratio=(1.0, 1.0), local=True, jigsaw=3))
    recipe = ViewRecipe(views, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    parameters = draw_parameters(recipe, 0, 0, np.arange(4), np.full(4, 96), np.full(4, 96))
    assert len(set(parameters.flip[1])) == 2
    patches = make(recipe, [image] * 4, parameters)[1:]
    for i, patch in enumerate(patches):
        row, column = divmod(i, 3)
        pixels = patch.astype(float)
        for one, flip in zip(pixels, parameters.flip[1], strict=True):
            x = (191 - one[..., 0] if flip else one[..., 0] + 1) / 2  # in the flipped crop, which is the whole image
            y = (one[..., 1] + 1) / 2
            for position, cell in ((x, column), (y, row)):
                assert position.min() >= 32 * cell - 0.6
                assert position.max() <= 32 * (cell + 1) + 0.6
                assert abs(np.ptp(position) - 32 * 64 / 85 * (S - 1) / S) < 1.5


def test_graph_has_no_operator_that_its_views_do_not_use():
    operators = {"Rotate", "ColorTwist", "BrightnessContrast", "GaussianBlur", "Resize"}

    def used(view, channels=3):
        recipe = ViewRecipe((view,), channels, (0.5,) * channels, (0.5,) * channels)
        text = dali.build(recipe, 1, lambda: dali.Feed(), encoded=False).serialize()
        return {name for name in operators if name.encode() in text}

    everything = dataclasses.replace(EVERYTHING, rand_augment=1)
    assert used(dataclasses.replace(EVERYTHING, size=96, rotate=0)) == set()
    assert used(View(S)) == {"Resize"}
    assert used(EVERYTHING) == {"Resize", "Rotate"}
    assert used(View(S, rand_augment=1, jitter=(0.4, 0.4, 0, 0))) == {"Resize", "BrightnessContrast"}
    assert used(View(S, rand_augment=1, grey=0.2)) == {"Resize", "ColorTwist"}
    assert used(everything) == operators - {"BrightnessContrast"}
    assert used(everything, channels=1) == operators - {"ColorTwist"}


def test_arguments_are_those_of_the_views_in_the_graph():
    recipe = ViewRecipe((View(S, blur=0.1), View(96, blur=0.1), View(96, rotate=3)))
    box = ["start", "end"]
    assert dali.arguments(recipe, "cpu") == [(0, name) for name in box] + [(2, name) for name in [*box, "angle"]]
    assert dali.arguments(recipe, "cuda") == [(v, name) for v in (0, 1, 2) for name in [*box, "angle"][: 2 + (v > 1)]]


def test_missing_dali_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"^DALI is not installed; "):
        dali.require_dali()


def test_importing_the_package_leaves_dali_alone():
    code = "import sys, fasttrain.pipelines; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
