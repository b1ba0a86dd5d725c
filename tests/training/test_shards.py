"""The command on shards: trained as on the files in them, resumed exactly, and stopped where too much is unreadable."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.run import main
from tests.pipelines.sources.shard_files import example, jpeg, samples, write_tar, write_tfrecord
from tests.small_runs import assert_same_run, flags

_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tars(folder):
    for split, first, count in (("train", 0, 36), ("val", 90, 12)):
        for k in range(3):
            part = range(first + k * count // 3, first + (k + 1) * count // 3)
            write_tar(folder / split / f"{k:06}.tar", samples(part))
    return ["--data_path", folder]


def tfrecords(folder):
    for split, first, count in (("train", 0, 36), ("validation", 90, 12)):
        records = (example(image__encoded=jpeg(k), image__class__label=k % 3) for k in range(first, first + count))
        write_tfrecord(folder / f"{split}-00000-of-00001", records)
    return ["--data_path", folder / "train-*", "--val_path", folder / "validation-*"]


@pytest.mark.parametrize("kind", [tars, tfrecords])
def test_resumed_run_on_shards_equals_the_run_in_one_go(tmp_path, kind):
    arguments = kind(tmp_path / "data")
    for run in ("straight", "resumed"):
        stop = ["--limit_steps", 3] if run == "resumed" else []
        assert main(flags("x", tmp_path / run, *arguments, *stop)) == 0
    assert len(list((tmp_path / "resumed/index").glob("*.npz"))) == 2
    assert main(flags("x", tmp_path / "resumed", *arguments)) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    summary = json.loads((tmp_path / "resumed/summary.json").read_text())
    assert (summary["images"], summary["steps"], summary["unreadable_images"]) == (36, 8, 0)
    assert summary["knn_top1"] is not None


def test_truncated_shard_is_named_once_and_counted(tmp_path, capfd):
    arguments = tars(tmp_path / "data")
    cut = tmp_path / "data/train/000001.tar"
    os.truncate(cut, 4000)
    assert main(flags("x", tmp_path / "run", *arguments)) == 0
    out = capfd.readouterr().out
    assert out.count(f"{cut}: cut short inside 0013.jpg; the 1 image(s) before it are used") == 1
    assert out.count(str(cut)) == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["images"], summary["unreadable_images"]) == (25, 1)


def noise_with_bad_files(folder, count=120, every=5):
    for k in range(count):
        path = folder / f"{k % 2}" / f"{k:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if k % every == 0 else jpeg(k))
    return folder


def test_too_many_bad_files_stop_the_run(tmp_path, capfd):
    folder = noise_with_bad_files(tmp_path / "images")
    assert main(flags(folder, tmp_path / "run")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    # How many more the other threads have met by then depends on the machine.
    what = r"fasttrain: images: 1\d of 120 images cannot be read, more than the fraction 0.1 allowed"
    assert re.fullmatch(rf"{what} \(max_bad_fraction\); {folder}/\d/\d\d\d\.jpg: not an image", line)
    assert main(flags(folder, tmp_path / "run", "--max_bad_fraction", 0.2, "--limit_steps", 2)) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["unreadable_images"] == 24


@pytest.mark.slow
def test_too_many_bad_files_stop_two_ranks_with_one_line(tmp_path):
    """Only the second rank's half is bad: the first must not wait for it, nor end in a traceback."""
    folder = noise_with_bad_files(tmp_path / "images", every=1000)
    for k in range(8, 104, 16):  # with 8 images per rank, these batches of an evaluation are the second's
        for path in (folder / f"{i % 2}" / f"{i:03}.jpg" for i in range(k, k + 8)):
            path.write_bytes(b"no image")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fasttrain/run.py"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, *flags(folder, tmp_path / "run")]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert len(lines) == 1
    assert "images cannot be read, more than the fraction 0.1 allowed" in lines[0]
    assert (
        "fasttrain/training/trainer.py" not in done.stderr
    )  # a rank's traceback would name it; the launcher has its own
