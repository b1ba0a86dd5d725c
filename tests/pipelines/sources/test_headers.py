import io
import struct
import zlib

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from fasttrain.pipelines.sources.headers import BadImageError, decodable, image_size

from .shard_files import encode, picture

PICTURE = picture(0, (30, 20))

LONG_TEXT = PngImagePlugin.PngInfo()
LONG_TEXT.add_text("text", "x" * 3_000_000, zip=True)  # PIL refuses to read it, DALI skips it


def encoded(kind, orientation=None, image=PICTURE, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x112] = orientation
    return encode(image, kind, exif=exif, **options)


def claiming(kind, width, height):
    """A small file whose header claims ``width`` x ``height`` pixels."""
    data = bytearray(encode(PICTURE, kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        *((encode(PICTURE, kind), (20, 30)) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")),
        (encode(PICTURE, progressive=True), (20, 30)),
        (encode(PICTURE.convert("CMYK")), (20, 30)),
        (encode(PICTURE, comment=b"\xff\xd9 \xff\xc0"), (20, 30)),
        (encode(PICTURE) + b"trailer of a camera" * 9, (20, 30)),
        (encode(PICTURE, "PNG", pnginfo=LONG_TEXT), (20, 30)),
        *((claiming(kind, 10_000, 10_000), (10_000, 10_000)) for kind in ("JPEG", "PNG")),  # the limit
    ],
)
def test_size_of_each_format_is_read(data, size):
    assert image_size(data) == size


@pytest.mark.parametrize("cut", range(4, 26))
def test_size_with_corrupt_exif_block_is_upright(cut):
    exif = Image.Exif()
    exif[0x112] = 6
    block = exif.tobytes()
    assert image_size(encode(PICTURE, exif=block)) == (30, 20)
    assert image_size(encode(PICTURE, exif=block[:cut])) == (20, 30)
    assert image_size(encode(PICTURE, exif=b"Exif\0\0XX" + block[8:])) == (20, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am no picture", "not an image"),
        *((encode(PICTURE, kind)[:cut], None) for kind in ("JPEG", "PNG") for cut in (20, 100, 300, -9)),
        (encode(PICTURE)[:-2], "without its end marker"),
        (encode(PICTURE, comment=b"thumbnail \xff\xd9")[:-2], "without its end marker"),
        (encode(PICTURE, "PNG")[:-12], "without its end chunk"),
        (encode(PICTURE, "GIF"), "GIF"),
        (b"\xff\xd8 no marker follows", "header"),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xd9", "frame header"),
        *((claiming(kind, 0, 20), "0 x 20 pixels") for kind in ("JPEG", "PNG")),
        *((claiming(kind, 20_000, 20_000), "100,000,000") for kind in ("JPEG", "PNG", "BMP")),
        *((claiming(kind, 10_000, 10_001), "100,000,000") for kind in ("JPEG", "PNG")),
    ],
)
def test_size_of_unusable_file_gives_the_reason(data, reason):
    with pytest.raises(BadImageError, match=reason):
        image_size(data)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_lossless_webp_with_metadata_becomes_pnm(orientation):
    data = encoded("WEBP", orientation, lossless=True, icc_profile=b"profile")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    converted = Image.open(io.BytesIO(decodable(data)))
    assert (converted.format, converted.mode) == ("PPM", "RGB")
    assert (converted.height, converted.width) == image_size(data)
    assert converted.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encode(PICTURE, "WEBP", lossless=True),
        encoded("WEBP", 6),
        encoded("WEBP", 6, PICTURE.convert("RGBA").rotate(45), lossless=True, exact=True),
        encoded("JPEG", 6),
        encode(PICTURE, "PNG"),
        b"RIFF....WEBPVP8X" + bytes(14),
    ],
)
def test_file_that_dali_decodes_is_unchanged(data):
    assert decodable(data) is data


def test_corrupt_lossless_webp_with_metadata_is_an_error():
    data = encoded("WEBP", 6, lossless=True)
    with pytest.raises(BadImageError):
        decodable(data[:60] + bytes(len(data) - 60))
