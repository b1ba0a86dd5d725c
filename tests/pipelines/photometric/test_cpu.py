import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.pipelines.photometric import cpu, reference
from fasttrain.pipelines.photometric.draws import radius
from tests.pipelines.photometric import cases


def by_cpu(pixels, draws, look):
    out = np.full(pixels.shape, np.nan, np.float32)
    scratch = cpu.Scratch()
    for rows in cpu.pieces(draws, pixels.shape[1:3]):
        result = np.empty(pixels[rows].shape, np.float32)
        cpu.finish(pixels[rows], draws.of(rows), look, result, scratch)
        out[rows] = result
    return torch.from_numpy(out)


def difference(pixels, draws, look):
    return (by_cpu(pixels, draws, look) - reference.finish(torch.from_numpy(pixels), draws, look)).abs()


@pytest.mark.parametrize("size", [1, 3, 17, (32, 20), 96])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_equal_the_reference(size, channels):
    levels = difference(cases.pixels(9, size, channels), cases.draws(9, channels), cases.look(channels=channels))
    assert levels.mean() < 0.4  # of 255: weights are 256ths, and columns are rounded before rows
    assert levels.max() < 6


@pytest.mark.parametrize("space", ["rgb", "lab", "ycbcr"])
def test_views_without_blur_are_nearly_exact(space):
    levels = difference(cases.pixels(6, 32), cases.draws(6, blurred=False), cases.look(space))
    assert (levels > 2e-3).double().mean() < 1e-3
    unchanged = cases.draws(6, colored=False, blurred=False)
    assert space != "rgb" or difference(cases.pixels(6, 32), unchanged, cases.look()).max() < 1e-4


@given(sigma=st.floats(0.05, 30))
def test_weights_are_a_gaussian_in_256ths(sigma):
    reach = int(radius(np.float32(sigma)))
    weights = cpu.weights(np.array([sigma], np.float32), reach)[0].astype(int)
    assert weights[0] + 2 * weights[1:].sum() == 256
    assert weights.min() >= 0
    assert np.abs(weights - 256 * reference.weights(sigma, reach).numpy()[reach:]).max() < 1.01


def test_white_picture_stays_white():
    """The sums of the blur are the largest possible ones."""
    draws = cases.draws(64, colored=False)
    views = by_cpu(np.full((64, 16, 16, 3), 255, np.uint8), draws, cases.look())
    expected = torch.where(torch.from_numpy(draws.solarize), 0.0, 255.0)[:, None, None, None]
    assert torch.equal(views, expected.expand_as(views))


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_view_does_not_depend_on_the_other_images(data):
    count, size = data.draw(st.integers(2, 90)), data.draw(st.sampled_from([8, 33]))
    pixels, draws = cases.pixels(count, size), cases.draws(count)
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count)))
    whole = by_cpu(pixels, draws, cases.look())
    assert torch.equal(by_cpu(pixels[rows], draws.of(rows), cases.look()), whole[rows])
