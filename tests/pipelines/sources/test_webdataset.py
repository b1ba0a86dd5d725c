import gzip
import os
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain.pipelines.sources.shards import UNLABELLED, Window
from fasttrain.pipelines.sources.webdataset import index, member_name

from .shard_files import jpeg, samples, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def indexed(path):
    with Window(path) as window:
        return index(window)


def contents(path):
    found, data = indexed(path), path.read_bytes()
    return [data[at : at + size] for at, size in zip(found.offsets, found.sizes, strict=True)]


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("label", ["cls", "json", None])
def test_images_and_labels(tmp_path, tar_format, label):
    path = write_tar(tmp_path / "a.tar", samples(range(7), label), tar_format)
    assert contents(path) == [jpeg(k) for k in range(7)]
    found = indexed(path)
    assert found.labels.tolist() == [k % 3 if label else UNLABELLED for k in range(7)]
    assert (found.damage, found.offsets.dtype) == ("", np.int64)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_what_a_sample_is(tmp_path, tar_format):
    members = [
        ("a/1.seg.png", b"one"),  # one key up to the first dot, in any folder
        ("a/1.cls", b" 4\n"),
        ("a/1.jpg", b"a second image of the same sample"),
        ("b/1.CLS", b"5"),  # another folder, another sample
        ("b/1.JPEG", b"two"),
        ("only.txt", b"no image"),
        ("._mac.jpg", b"no image either"),
        ("c.d/2.webp", b"three"),  # a dot in a folder's name is not the first dot
        ("c.d/2.json", b'{"label": true}'),  # no number
        ("x" * 90 + "/" + "y" * 80 + ".bmp", b"four"),
        ("x" * 90 + "/" + "y" * 80 + ".cls", b"-6"),
        ("no.tiff", b"five"),
        ("no.cls", b"cat"),
    ]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    assert contents(path) == [b"one", b"two", b"three", b"four", b"five"]
    assert indexed(path).labels.tolist() == [4, 5, UNLABELLED, -6, UNLABELLED]


def test_names_longer_than_a_header_and_other_kinds_of_members(tmp_path):
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("folder.jpg")
            folder.type = tarfile.DIRTYPE
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "z" * 200
            tar.addfile(folder)
            tar.addfile(link)
            for end in ("jpg", "cls"):
                (tmp_path / "content").write_bytes(b"7")
                tar.add(tmp_path / "content", "ü" * 150 + "." + end)
        assert contents(path) == [b"7"]
        assert indexed(path).labels.tolist() == [7]


def test_headers_from_before_posix(tmp_path):
    """Without a mark a header is known by its checksum."""
    path = write_tar(tmp_path / "a.tar", samples(range(2)))
    data = bytearray(path.read_bytes())
    at = 0
    while data[at : at + 512].strip(b"\0"):
        size = int(data[at + 124 : at + 135], 8)
        data[at + 257 : at + 512] = bytes(255)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        at += 512 + -(-size // 512) * 512
    path.write_bytes(data)
    assert contents(path) == [jpeg(0), jpeg(1)]


def test_sizes_above_8_gib(tmp_path):
    """They are in base 256, which GNU writes; the file here has a hole."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1024 + info.size)
    found = indexed(path)
    assert (found.offsets.tolist(), found.sizes.tolist(), found.damage) == ([512], [9 << 30], "")


def test_every_cut_leaves_what_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    data, whole = path.read_bytes(), indexed(path)
    ends = (whole.offsets + -(-whole.sizes // 512) * 512 + 1024).tolist()  # of each label, after its image
    for cut in (*range(0, ends[-1], 97), *range(512, ends[-1], 512)):
        path.write_bytes(data[:cut])
        found = indexed(path)
        count = sum(cut > end - 512 for end in ends)  # the last block need not be filled up
        # The very first sample has nothing before it that says there should be labels.
        first = cut <= ends[0] - 512 and cut >= whole.offsets[0] + whole.sizes[0]
        assert len(found.offsets) == count + first
        assert found.offsets.tolist() == whole.offsets[: count + first].tolist()
        assert found.damage.startswith("cut short")
        assert f"the {count + first} image(s) before it are used" in found.damage
    path.write_bytes(data[: whole.offsets[1] + 100])
    assert indexed(path).damage == "cut short inside 0001.jpg; the 1 image(s) before it are used"
    path.write_bytes(data[: whole.offsets[1] - 100])
    assert indexed(path).damage.startswith(f"cut short inside the header at byte {whole.offsets[1] - 512}; the 1 ")


def test_a_broken_header_ends_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    at = indexed(path).offsets[2] - 512
    data = bytearray(path.read_bytes())
    data[at : at + 512] = os.urandom(512)
    path.write_bytes(data)
    assert indexed(path).damage == f"no tar header at byte {at}; the 2 image(s) before it are used"


def test_a_size_that_is_no_number_ends_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    at = indexed(path).offsets[2] - 512
    data = bytearray(path.read_bytes())
    data[at + 124 : at + 136] = b"of no matter"
    path.write_bytes(data)
    assert indexed(path).damage == f"no tar header at byte {at}; the 2 image(s) before it are used"


def test_a_packed_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert indexed(path).damage.startswith("packed with gzip; unpack it first")


def test_name_of_a_member(tmp_path):
    for tar_format in FORMATS:
        path = write_tar(tmp_path / "a.tar", [("deep/" * 22 + "er.jpg", b"x")], tar_format)
        offset = int(indexed(path).offsets[0])
        with Window(path) as window:
            assert ("deep/" * 22 + "er.jpg").startswith(member_name(window, offset)[:100])
            assert member_name(window, offset).startswith("deep/deep/")


_NAMES = st.text("abc./", min_size=1, max_size=12).filter(lambda n: n.strip("./") and not n.endswith("/"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_NAMES, st.binary(max_size=1100)), max_size=8), st.sampled_from(FORMATS))
def test_members_are_those_of_tarfile(tmp_path, members, tar_format):
    members = [(name + ".png", content) for name, content in members]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    expected, last = [], None
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            folder, slash, file = member.name.rpartition("/")
            key = (folder + slash, file.partition(".")[0])
            if key != last and key[1]:
                expected.append(tar.extractfile(member).read())
            last = key
    assert contents(path) == expected
