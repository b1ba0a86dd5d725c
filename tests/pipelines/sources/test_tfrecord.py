import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from fasttrain.pipelines.sources.shards import UNLABELLED, Window
from fasttrain.pipelines.sources.tfrecord import TFRECORD, masked_crc, record_name

from .shard_files import contents, example, imagenet_records, index_of, jpeg, write_tfrecord


@pytest.fixture
def read(tmp_path):
    """Write records, and return the images, labels and damage of their index."""

    def images(records, change=lambda data: data):
        path = write_tfrecord(tmp_path / "a.tfrecord", records)
        path.write_bytes(change(path.read_bytes()))
        index = index_of(TFRECORD, path)
        return contents(TFRECORD, path), index.labels.tolist(), index.damage

    return images


@given(st.binary(max_size=40))
def test_checksum_equals_tensorboards(data):
    assert masked_crc(data) == masked_crc32c(data)


def test_records_of_imagenet_are_indexed(read, tmp_path):
    assert read(imagenet_records(range(7))) == ([jpeg(k) for k in range(7)], [k % 3 + 1 for k in range(7)], "")
    with Window(tmp_path / "a.tfrecord") as window:
        offsets = index_of(TFRECORD, tmp_path / "a.tfrecord").offsets
        assert [record_name(window, int(at)) for at in offsets] == [f"record {k}" for k in range(7)]
        assert record_name(window, window.length + 5) == ""


@pytest.mark.parametrize("label", [0, 1, 127, 128, 2**40, -1, -(2**62)])
@pytest.mark.parametrize("filler", [0, 5000])
def test_other_names_and_sizes_are_indexed(read, label, filler):
    record = example(a=b"x" * filler, image=b"y" * (1 + filler), label=[label, 9], z=[1.5] * filler or 1.5)
    assert read([record]) == ([b"y" * (1 + filler)], [label], "")


def test_first_name_counts_and_parts_may_be_missing(read):
    records = [
        example(image=b"thumbnail", image__encoded=b"picture", label=3, image__class__label=4),
        example(text=b"no image", label=5),
        example(image=b"no label"),
        example(image=5, image__encoded=b"other type", label=b"text"),
        b"",
    ]
    assert read(records) == ([b"picture", b"no label", b"other type"], [4, UNLABELLED, UNLABELLED], "")


def test_fields_in_any_order_and_unpacked_are_indexed(read):
    """Protobuf lets fields come in any order, and older writers give each number a field."""
    record = example(image=b"picture", label=7)
    name, value = b"\x0a\x05label", b"\x12\x05\x1a\x03\x0a\x01\x07"
    assert name + value in record
    swapped = record.replace(name + value, value + name)
    unpacked = record.replace(value, b"\x12\x04\x1a\x02\x08\x07")
    at = unpacked.index(name) - 1
    unpacked = unpacked[:at] + bytes([unpacked[at] - 1]) + unpacked[at + 1 :]
    unpacked = b"\x0a" + bytes([unpacked[1] - 1]) + unpacked[2:]
    assert read([swapped, unpacked]) == ([b"picture"] * 2, [7, 7], "")


def test_truncated_shard_keeps_the_complete_records(read, tmp_path):
    records = list(imagenet_records(range(3)))
    read(records)
    data = (tmp_path / "a.tfrecord").read_bytes()
    ends = list(itertools.accumulate(16 + len(record) for record in records))
    for cut in sorted({*range(0, len(data), 61), *(end + 5 for end in ends[:-1])}):
        images, _, damage = read(records, lambda data, cut=cut: data[:cut])
        count = sum(cut >= end for end in ends)
        assert images == [jpeg(k) for k in range(count)]
        expected = f"cut short inside record {count}; the {count} image(s) before it are used"
        assert damage == ("" if cut in (0, *ends) else expected)


def test_record_of_wrong_length_ends_the_shard(read):
    def flip(data):
        second = 16 + struct.unpack_from("<Q", data)[0]
        return data[:second] + bytes([data[second] ^ 1]) + data[second + 1 :]

    images, _, damage = read(imagenet_records(range(3)), flip)
    assert images == [jpeg(0)]
    assert damage.startswith("the length of record 1 has a wrong checksum")


@pytest.mark.parametrize("content", [b"\xff" * 40, b"\x0a\x7f", b"\x0b\x00", b"\x0a\x04\x0a\x7f\x00\x00"])
def test_record_that_is_no_example_is_left_out(read, content):
    first, second = imagenet_records(range(2))
    images, _, damage = read([first, content, second])
    assert images == [jpeg(0), jpeg(1)]
    assert damage.startswith("record 1 is left out")
