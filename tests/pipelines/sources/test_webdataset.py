import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain.pipelines.sources.shards import UNLABELLED, Window
from fasttrain.pipelines.sources.webdataset import TAR, member_name

from .shard_files import contents, index_of, jpeg, samples, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("label", ["cls", "json", None])
def test_images_and_labels_are_indexed(tmp_path, tar_format, label):
    path = write_tar(tmp_path / "a.tar", samples(range(7), label), tar_format)
    assert contents(TAR, path) == [jpeg(k) for k in range(7)]
    index = index_of(TAR, path)
    assert (index.labels.tolist(), index.damage) == ([k % 3 if label else UNLABELLED for k in range(7)], "")


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_of_one_key_are_a_sample(tmp_path, tar_format):
    members = [
        ("a/1.seg.png", b"a mask: the sample has an image without a column"),
        ("a/1.cls", b" 4\n"),
        ("a/1.jpg", b"one"),
        ("a/1.png", b"a second image without a column"),
        ("b/1.CLS", b"5"),  # another folder is another sample
        ("b/1.JPEG", b"two"),
        ("._mac.jpg", b"no image"),
        ("c.d/2.webp", b"three"),  # a dot in a folder's name does not count
        ("c.d/2.json", b'{"label": true}'),  # no number
        ("x" * 90 + "/" + "y" * 80 + ".bmp", b"four"),
        ("x" * 90 + "/" + "y" * 80 + ".cls", b"-6"),
        ("no.tiff", b"five"),
        ("no.cls", b"cat"),
        ("no.gif", b"another format"),
    ]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    assert contents(TAR, path) == [b"one", b"two", b"three", b"four", b"five"]
    index = index_of(TAR, path)
    assert index.labels.tolist() == [4, 5, UNLABELLED, -6, UNLABELLED]
    assert (index.dotted, index.left_out.extensions) == (0, {".seg.png": 1, ".png": 1, ".gif": 1})


@pytest.mark.parametrize(
    ("names", "images", "labels", "left_out"),
    [
        # Regression: all frames of a camera were one image.
        ([f"{cam}.{k:04}.jpg" for cam in ("cam1", "cam2") for k in range(16)], 32, [], {}),
        (["a.left.jpg", "a.right.JFIF", "a.cls=3", "b.left.jpg", "b.right.JFIF", "b.cls=4"], 4, [3, 3, 4, 4], {}),
        (["a.1.jpg", "a.1.cls=7", "a.2.json=8", "a.2.jpg", "a.3.jpg", "a.cls=9"], 3, [7, 8, 9], {}),
        (["v1.0/a.jpg", "v1.0/a.1.jpg", "v1.0/a.beach.jpg", "v1.0/b.2024-01-31.12_30.PNG"], 3, [], {".beach.jpg": 1}),
    ],
)
def test_image_with_dots_in_its_name_is_not_lost(tmp_path, names, images, labels, left_out):
    texts = {".json": '{{"label": {}}}', ".cls": "{}"}
    members = []
    for name, _, label in (name.partition("=") for name in names):
        members.append((name, texts[name[name.rindex(".") :]].format(label).encode() if label else name.encode()))
    path = write_tar(tmp_path / "a.tar", members)
    index = index_of(TAR, path)
    assert (len(index.offsets), index.labels.tolist()) == (images, labels or [UNLABELLED] * images)
    assert index.left_out.extensions == left_out
    read = [content.decode() for content in contents(TAR, path)]
    assert read == [name for name in names if "=" not in name and ".beach" not in name]
    assert index.dotted == sum(name.rpartition("/")[2].count(".") > 1 for name in read)


def test_special_members_are_counted_and_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.FIFOTYPE), ("c", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    special = index_of(TAR, tmp_path / "a.tar").left_out.special
    assert {kind: (count, name.rpartition(": ")[2]) for kind, (count, name) in special.items()} == {
        "link in a tar": (1, "a.jpg"),
        "FIFO": (1, "b.jpg"),
    }


def test_numpy_member_is_the_image_only_without_another(tmp_path):
    members = [("a.cls", b"1"), ("a.npy", b"one"), ("b.npy", b"an embedding"), ("b.png", b"two"), ("b.cls", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    assert contents(TAR, path) == [b"one", b"two"]
    assert index_of(TAR, path).labels.tolist() == [1, 2]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_truncated_shard_keeps_the_complete_samples(tmp_path, tar_format):
    prefix = "" if tar_format == tarfile.USTAR_FORMAT else "ü" * 60  # a name that needs an extended header
    members = ((prefix + name, content) for name, content in samples(range(3)))
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    data, whole = path.read_bytes(), index_of(TAR, path)
    blocks = [at + -(-size // 512) * 512 for at, size in zip(whole.offsets.tolist(), whole.sizes.tolist(), strict=True)]
    header = int(whole.offsets[0])
    ends = [block + header + 512 for block in blocks]  # of each label, after its image
    for cut in (*range(0, ends[-1], 97), *range(512, ends[-1], 512)):
        path.write_bytes(data[:cut])
        index = index_of(TAR, path)
        count = sum(cut > end - 512 for end in ends)  # the last block need not be complete
        # The first sample has no sample before it that shows that labels are missing.
        first = cut <= ends[0] - 512 and cut >= whole.offsets[0] + whole.sizes[0]
        assert index.offsets.tolist() == whole.offsets[: count + first].tolist()
        assert index.damage.startswith("cut short")
        assert f"the {count + first} image(s) before it are used" in index.damage


NEGATIVE = tarfile.TarInfo("a.jpg")  # its size; Python before 3.14 would read the same header again and again
NEGATIVE.size = -512


@pytest.mark.parametrize(
    ("offset", "header"), [(0, b"text" * 34), (124, bytes(range(200, 212))), (0, NEGATIVE.tobuf(tarfile.GNU_FORMAT))]
)
def test_corrupt_header_ends_the_shard(tmp_path, offset, header):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    at = index_of(TAR, path).offsets[2] - 512
    data = bytearray(path.read_bytes())
    data[at + offset : at + offset + len(header)] = header
    path.write_bytes(data)
    assert index_of(TAR, path).damage == f"no tar header at byte {at}; the 2 image(s) before it are used"


@pytest.mark.parametrize("tar_format", FORMATS)
def test_member_at_an_offset_is_named(tmp_path, tar_format):
    name = "deep/" * 22 + "er.jpg"
    path = write_tar(tmp_path / "a.tar", [(name, b"x")], tar_format)
    with Window(path) as window:
        start = member_name(window, int(index_of(TAR, path).offsets[0]))[:100]
    assert start
    assert name.startswith(start)


_NAMES = st.text("abc./", min_size=1, max_size=12).filter(lambda n: n.strip("./") and not n.endswith("/"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_NAMES, st.binary(max_size=1100)), max_size=8), st.sampled_from(FORMATS))
def test_samples_follow_from_the_names(tmp_path, members, tar_format):
    members = [(name + ".png", content) for name, content in members]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    samples = []
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            folder, slash, file = member.name.rpartition("/")
            stem, *columns = file.split(".")[:-1]
            if not samples or samples[-1][0] != folder + slash + stem:
                samples.append((folder + slash + stem, [], []))
            if stem:
                samples[-1][1 + bool(".".join(columns))].append(tar.extractfile(member).read())
    assert contents(TAR, path) == [image for _, plain, dotted in samples for image in (plain[:1] or dotted)]
