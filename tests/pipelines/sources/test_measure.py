"""The pixel format that a sample of the images decides."""

import dataclasses
import sys

import numpy as np
import pytest

from fasttrain.pipelines import ArraySource, DataError, FolderSource, Pixels, measured

from .shard_files import write_folder
from .test_decode import npy, tiff

RNG = np.random.default_rng(0)


def deep(channels=1, high=4096):
    return RNG.integers(0, high, (6, 30, 20, channels)).astype(np.uint16)


def test_plain_images_change_nothing(tmp_path):
    pixels = Pixels()
    assert measured(FolderSource(write_folder(tmp_path, 3, "ab")), pixels) == (pixels, [])
    grey = Pixels(1, (0.1307,), (0.3081,))
    digits = ArraySource(deep(high=256).astype(np.uint8))
    assert measured(digits, grey) == (grey, [])
    assert measured(digits, pixels) == (pixels, [])


def test_range_is_measured_without_outliers_and_reported():
    images = deep()
    images[0, 0, 0] = 65535
    pixels, lines = measured(ArraySource(images), Pixels())
    assert pixels.pixel_range == pytest.approx((0, 4095), abs=20)
    assert [pixels.mean, pixels.std] == [pytest.approx((x,) * 3, abs=0.02) for x in (0.5, 1 / 12**0.5)]
    assert "uint16" in lines[0]
    assert measured(ArraySource(images), Pixels()) == (pixels, lines)


def test_channels_of_other_counts_have_their_own_ranges():
    images = deep(13) * np.arange(1, 14, dtype=np.float32)
    pixels, _ = measured(ArraySource(images), Pixels())
    assert (pixels.channels, len(pixels.mean), len(pixels.pixel_range)) == (13, 13, 26)
    assert pixels.pixel_range[1::2] == pytest.approx([4095 * k for k in range(1, 14)], rel=0.01)
    plain, _ = measured(ArraySource(deep(4, 256).astype(np.uint8)), Pixels())
    assert (plain.channels, plain.pixel_range) == (4, None)


def test_stated_fields_stay():
    stated = Pixels(3, pixel_range=(0, 65535))
    pixels, lines = measured(ArraySource(deep()), stated, {"pixel_range"})
    assert (pixels.pixel_range, len(lines)) == ((0, 65535), 2)
    assert pixels.mean == pytest.approx((1 / 32,) * 3, abs=0.01)
    whole = dataclasses.replace(pixels, mean=(0.5,) * 3)
    assert measured(ArraySource(deep()), whole, {"pixel_range", "mean", "std", "channels"}) == (whole, [])


@pytest.mark.parametrize("values", [np.full((2, 4, 4, 1), 7.0), np.zeros((2, 4, 4, 1))])
def test_constant_images_have_a_range(values):
    pixels, _ = measured(ArraySource(values), Pixels())
    assert pixels.pixel_range[0] < pixels.pixel_range[1]


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([np.full((4, 4), np.nan, np.float32)], "no finite value"),
        ([np.ones((4, 4), np.float32), np.full((4, 4), 60_000, np.uint16)], "uint16 and float32 values"),
    ],
)
def test_values_that_no_range_fits_are_an_error(tmp_path, images, problem):
    """Floats from 0 to 1 next to uint16 became black."""
    for number, values in enumerate(images):
        (tmp_path / f"{number}.npy").write_bytes(npy(values))
    with pytest.raises(DataError, match=problem):
        measured(FolderSource(tmp_path), Pixels())


def test_images_of_several_counts_are_an_error(tmp_path):
    for name, channels in (("a", 4), ("b", 13)):
        (tmp_path / f"{name}.npy").write_bytes(npy(deep(channels)[0]))
    with pytest.raises(DataError, match=r"4 in .*a\.npy, 13 in .*b\.npy"):
        measured(FolderSource(tmp_path), Pixels())


def test_fourth_channel_is_not_dropped_silently():
    pixels, lines = measured(ArraySource(deep(4, 256).astype(np.uint8)), Pixels(), {"channels"})
    assert (pixels, len(lines)) == (Pixels(), 1)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(tiff(deep(13)[0], planarconfig="contig"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"a\.tif: .*fasttrain\[tiff\]"):
        measured(FolderSource(tmp_path), Pixels())


def test_stated_channels_that_no_image_has_are_an_error():
    with pytest.raises(DataError, match="13 channels, not 5"):
        measured(ArraySource(deep(13)), Pixels(5, (0.5,) * 5, (0.5,) * 5), {"channels"})


def test_images_that_no_network_of_these_channels_takes_are_refused():
    """An evaluation named every image as bad, a line each."""
    source = ArraySource(np.zeros((3, 4, 4, 3), np.uint8))
    for channels in (1, 3):
        measured(source, Pixels(channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels), ["channels"])
    with pytest.raises(DataError, match="the images have 3 channels, not 13"):
        measured(source, Pixels(channels=13, mean=(0.5,) * 13, std=(0.5,) * 13), ["channels", "mean", "std"])
