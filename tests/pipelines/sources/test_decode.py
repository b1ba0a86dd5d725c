"""Files and arrays that DALI would reduce to 8 bits, compared with the values that were written."""

import io
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from fasttrain.pipelines.sources import headers
from fasttrain.pipelines.sources.decode import Raster, as_raster, decode, is_plain, reduced, to_pixels
from fasttrain.pipelines.sources.headers import BadImageError
from tests.pipelines.test_loader_of_unusual_files import png_of_16_bits

from .shard_files import encode, picture

VALUES = np.random.default_rng(0).integers(0, 4096, (20, 24, 16)).astype(np.uint16)


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "i8"])
def test_large_rasters_are_reduced_to_means_of_blocks(monkeypatch, dtype):
    monkeypatch.setattr(headers, "LARGE_PIXELS", 479)  # of 20 x 24
    monkeypatch.setattr(headers, "_REDUCED_PIXELS", 60)  # by 3
    values = VALUES[..., :3].astype(dtype)
    blocks = values[:18].reshape(6, 3, 8, 3, 3).mean((1, 3), np.float64)
    made = reduced(Raster(values, alpha=True))
    assert made.values.dtype == values.dtype
    assert made.alpha
    np.testing.assert_allclose(made.values, blocks if dtype == "f4" else np.rint(blocks), rtol=1e-6)
    assert reduced(made) is made


BANDS = [(dtype, count) for dtype in ("i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8") for count in (1, 2, 4, 13)]


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize(("dtype", "count"), [("u1", 2), ("u1", 4), ("u1", 13), *BANDS])
def test_tiff_keeps_every_value(dtype, count, compression):
    values = (VALUES[..., :count] % 100).astype(dtype)
    layout = {"planarconfig": "contig"} if count > 1 else {}
    data = tiff(values if count > 1 else values[..., 0], compression=compression, **layout)
    raster = decode(data)
    assert not is_plain(data)
    assert (raster.values.tolist(), raster.channels) == (values.tolist(), count)


DEEP = VALUES[..., :3]
FLOATS = VALUES[..., :13] / np.float32(7)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(np.moveaxis(FLOATS, -1, 0), planarconfig="separate"), FLOATS),
        (tiff(FLOATS, planarconfig="contig", bigtiff=True), FLOATS),
        (tiff(VALUES[..., 0], byteorder=">"), VALUES[..., :1]),
        (tiff(VALUES[..., 0], byteorder=">", bigtiff=True), VALUES[..., :1]),
        (tiff(DEEP, photometric="rgb"), DEEP),
        (tiff(DEEP[..., 0], extratags=[(274, "H", 1, 6, True)]), np.rot90(DEEP[..., :1], -1)),
        (tiff(DEEP, photometric="rgb", extratags=[(274, "H", 1, 6, True)]), np.rot90(DEEP, -1)),
        (png_of_16_bits(DEEP), DEEP),
        (png_of_16_bits(VALUES[..., :1]), VALUES[..., :1]),
        (npy(FLOATS), FLOATS),
        (npy(np.moveaxis(FLOATS, -1, 0)), FLOATS),  # [C, H, W]: only the first axis can be channels
        (npy(VALUES[..., 0]), VALUES[..., :1]),
        (encode(picture(0), "PNG"), np.asarray(picture(0))),
    ],
)
def test_decode_returns_what_was_written(data, expected):
    assert decode(data).values.tolist() == expected.tolist()


