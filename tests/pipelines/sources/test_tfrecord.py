import gzip
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from fasttrain.pipelines.sources.shards import UNLABELLED, Window
from fasttrain.pipelines.sources.tfrecord import index, masked_crc, record_name

from .shard_files import example, imagenet_records, jpeg, write_tfrecord


def indexed(path):
    with Window(path) as window:
        return index(window)


def contents(path):
    found, data = indexed(path), path.read_bytes()
    return [data[at : at + size] for at, size in zip(found.offsets, found.sizes, strict=True)]


@given(st.binary(max_size=40))
def test_checksum_is_tensorboards(data):
    assert masked_crc(data) == masked_crc32c(data)


def test_records_of_imagenet(tmp_path):
    path = write_tfrecord(tmp_path / "train-00000-of-00001", imagenet_records(range(7)))
    assert contents(path) == [jpeg(k) for k in range(7)]
    assert indexed(path).labels.tolist() == [k % 3 + 1 for k in range(7)]
    assert indexed(path).damage == ""


@pytest.mark.parametrize("label", [0, 1, 127, 128, 2**40, -1, -(2**62)])
@pytest.mark.parametrize("filler", [0, 5000])
def test_label_and_image_of_other_names_and_sizes(tmp_path, label, filler):
    record = example(a=b"x" * filler, image=b"y" * (1 + filler), label=[label, 9], z=[1.5] * filler or 1.5)
    path = write_tfrecord(tmp_path / "a.tfrecord", [record])
    assert contents(path) == [b"y" * (1 + filler)]
    assert indexed(path).labels.tolist() == [label]


def test_what_comes_first_counts_and_what_is_missing(tmp_path):
    records = [
        example(image=b"thumbnail", image__encoded=b"picture", label=3, image__class__label=4),
        example(text=b"no image", label=5),
        example(image=b"no label"),
        example(image=5, image__encoded=b"other type", label=b"text"),
        b"",
    ]
    path = write_tfrecord(tmp_path / "a.tfrecord", records)
    assert contents(path) == [b"picture", b"no label", b"other type"]
    assert indexed(path).labels.tolist() == [4, UNLABELLED, UNLABELLED]


def test_a_name_after_its_feature(tmp_path):
    """Protobuf lets the fields of a message come in any order."""
    record = example(image=b"picture", label=7)
    name, value = b"\x0a\x05label", b"\x12\x05\x1a\x03\x0a\x01\x07"
    assert name + value in record
    path = write_tfrecord(tmp_path / "a.tfrecord", [record.replace(name + value, value + name)])
    assert (contents(path), indexed(path).labels.tolist()) == ([b"picture"], [7])


def test_numbers_with_a_field_each(tmp_path):
    """As writers of the older protocol put them; proto3 packs them into one."""
    packed, unpacked = b"\x1a\x03\x0a\x01\x07", b"\x1a\x02\x08\x07"
    record = example(image=b"picture", label=7)
    assert packed in record
    record = record.replace(b"\x12\x05" + packed, b"\x12\x04" + unpacked)
    at = record.index(b"\x0a\x05label") - 1
    record = record[:at] + bytes([record[at] - 1]) + record[at + 1 :]
    record = b"\x0a" + bytes([record[1] - 1]) + record[2:]
    path = write_tfrecord(tmp_path / "a.tfrecord", [record])
    assert (contents(path), indexed(path).labels.tolist()) == ([b"picture"], [7])


def test_every_cut_leaves_what_is_whole(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", imagenet_records(range(3)))
    data = path.read_bytes()
    lengths, at = [], 0
    while at < len(data):
        at += 16 + struct.unpack_from("<Q", data, at)[0]
        lengths.append(at)
    for cut in sorted({*range(0, len(data), 61), *(length + 5 for length in lengths[:-1])}):
        path.write_bytes(data[:cut])
        count = sum(cut >= length for length in lengths)
        found = indexed(path)
        assert len(found.offsets) == count
        expected = f"cut short inside record {count}; the {count} image(s) before it are used"
        assert found.damage == ("" if cut in (0, *lengths) else expected)


def test_a_wrong_length_ends_the_shard(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", imagenet_records(range(3)))
    data = bytearray(path.read_bytes())
    second = 16 + struct.unpack_from("<Q", data)[0]
    data[second] ^= 1
    path.write_bytes(data)
    assert contents(path) == [jpeg(0)]
    why = "the length of record 1 has a wrong checksum, so that none after it can be found"
    assert indexed(path).damage == f"{why}; the 1 image(s) before it are used"


@pytest.mark.parametrize("content", [b"\xff" * 40, b"\x0a\x7f", b"\x0b\x00", b"\x0a\x04\x0a\x7f\x00\x00"])
def test_a_record_that_is_no_example_is_left_out(tmp_path, content):
    good = list(imagenet_records(range(2)))
    path = write_tfrecord(tmp_path / "a.tfrecord", [good[0], content, good[1]])
    assert contents(path) == [jpeg(0), jpeg(1)]
    assert indexed(path).damage == "record 1 is left out: it is no tf.train.Example"


def test_a_packed_shard(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", imagenet_records(range(3)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert indexed(path).damage.startswith("packed with gzip; unpack it first")


def test_name_of_a_record(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", imagenet_records(range(3)))
    with Window(path) as window:
        assert [record_name(window, int(at)) for at in indexed(path).offsets] == ["record 0", "record 1", "record 2"]
        assert record_name(window, window.length + 5) == ""
