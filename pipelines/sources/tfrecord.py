"""TFRecord shards of ``tf.train.Example``, read without TensorFlow.

A file is a sequence of records: length (8 bytes, little-endian), masked CRC-32C of these 8 bytes, the data, masked
CRC-32C of the data. The data is a protocol buffer: ``Example{1: Features{1: map<string, Feature>}}``. A Feature is
``{1: BytesList}``, ``{2: FloatList}`` or ``{3: Int64List}``, and a list is ``{1: repeated value}``. The image is under
``image/encoded`` or ``image``, its label under ``image/class/label`` or ``label``. The index skips the images, so it
does not check the checksum of the data.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator

from .scan import LeftOut
from .shards import UNLABELLED, Damaged, ShardFormat, ShardIndex, Window, shard_index

_IMAGE, _LABEL = (b"image/encoded", b"image"), (b"image/class/label", b"label")
_CRC_32C = 0x82F63B78  # Castagnoli's polynomial, reversed
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_LONGEST_NAME, _LONGEST_VARINT = 32, 10  # bytes
_NO_EXAMPLE = "it is not a tf.train.Example"
Span = tuple[int, int]  # start and end in the file


def index(window: Window) -> ShardIndex:
    """Index a TFRecord file. If it is truncated or corrupt, index the complete records."""
    images, damage, left_out = array("q"), [], LeftOut()  # offset, size, label of each image
    try:
        for number, record in enumerate(_records(window)):
            try:
                image, label = _example(window, record)
            except Damaged as error:
                damage.append(f"record {number} is left out: {error}")
                continue
            if image is not None:
                images.extend((image[0], image[1] - image[0], label))
            else:
                left_out.kind("record without an image", f"{os.path.basename(window.path)}: record {number}")
    except Damaged as error:
        damage.append(f"{error}; the {len(images) // 3} image(s) before it are used")
    return shard_index(images, "; ".join(damage), left_out)


def record_name(window: Window, offset: int) -> str:
    """Return, for example, ``record 17`` for the record at ``offset``, counted from 0."""
    number = next((k for k, (start, end) in enumerate(_records(window)) if start <= offset < end), None)
    return "" if number is None else f"record {number}"


TFRECORD = ShardFormat(
    "a tf.train.Example with bytes under image/encoded or image",
    index,
    record_name,
    "image/class/label or label of the records",
)


def _records(window: Window) -> Iterator[Span]:
    """Yield the place of the data of each record. Raise Damaged after the last complete one."""
    at, number = 0, 0
    while at < window.length:
        head = window.read(at, 12)
        if len(head) < 12:
            raise Damaged(f"cut short inside record {number}")
        length, checksum = struct.unpack("<QI", head)
        if masked_crc(head[:8]) != checksum:
            packed = head[:2] == b"\x1f\x8b" and not at
            raise Damaged(
                "packed with gzip; unpack it first"
                if packed
                else f"the length of record {number} has a wrong checksum, so no later record can be read"
            )
        start, at = at + 12, at + 16 + length
        if at > window.length:
            raise Damaged(f"cut short inside record {number}")
        yield start, start + length
        number += 1


def _example(window: Window, record: Span) -> tuple[Span | None, int]:
    """Return the place of a record's image, or None, and its label."""
    image: dict[bytes, Span] = {}
    label: dict[bytes, int] = {}
    for features in _inside(window, record, 1):
        for entry in _inside(window, features, 1):
            name = _key(window, entry)
            if name not in _IMAGE and name not in _LABEL:
                continue
            value = _only(window, entry, 2)
            if name in _IMAGE and value and (values := _only(window, value, 1)) and (first := _only(window, values, 1)):
                image[name] = first
            elif name in _LABEL and value and (values := _only(window, value, 3)):
                label[name] = _first_number(window, values)
    place = next((image[name] for name in _IMAGE if name in image), None)
    return place, next((label[name] for name in _LABEL if name in label), UNLABELLED)


def _key(window: Window, entry: Span) -> bytes:
    """Return the name of a feature, which writers put first. A name longer than those used here is empty."""
    head = window.read(entry[0], min(2 + _LONGEST_NAME, entry[1] - entry[0]))
    if len(head) > 1 and head[0] == (1 << 3 | _BYTES) and head[1] <= _LONGEST_NAME:
        return head[2 : 2 + head[1]]
    key = _only(window, entry, 1)
    return window.read(key[0], key[1] - key[0]) if key and key[1] - key[0] <= _LONGEST_NAME else b""


def _first_number(window: Window, values: Span) -> int:
    """Return the first value of an Int64List. Its values may be packed into one field, or have one field each."""
    for _, wire, start, end in _fields(window, values):
        if wire == _VARINT or (wire == _BYTES and start < end):
            unsigned = _varint(window.read(start, _LONGEST_VARINT), 0)[0] & (2**64 - 1)
            return unsigned - 2**64 if unsigned >= 2**63 else unsigned
    return UNLABELLED


def _only(window: Window, message: Span, number: int) -> Span | None:
    return next(_inside(window, message, number), None)


def _inside(window: Window, message: Span, number: int) -> Iterator[Span]:
    """Return the contents of the fields ``number`` of a message, if they have a length."""
    return ((start, end) for n, wire, start, end in _fields(window, message) if (n, wire) == (number, _BYTES))


def _fields(window: Window, message: Span) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, start and end of each field of a message."""
    at, end = message
    while at < end:
        head = window.read(at, 2 * _LONGEST_VARINT)
        tag, read = _varint(head, 0)
        wire, start = tag & 7, at + read
        if wire == _BYTES:
            length, read = _varint(head, read)
            start = at + read
            at = start + length
        elif wire == _VARINT:
            at += _varint(head, read)[1]
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            at = start + (8 if wire == _EIGHT_BYTES else 4)
        else:
            raise Damaged(_NO_EXAMPLE)
        if at > end:
            raise Damaged(_NO_EXAMPLE)
        yield tag >> 3, wire, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number in groups of seven bits, the lowest first, and its end."""
    if data[at : at + 1] < b"\x80" and at < len(data):
        return data[at], at + 1  # the usual case
    value = 0
    for place, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise Damaged(_NO_EXAMPLE)


def masked_crc(data: bytes) -> int:
    """Return CRC-32C, rotated right by 15 bits, plus a constant. TFRecord masks it to avoid checksums of checksums."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_CRC_32C if byte & 1 else 0)
    return byte


_TABLE = [_remainder(byte) for byte in range(256)]