@pytest.mark.parametrize("deep", [False, True])
def test_lab_tiff_becomes_rgb(deep):
    colors = np.kron(np.random.default_rng(0).integers(60, 200, (4, 5, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.applyTransform(Image.fromarray(colors), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    data = encode(lab, "TIFF")
    if deep:
        values = np.asarray(lab).astype(np.int32) - (0, 128, 128)
        data = tiff((values * (257, 256, 256) & 0xFFFF).astype(np.uint16), photometric="cielab")
    difference = np.abs(decode(data).values.astype(int) - colors)
    assert difference.mean() < 1.5


@pytest.mark.parametrize(
    ("values", "pixel_range", "levels"),
    [
        (np.arange(4096, dtype=np.uint16), (0, 4095), 256),  # 12 bits of 16: 17 levels before
        (np.linspace(0, 255, 999, dtype=np.float32), (0, 255), 256),  # 2 levels before
        (np.linspace(-1, 1, 999), (-1, 1), 256),
        (np.linspace(2**30, 2**30 + 500, 999).astype(np.int32), (2**30, 2**30 + 500), 256),
        (np.array([np.nan, -np.inf, -5, 0, 1, 7, np.inf]), (0, 1), 2),
        (np.array([False, True]), None, 2),
    ],
)
def test_range_maps_values_to_every_level(values, pixel_range, levels):
    pixels = to_pixels(Raster(values.reshape(1, -1, 1)), 1, pixel_range).ravel()
    assert (pixels.min(), pixels.max(), len(np.unique(pixels))) == (0, 255, levels)
    finite = np.isfinite(values)
    assert (np.diff(pixels[finite].astype(int)) >= 0).all()


def test_each_channel_may_have_its_own_range():
    values = np.array([[[0, 0], [10, 1000]]], np.uint16)
    assert to_pixels(Raster(values), 2, (0, 10, 0, 1000)).tolist() == [[[0, 0], [255, 255]]]


@pytest.mark.parametrize(
    ("raster", "channels", "reason"),
    [
        (Raster(VALUES), 3, "16 channels"),
        (Raster(VALUES[..., :3]), 3, "--pixel_range"),
        (Raster(VALUES[..., :2].astype(np.uint8)), 1, "2 channels"),
    ],
)
def test_raster_that_does_not_fit_is_named(raster, channels, reason):
    with pytest.raises(BadImageError, match=reason):
        to_pixels(raster, channels, None)


def test_alpha_is_kept_only_for_its_number_of_channels():
    rgba = np.dstack([picture(0), np.full((20, 24), 7, np.uint8)])
    raster = decode(encode(Image.fromarray(rgba), "PNG"))
    assert raster.channels == 3
    assert to_pixels(raster, 4, None).tolist() == rgba.tolist()
    assert to_pixels(raster, 3, None).tolist() == rgba[..., :3].tolist()


@pytest.mark.parametrize(
    ("data", "missing", "reason"),
    [
        (tiff(VALUES, planarconfig="contig"), "tifffile", r"fasttrain\[tiff\]"),
        (tiff(VALUES, planarconfig="contig")[:-9000], None, "truncated"),
        (npy(VALUES)[:-9], None, "unreadable"),
        (npy(np.array([None])), None, "unreadable"),
        (png_of_16_bits(DEEP)[:60] + b"IEND", None, "corrupt|truncated"),
    ],
)
def test_unreadable_file_is_a_bad_image(monkeypatch, data, missing, reason):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadImageError, match=reason):
        decode(data)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5), (20, 20, 17), (0, 4, 3)])
def test_array_of_another_shape_is_a_bad_image(shape):
    with pytest.raises(BadImageError, match="channels"):
        as_raster(np.zeros(shape))


def test_cmyk_tiff_is_decoded_on_the_host():
    """DALI printed an error of its decoder for every image, and read it with another one."""
    picture_in_cmyk = picture(0).convert("CMYK")
    data = encode(picture_in_cmyk, "TIFF")
    assert not is_plain(data)
    assert decode(data).values.tolist() == np.asarray(picture_in_cmyk.convert("RGB")).tolist()


def test_range_beyond_fp32_is_mapped():
    values = np.array([[[0.0], [5e307], [1e308]]])
    assert to_pixels(Raster(values), 1, (0.0, 1e308)).ravel().tolist() == [0, 128, 255]
    assert to_pixels(Raster(np.uint16([[[7]]])), 1, (0.0, 1e308)).ravel().tolist() == [0]
