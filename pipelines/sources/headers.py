"""Size and completeness of an image file, from its bytes and without decoding it.

The crop needs the size of the image before it is decoded. Files that are truncated or would fill the memory are
rejected here by name, not by the decoder in the middle of a batch. The content decides, not the file's suffix.

DALI 2.4 decodes CMYK (with Adobe's inverted values too), palettes, grey, alpha (which it drops), and 1 and 8 bits as
PIL does. It turns JPEG, PNG, WebP and TIFF by their EXIF orientation. The tests check all of this. DALI does not decode
one kind of WebP, see ``decodable``. ``decode.py`` decodes 16 bits, floats and other numbers of channels.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from functools import cache

_ORIENTATION = 0x112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_WEBP_ALPHA, _WEBP_ANIMATION = 0x10, 0x02  # flags of an extended WebP file
_PNM = re.compile(rb"P([56]) (\d{1,9}) (\d{1,9}) 255\n")  # arrays in a mixture with files, and nobody else's
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers of a frame header (SOF0 to SOF15)
# As RGB, this is 300 MB for one image. Photographs of 100 megapixels just pass. PIL warns above 89 million.
MOST_PIXELS = 100_000_000
# A loader decodes one larger image at a time, and reduces it before it comes into a batch. A batch has all images in
# memory: 64 images of 100 megapixels would take 19 GB.
LARGE_PIXELS = 32_000_000
_REDUCED_PIXELS = LARGE_PIXELS // 2


class BadImageError(ValueError):
    """The bytes are not a complete image. The message is the reason."""


def image_size(data: bytes) -> tuple[int, int]:
    """Return height and width in pixels of the decoded image, with its EXIF orientation applied.

    Raises BadImageError if the content is empty, truncated or not an image.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        if data[:2] == b"\xff\xd8":
            height, width = _jpeg_size(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            height, width = _png_size(data)
        elif match := _PNM.match(data):
            height, width = _pnm_size(data, match)
        else:
            height, width = _pil_size(data)
    except (struct.error, IndexError):
        raise BadImageError("truncated: it ends inside its header") from None
    if height < 1 or width < 1:
        raise BadImageError(f"its header says {width} x {height} pixels")
    if height * width > MOST_PIXELS:
        raise too_large(width, height)
    return height, width


def reduction(height: int, width: int) -> tuple[int, int]:
    """Return the whole factors by which an image's sides are reduced: 1 up to ``LARGE_PIXELS`` pixels.

    A crop of 5 % of the smallest reduced image has 0.4 megapixels, which is more than any view has.
    """
    if height * width <= LARGE_PIXELS:
        return 1, 1
    factor = math.ceil(math.sqrt(height * width / _REDUCED_PIXELS))
    return min(factor, height), min(factor, width)


def is_large(data: bytes) -> bool:
    """Return whether an image file has more than ``LARGE_PIXELS`` pixels, as far as its header shows."""
    try:
        height, width = image_size(data)
    except BadImageError:
        return False
    return height * width > LARGE_PIXELS


def too_large(width: int, height: int) -> BadImageError:
    """Return the error for an image of more than ``MOST_PIXELS`` pixels."""
    return BadImageError(f"its {width} x {height} pixels are more than the {MOST_PIXELS:,} allowed; scale it down")


def decodable(data: bytes) -> bytes:
    """Return the image in a form that DALI decodes: the same bytes, except for one kind of WebP.

    nvimgcodec 0.9 rejects a lossless WebP file without alpha in the extended format, which metadata needs. This
    function converts it to uncompressed PNM and turns it by its orientation. Raises BadImageError if it is corrupt.
    """
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or data[20] & (_WEBP_ALPHA | _WEBP_ANIMATION):
        return data
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == b"VP8L":
            return _as_pnm(data)
        at += 8 + -(-int(struct.unpack_from("<I", data, at + 4)[0]) // 2) * 2
    return data


def _as_pnm(data: bytes) -> bytes:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise BadImageError(f"unreadable: {error}") from None
    return b"P6 %d %d 255\n" % upright.size + upright.tobytes()


def _jpeg_size(data: bytes) -> tuple[int, int]:
    size, sideways = None, False
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            sideways = _exif_orientation(data[start + 6 : end]) in _SIDEWAYS
        elif marker in _FRAMES:
            size = struct.unpack_from(">HH", data, start + 1)
        elif marker == 0xDA:
            # A thumbnail has its own end marker before the scan, and a camera may write a trailer after the image. So
            # the end marker is looked for after the scan's start, and need not be the last two bytes.
            if size is None:
                raise BadImageError("a JPEG without a frame header")
            if data.rfind(b"\xff\xd9", start) < 0:
                raise BadImageError("truncated: a JPEG without its end marker")
            return (size[1], size[0]) if sideways else (size[0], size[1])
    raise BadImageError("truncated: a JPEG without image data")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, and start and end of the payload, of each header segment up to the start of the first scan."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise BadImageError("a JPEG with a broken header")
        marker = data[at + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill byte, or a marker without payload
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int(struct.unpack_from(">H", data, at + 2)[0])
        yield marker, at + 4, end
        at = end


def _png_size(data: bytes) -> tuple[int, int]:
    # PIL takes 9 us instead of 0.6, and rejects files with long texts. So only an orientation needs PIL.
    width, height = struct.unpack_from(">II", data, 16)
    if data.rfind(b"IEND") < 0:
        raise BadImageError("truncated: a PNG without its end chunk")
    return _pil_size(data) if b"eXIf" in data else (height, width)


def _pnm_size(data: bytes, header: re.Match[bytes]) -> tuple[int, int]:
    width, height = int(header[2]), int(header[3])
    if len(data) < header.end() + width * height * (3 if header[1] == b"6" else 1):
        raise BadImageError("truncated: a PNM without all of its pixels")
    return height, width


def _exif_orientation(block: bytes) -> int:
    """Return the orientation, 1 to 8, of a TIFF-formatted EXIF block. It is 1, upright, if the block has none."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        at = int(struct.unpack_from(order + "I", block, 4)[0])
        for entry in range(struct.unpack_from(order + "H", block, at)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        return 1  # the picture is usable although its EXIF block is corrupt
    return 1


@cache
def _hide_pil_warnings() -> None:
    """Hide PIL's warning from 89 million pixels on. The limit here is checked."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _pil_size(data: bytes) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    _hide_pil_warnings()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in ("PNG", "BMP", "WEBP", "TIFF"):
                raise BadImageError(f"a {image.format} image; use JPEG, PNG, BMP, WebP or TIFF")
            width, height = image.size
            # A PNG without EXIF would be decoded as a whole by getexif().
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            tags = getattr(image, "tag_v2", None)
            if tags is not None:  # newer versions of PIL have turned a TIFF's size already, older ones have not
                width, height = int(tags[256]), int(tags[257])
            return (width, height) if exif.get(_ORIENTATION) in _SIDEWAYS else (height, width)
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Image.DecompressionBombError:  # PIL stops at 179 million pixels, before it reports the size
        raise BadImageError(f"it has more than the {MOST_PIXELS:,} pixels allowed; scale it down") from None
    except (OSError, SyntaxError) as error:
        raise BadImageError(f"unreadable: {error}") from None
