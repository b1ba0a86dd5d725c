import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fasttrain.pipelines.sources.headers import MOST_PIXELS, BadImageError, decodable, image_size

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encode(kind, image=PICTURE, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_size_of_each_format(kind):
    assert image_size(encode(kind)) == (20, 30)


def test_size_of_the_unusual_jpegs():
    assert image_size(encode("JPEG", progressive=True)) == (20, 30)
    assert image_size(encode("JPEG", PICTURE.convert("CMYK"))) == (20, 30)
    assert image_size(encode("JPEG", comment=b"\xff\xd9 \xff\xc0")) == (20, 30)
    assert image_size(encode("JPEG") + b"trailer of a camera" * 9) == (20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_the_size(kind, orientation):
    expected = (30, 20) if orientation > 4 else (20, 30)
    assert image_size(encode(kind, exif=turned(orientation))) == expected


@pytest.mark.parametrize("cut", range(4, 26))
def test_a_broken_exif_block_turns_nothing(cut):
    """What the block says counts only if its entry is whole; the picture can be used either way."""
    block = turned(6).tobytes()
    assert image_size(encode("JPEG", exif=block)) == (30, 20)
    assert image_size(encode("JPEG", exif=block[:cut])) == (20, 30)
    assert image_size(encode("JPEG", exif=b"Exif\0\0XX" + block[8:])) == (20, 30)


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files(kind, fraction):
    data = encode(kind)
    with pytest.raises(BadImageError):
        image_size(data[: int(fraction * len(data))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am no picture", "not an image"),
        (encode("JPEG")[:-2], "truncated: a JPEG without its end marker"),
        (encode("JPEG", comment=b"thumbnail \xff\xd9")[:-2], "truncated: a JPEG without its end marker"),
        (encode("PNG")[:-12], "truncated: a PNG without its end chunk"),
        (encode("GIF"), "a GIF image; use JPEG, PNG, BMP, WebP or TIFF"),
        (b"\xff\xd8 no marker follows", "a JPEG with a broken header"),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xd9", "a JPEG without a frame header"),
        (encode("PNG").replace(b"\x00\x00\x00\x1e", b"\x00\x00\x00\x00", 1), "its header says 0 x 20 pixels"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(BadImageError, match=reason):
        image_size(data)


def bomb(kind, width=20_000, height=20_000):
    """A small file whose header promises many pixels."""
    data = bytearray(encode(kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_bomb_is_refused_by_its_header(kind):
    with pytest.raises(BadImageError, match=r"more than the 100,000,000 (pixels )?allowed; scale it down"):
        image_size(bomb(kind))
    if kind != "BMP":  # PIL refuses it without telling the size
        with pytest.raises(BadImageError, match="its 20000 x 20000 pixels are more than the 100,000,000 allowed"):
            image_size(bomb(kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_limit_itself_passes(kind):
    assert image_size(bomb(kind, 10_000, 10_000)) == (10_000, 10_000)
    assert MOST_PIXELS == 10_000 * 10_000
    with pytest.raises(BadImageError):
        image_size(bomb(kind, 10_000, 10_001))


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_lossless_webp_with_metadata_becomes_pnm(orientation):
    options = {} if orientation is None else {"exif": turned(orientation)}
    data = encode("WEBP", lossless=True, icc_profile=b"profile", **options)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    ours = Image.open(io.BytesIO(decodable(data)))
    assert (ours.format, ours.mode) == ("PPM", "RGB")
    assert (ours.height, ours.width) == image_size(data)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encode("WEBP", lossless=True),
        encode("WEBP", exif=turned(6)),
        encode("WEBP", PICTURE.convert("RGBA").rotate(45), exif=turned(6), lossless=True, exact=True),
        encode("JPEG", exif=turned(6)),
        encode("PNG"),
        b"RIFF....WEBPVP8X" + bytes(14),
    ],
)
def test_what_dali_decodes_stays_as_it_is(data):
    assert decodable(data) is data


def test_corrupt_lossless_webp_with_metadata():
    data = encode("WEBP", lossless=True, exif=turned(6))
    with pytest.raises(BadImageError, match="unreadable"):
        decodable(data[:60] + bytes(len(data) - 60))
