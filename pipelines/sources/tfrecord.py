"""TFRecord shards of ``tf.train.Example``, read without TensorFlow.

A file is a row of records: length (8 bytes, little-endian), masked CRC-32C of these 8 bytes, the data, masked CRC-32C
of the data. The data is a protocol buffer: ``Example{1: Features{1: map<string, Feature>}}``, where a Feature is
``{1: BytesList}``, ``{2: FloatList}`` or ``{3: Int64List}`` and a list ``{1: repeated value}``. The image is under
``image/encoded`` or ``image``, its label under ``image/class/label`` or ``label``. The index reads what lies round the
images and jumps over these, so that the checksum of the data, which would take reading it all, is not looked at.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from .shards import UNLABELLED, Damaged, ShardFormat, ShardIndex, Window, shard_index

_IMAGE, _LABEL = (b"image/encoded", b"image"), (b"image/class/label", b"label")
_CRC_32C = 0x82F63B78  # Castagnoli's polynomial, reversed
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_LONGEST_NAME, _LONGEST_VARINT = 32, 10  # bytes
_NO_EXAMPLE = "it is no tf.train.Example"
Span = tuple[int, int]  # start and end in the file


def index(window: Window) -> ShardIndex:
    """Index a TFRecord file; of one that is cut short or broken, what is whole."""
    found, damage = array("q"), []  # offset, size, label of each image
    try:
        for number, record in enumerate(_records(window)):
            try:
                image, label = _example(window, record)
            except Damaged as error:
                damage.append(f"record {number} is left out: {error}")
                continue
            if image is not None:
                found.extend((image[0], image[1] - image[0], label))
    except Damaged as error:
        damage.append(f"{error}; the {len(found) // 3} image(s) before it are used")
    return shard_index(found, "; ".join(damage))


def record_name(window: Window, offset: int) -> str:
    """``record 17`` for the record, counted from 0, in which ``offset`` lies."""
    number = next((k for k, (start, end) in enumerate(_records(window)) if start <= offset < end), None)
    return "" if number is None else f"record {number}"


TFRECORD = ShardFormat("a tf.train.Example with bytes under image/encoded or image", index, record_name)


def _records(window: Window) -> Iterator[Span]:
    """Where the data of each record lies; raises Damaged after the last whole one."""
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
                else f"the length of record {number} has a wrong checksum, so that none after it can be found"
            )
        start, at = at + 12, at + 16 + length
        if at > window.length:
            raise Damaged(f"cut short inside record {number}")
        yield start, start + length
        number += 1


def _example(window: Window, record: Span) -> tuple[Span | None, int]:
    """Where the image of a record lies, if it has one, and its label."""
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
    found = next((image[name] for name in _IMAGE if name in image), None)
    return found, next((label[name] for name in _LABEL if name in label), UNLABELLED)


def _key(window: Window, entry: Span) -> bytes:
    """Name of a feature, which writers put first; empty where it is longer than any that counts here."""
    head = window.read(entry[0], min(2 + _LONGEST_NAME, entry[1] - entry[0]))
    if len(head) > 1 and head[0] == (1 << 3 | _BYTES) and head[1] <= _LONGEST_NAME:
        return head[2 : 2 + head[1]]
    key = _only(window, entry, 1)
    return window.read(key[0], key[1] - key[0]) if key and key[1] - key[0] <= _LONGEST_NAME else b""


def _first_number(window: Window, values: Span) -> int:
    """First value of an Int64List; its values may be packed into one field or have a field each."""
    for _, wire, start, end in _fields(window, values):
        if wire == _VARINT or (wire == _BYTES and start < end):
            unsigned = _varint(window.read(start, _LONGEST_VARINT), 0)[0] & (2**64 - 1)
            return unsigned - 2**64 if unsigned >= 2**63 else unsigned
    return UNLABELLED


def _only(window: Window, message: Span, number: int) -> Span | None:
    return next(_inside(window, message, number), None)


def _inside(window: Window, message: Span, number: int) -> Iterator[Span]:
    """Content of each field ``number`` of a message that has a length."""
    return ((start, end) for n, wire, start, end in _fields(window, message) if (n, wire) == (number, _BYTES))


def _fields(window: Window, message: Span) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and end of each field of a message."""
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
    """A number in groups of seven bits, the lowest first, and where it ends."""
    if data[at : at + 1] < b"\x80" and at < len(data):
        return data[at], at + 1  # nearly always
    value = 0
    for place, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise Damaged(_NO_EXAMPLE)


def masked_crc(data: bytes) -> int:
    """CRC-32C, turned right by 15 bits, plus a constant: TFRecord's guard against a checksum of checksums."""
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
