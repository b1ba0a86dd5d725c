import io

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines.headers import BadImageError, image_size

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
