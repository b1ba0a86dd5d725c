import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Sequence, Value

from fasttrain.errors import DataError
from fasttrain.pipelines import open_source, source_from_dataset

from .shard_files import jpeg

ANIMALS = ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Parquet files are converted into a cache, which tests do not share with the user."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def rows(count, first=0, **columns):
    """A data set of JPEGs in the column ``photo``, with further columns (values, type)."""
    values = {"photo": [{"bytes": jpeg(first + k), "path": None} for k in range(count)]}
    values |= {name: column for name, (column, _) in columns.items()}
    return Dataset.from_dict(values, Features({"photo": Image()} | {name: kind for name, (_, kind) in columns.items()}))


def labelled(count, first=0, kind=ANIMALS):
    return rows(count, first, label=([k % 2 for k in range(count)], kind))


@pytest.mark.parametrize(
    ("columns", "labels", "classes", "origin"),
    [
        ({"label": ([1, 0, 1], ANIMALS)}, [1, 0, 1], ("cat", "dog"), "the column label"),
        ({"fine": ([1, 0, 1], ANIMALS), "label": ([7, 8, 9], Value("int64"))}, [1, 0, 1], ("cat", "dog"), "fine"),
        ({"label": ([7, 9, 7], Value("int64"))}, [0, 1, 0], ("7", "9"), "label"),
        ({"target": (["b", "a", "b"], Value("string"))}, [1, 0, 1], ("a", "b"), "target"),
        ({"caption": (["b", "a", "b"], Value("string"))}, None, (), "no column is a label"),
        ({"label": ([[1], [0, 1], []], Sequence(ANIMALS))}, None, (), "column label: a target is a list"),
        ({"label": ([1, None, 0], ANIMALS)}, None, (), "column label: a target is None"),
        ({"label": ([-1, -1, -1], ANIMALS)}, None, (), "column label: some are negative"),
    ],
)
def test_columns_are_found_by_their_type(columns, labels, classes, origin):
    source = source_from_dataset(rows(3, **columns))
    assert (source.encoded, source.channels, len(source)) == (True, 3, 3)
    assert source.read(np.int64(2)).tobytes() == jpeg(2)
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.classes == classes
    assert origin in source.listing.labels_from + source.listing.unlabelled


def test_format_and_transform_are_not_applied():
    data = labelled(4).with_transform(lambda batch: {"photo": ["another"] * len(batch["photo"])})
    assert source_from_dataset(data.select([3, 1])).read(0).tobytes() == jpeg(3)
    assert source_from_dataset(labelled(2).with_format("torch")).read(1).tobytes() == jpeg(1)


def test_image_column_of_several_is_named():
    data = rows(2, image=([{"bytes": jpeg(8), "path": None}] * 2, Image()))
    source = source_from_dataset(data, name="mine")
    assert source.read(0).tobytes() == jpeg(8)
    assert source.listing.notes == ("mine: the images are the column image of photo, image",)


def test_image_by_its_path_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(5))
    values = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.jpg", "gone.jpg")]
    source = source_from_dataset(Dataset.from_dict({"image": [*values, None]}, Features({"image": Image()})))
    assert source.read(0).tobytes() == jpeg(5)
    for i in (1, 2):
        with pytest.raises(OSError):  # noqa: PT011
            source.read(i)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (lambda: Dataset.from_dict({"text": ["a"]}), "no column has the type Image; its columns are text"),
        (lambda: labelled(4).select([]), "empty"),
        (lambda: IterableDataset.from_generator(lambda: iter(())), "stream"),
    ],
)
def test_data_set_without_images_is_an_error(data, problem):
    with pytest.raises(DataError, match=problem):
        source_from_dataset(data())


def saved(kind, folder):
    """Write 4 training and 2 held-out images; return the data path."""
    splits = DatasetDict(train=labelled(4), test=labelled(2, 4))
    if kind == "disk":
        splits.save_to_disk(str(folder))
    elif kind == "validation":
        DatasetDict(splits, validation=labelled(3, 6)).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.mark.parametrize(("kind", "held_out"), [("disk", 4), ("parquet", 4), ("validation", 6)])
def test_splits_are_train_and_held_out(tmp_path, kind, held_out):
    path = saved(kind, tmp_path / "animals")
    splits = open_source(path)
    assert (splits.name, len(splits.train), splits.train.classes) == ("animals", 4, ("cat", "dog"))
    assert splits.val.read(0).tobytes() == jpeg(held_out)
    assert splits.val.labels.tolist() == [0, 1, 0][: len(splits.val)]
    assert splits.unused == (("test",) if kind == "validation" else ())
    again = open_source(path)
    assert splits.summary == again.summary
    assert splits.train.stamp(1) == again.train.stamp(1) != splits.train.stamp(2)


def test_single_split_and_single_file_are_opened(tmp_path):
    labelled(4).save_to_disk(str(tmp_path / "one"))
    numbers = ClassLabel(names=["dog", "cat", "eel"])
    labelled(2, 6, numbers).to_parquet(tmp_path / "two.parquet")
    splits = open_source(f"hf:{tmp_path}/one", f"hf:{tmp_path}/two.parquet")
    assert (splits.name, len(splits.train), splits.unused) == ("one", 4, ())
    assert (splits.val.labels.tolist(), splits.val.classes) == ([1, 0], ("cat", "dog"))  # by name
    plain = Dataset.from_dict({"jpg": [jpeg(0)], "cls": [3]})  # written by another program: no types
    plain.to_parquet(tmp_path / "plain.parquet")
    assert open_source(f"hf:{tmp_path}/plain.parquet").train.read(0).tobytes() == jpeg(0)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("hf:owner/name", r"load_dataset\('owner/name'\).save_to_disk"),
        ("hf:/no/such/folder", "no such local folder"),
        ("hf:{}", "holds no data set"),
        ("hf:{}/broken", "cannot be opened"),
        ("hf:{}/three", "has no split 'train' but a, b"),
    ],
)
def test_path_that_is_no_data_set_is_one_line(tmp_path, path, problem):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.parquet").write_bytes(b"nonsense")
    DatasetDict(a=labelled(2), b=labelled(2)).save_to_disk(str(tmp_path / "three"))
    if path == "hf:{}":
        (tmp_path / "empty").mkdir()
        path = "hf:{}/empty"
    with pytest.raises(DataError, match=f"^hf:.*{problem}") as raised:
        open_source(path.format(tmp_path))
    assert "\n" not in str(raised.value)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^hf:.*pip install 'fasttrain\[hf\]'"):
        open_source(f"hf:{tmp_path}")
