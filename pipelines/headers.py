"""Size and completeness of an image file, from its bytes and without decoding it.

The crop needs the size of the image before it is decoded, and a file that is cut short is better refused here, by
name, than by the decoder in the middle of a batch. The content decides, not the file's suffix.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers of a frame header (SOF0 to SOF15)


class BadImageError(ValueError):
    """The bytes are no complete image; the message is the reason."""


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels as the decoder will give them, that is with the EXIF orientation applied.

    Raises BadImageError for empty, truncated or foreign content.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        if data[:2] == b"\xff\xd8":
            height, width = _jpeg_size(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            height, width = _png_size(data)
        else:
            height, width = _other_size(data)
    except (struct.error, IndexError):
        raise BadImageError("truncated: it ends inside its header") from None
    if height < 1 or width < 1:
        raise BadImageError(f"its header says {width} x {height} pixels")
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    size, sideways = None, False
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            sideways = _exif_orientation(data[start + 6 : end]) in _SIDEWAYS
        elif marker in _FRAMES:
            size = struct.unpack_from(">HH", data, start + 1)
        elif marker == 0xDA:
            # A thumbnail's end marker lies before the scan and a camera's trailer after the image, hence the bounds.
            if size is None:
                raise BadImageError("a JPEG without a frame header")
            if data.rfind(b"\xff\xd9", start) < 0:
                raise BadImageError("truncated: a JPEG without its end marker")
            return (size[1], size[0]) if sideways else (size[0], size[1])
    raise BadImageError("truncated: a JPEG without image data")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the payload of each header segment, the start of the first scan included."""
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
    width, height = struct.unpack_from(">II", data, 16)
    if data.rfind(b"IEND") < 0:
        raise BadImageError("truncated: a PNG without its end chunk")
    at, sideways = 8, False
    while data[at + 4 : at + 8] not in (b"IDAT", b"IEND"):
        length = int(struct.unpack_from(">I", data, at)[0])
        if data[at + 4 : at + 8] == b"eXIf":
            sideways = _exif_orientation(data[at + 8 : at + 8 + length]) in _SIDEWAYS
        at += 12 + length
    return (width, height) if sideways else (height, width)


def _exif_orientation(block: bytes) -> int:
    """Orientation 1 to 8 from a TIFF-formatted EXIF block; 1, upright, where it says nothing."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        at = int(struct.unpack_from(order + "I", block, 4)[0])
        for entry in range(struct.unpack_from(order + "H", block, at)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, at + 2 + 12 * entry)
            if tag == 0x112:
                return int(value)
    except struct.error:
        return 1  # a broken EXIF block does not make the picture unusable
    return 1


def _other_size(data: bytes) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            # DALI turns WebP by its EXIF orientation and leaves TIFF as it is.
            sideways = image.format != "TIFF" and image.getexif().get(0x112) in _SIDEWAYS
            if image.format not in ("BMP", "WEBP", "TIFF"):
                raise BadImageError(f"a {image.format} image; use JPEG, PNG, BMP, WebP or TIFF")
            return (image.width, image.height) if sideways else (image.height, image.width)
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"unreadable: {error}") from None
