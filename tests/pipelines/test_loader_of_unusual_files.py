"""Colour modes, bit depths, suffixes and orientations, compared with PIL."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fasttrain.pipelines import FolderSource, View, ViewRecipe, evaluation_view
from fasttrain.pipelines.sources import headers

from .loading import COLOR
from .sources.shard_files import picture

SIDE = 20


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def png_of_16_bits(pixels):
    """Return a PNG of uint16 [H, W, C], which PIL reads but does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.fixture
def check(open_loader, tmp_path):
    """Compare the central squares with PIL's. Its conversion of 16 bits would clip at 255, so they are divided."""

    def compare(channels=3):
        recipe = ViewRecipe((View(16),), channels, (0.0,) * channels, (1.0,) * channels, pixel_range=(0, 65535))
        source = FolderSource(tmp_path)
        loader = open_loader(source, evaluation_view(recipe, SIDE), len(source), shuffle=False)
        (batch,) = loader.epoch(0)
        assert loader.bad == {}
        for k, view in enumerate(batch.views[0][0] * 255):
            image = ImageOps.exif_transpose(Image.open(source.describe(k)))
            wide = image.mode == "I;16"
            image = image if wide else image.convert("L" if channels == 1 else "RGB")
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            square = np.array(image.crop((left, top, left + SIDE, top + SIDE)), float).reshape(SIDE, SIDE, -1)
            difference = np.abs(view.permute(1, 2, 0).numpy() - (square / 257 if wide else square))
            assert difference.mean() < 1, source.describe(k)

    return compare


def test_large_images_are_reduced_before_they_are_in_a_batch(open_loader, tmp_path, monkeypatch):
    """Four images of 100 megapixels in a batch took 1.2 GB."""
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    for k in range(3):
        image = picture(k, (49, 41))
        image.save(tmp_path / "large" / f"{k}.png", exif=turned(6))
        image.reduce(2, (0, 0, 48, 40)).save(tmp_path / "small" / f"{k}.png", exif=turned(6))
    monkeypatch.setattr(headers, "LARGE_PIXELS", 20 * 24)
    monkeypatch.setattr(headers, "_REDUCED_PIXELS", 21 * 25)
    large, small = (next(open_loader(FolderSource(tmp_path / name), COLOR, 3).epoch(0)) for name in ("large", "small"))
    assert all(torch.equal(a, b) for a, b in zip(large.views, small.views, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_modes_and_formats_are_read_as_pil_does(check, tmp_path, channels):
    picture(0).save(tmp_path / "wrong.jpg", "PNG")
    for k, suffix in enumerate(("bmp", "webp", "tif")):
        picture(k).save(tmp_path / f"{k}.{suffix}")
    for k, (mode, suffix) in enumerate((("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"))):
        picture(k).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    for suffix in ("jpg", "png"):
        picture(8).save(tmp_path / f"turned.{suffix}", exif=turned(6))
    check(channels)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_orientations_are_applied_as_pil_does(check, tmp_path, kind, options):
    for orientation in range(1, 9):
        picture(orientation).save(tmp_path / f"{orientation}.{kind}", kind, exif=turned(orientation), **options)
    check()


def test_deep_and_transparent_files_are_read_as_pil_does(check, tmp_path):
    deep = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint16) * 257
    for channels in (1, 2, 3, 4):
        (tmp_path / f"{channels}.png").write_bytes(png_of_16_bits(deep[..., 4 - channels :]))
    picture(4).convert("LA").save(tmp_path / "5.png")
    picture(5).quantize(32).save(tmp_path / "6.png", transparency=3)
    picture(6).convert("1").save(tmp_path / "7.png")
    picture(7).convert("CMYK").save(tmp_path / "8.tif")
    picture(8).convert("RGBA").save(tmp_path / "9.webp", lossless=True, exact=True)
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(tmp_path / "wide.png")
    check()
