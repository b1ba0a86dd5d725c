"""Colour modes, depths, suffixes and orientations that the loader reads as PIL does."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fasttrain.pipelines import FolderSource, View, ViewRecipe, evaluation_view

from .loading import RAW
from .sources.shard_files import picture


@pytest.mark.parametrize("channels", [1, 3])
def test_unusual_files_are_read_as_pil_reads_them(open_loader, tmp_path, channels):
    exif = Image.Exif()
    exif[0x112] = 6
    picture(0).save(tmp_path / "0.jpg", "PNG")  # a lying suffix
    picture(1).convert("L").save(tmp_path / "1.jpg")
    picture(2).convert("CMYK").save(tmp_path / "2.jpg")
    picture(3).convert("RGBA").save(tmp_path / "3.png")
    picture(4).convert("P").save(tmp_path / "4.png")
    picture(5).save(tmp_path / "5.bmp")
    picture(6).save(tmp_path / "6.webp")
    picture(7).save(tmp_path / "7.tif")
    picture(8).save(tmp_path / "8.jpg", exif=exif)
    picture(9).save(tmp_path / "9.png", exif=exif)
    recipe = ViewRecipe((View(16),), channels, (0.0,) * channels, (1.0,) * channels)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(recipe, 20), 10, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = Image.open(loader.source.describe(k)).convert("L" if channels == 1 else "RGB")
        if k > 7:
            theirs = theirs.transpose(Image.Transpose.ROTATE_270)
        left, top = (theirs.width - 20) // 2, (theirs.height - 20) // 2
        expected = np.array(theirs.crop((left, top, left + 20, top + 20)), float).reshape(20, 20, -1)
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).mean() < 1


def test_sixteen_bit_png(open_loader, tmp_path):
    wide = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(wide).save(tmp_path / "wide.png")
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 1)
    view = next(loader.epoch(0)).views[0][0, 0] * 255
    for channel in view:
        np.testing.assert_allclose(channel.numpy(), wide / 257, atol=1)


def central(image, side=20):
    """The central square of a PIL image, as pixels."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)), float).reshape(side, side, -1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ],
)
def test_files_are_turned_as_pil_turns_them(open_loader, tmp_path, kind, options):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        picture(orientation).save(tmp_path / f"{orientation}.{kind}", kind, exif=exif, **options)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 8, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = ImageOps.exif_transpose(Image.open(loader.source.describe(k)))
        assert (theirs.width > theirs.height) == (k < 4)
        assert np.abs(view.permute(1, 2, 0).numpy() - central(theirs)).mean() < 1


def png_of_16_bits(pixels):
    """PNG of uint16 [H, W, C], which PIL reads but does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_deep_and_transparent_files_are_read_as_pil_reads_them(open_loader, tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 24, 4), dtype=np.uint16)
    deep = np.array(Image.fromarray((deep >> 8).astype(np.uint8))).astype(np.uint16) * 257
    for channels in (1, 2, 3, 4):
        (tmp_path / f"{channels}.png").write_bytes(png_of_16_bits(deep[..., 4 - channels :]))
    picture(4).convert("LA").save(tmp_path / "5.png")
    picture(5).quantize(32).save(tmp_path / "6.png", transparency=3)
    picture(6).convert("1").save(tmp_path / "7.png")
    picture(7).convert("CMYK").save(tmp_path / "8.tif")
    picture(8).convert("RGBA").save(tmp_path / "9.webp", lossless=True, exact=True)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 9, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = Image.open(loader.source.describe(k))
        expected = central(theirs) / 257 if theirs.mode == "I;16" else central(theirs.convert("RGB"))
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).mean() < 1, loader.source.describe(k)
