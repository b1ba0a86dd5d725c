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
    for rows in cpu.pieces(draws, pixels.shape[1]):
        result = np.empty(pixels[rows].shape, np.float32)
        cpu.finish(pixels[rows], draws.of(rows), look, result, scratch)
        out[rows] = result
    return torch.from_numpy(out)


def apart(pixels, draws, look):
    return (by_cpu(pixels, draws, look) - reference.finish(torch.from_numpy(pixels), draws, look)).abs()


@pytest.mark.parametrize("size", [1, 3, 17, 32, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_everything_is_the_definition(size, channels):
    found = apart(cases.pixels(9, size, channels), cases.draws(9, channels), cases.look(channels=channels))
    assert found.mean() < 0.4  # of 255: weights are 256ths, and columns are rounded before rows
    assert found.max() < 4


@pytest.mark.parametrize("space", ["rgb", "lab", "ycbcr"])
def test_without_blur_a_level_in_a_thousand_differs(space):
    found = apart(cases.pixels(6, 32), cases.draws(6, blurred=False), cases.look(space))
    assert (found > 2e-3).double().mean() < 1e-3


def test_untouched_pixels_are_exact():
    pixels, draws = cases.pixels(3, 40), cases.draws(3, colored=False, blurred=False)
    assert apart(pixels, draws, cases.look()).max() < 1e-4


@given(sigma=st.floats(0.05, 30))
def test_weights_are_a_gaussian_in_256ths(sigma):
    reach = int(radius(np.float32(sigma)))
    ours = cpu.weights(np.array([sigma], np.float32), reach)[0].astype(int)
    exact = 256 * reference.weights(sigma, reach).numpy()[reach:]
    assert ours[0] + 2 * ours[1:].sum() == 256
    assert ours.min() >= 0
    assert np.abs(ours - exact).max() < 1.01


def test_a_white_picture_stays_white():
    """The sums of the blur are then the largest there are."""
    draws = cases.draws(64, colored=False)
    white = np.full((64, 16, 16, 3), 255, np.uint8)
    found = by_cpu(white, draws, cases.look())
    assert torch.equal(
        found, torch.where(torch.from_numpy(draws.solarize), 0.0, 255.0)[:, None, None, None] + 0 * found
    )


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_images_beside_it_do_not_matter(data):
    count, size = data.draw(st.integers(2, 90)), data.draw(st.sampled_from([8, 33]))
    pixels, draws = cases.pixels(count, size), cases.draws(count)
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count)))
    whole = by_cpu(pixels, draws, cases.look())
    assert torch.equal(by_cpu(pixels[rows], draws.of(rows), cases.look()), whole[rows])


def test_pieces_hold_every_image_once_and_are_alike():
    draws = cases.draws(500)
    found = list(cpu.pieces(draws, 32))
    assert sorted(np.concatenate(found)) == list(range(500))
    assert max(map(len, found)) <= 160_000 // 32**2
    for rows in found:
        part = draws.of(rows)
        assert len({*radius(part.sigma)}) == len({*part.flip}) == len({*part.solarize}) == 1
