"""The command writes a page, says what it leaves out, and refuses in one line what cannot be shown."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fasttrain.cli import main
from tests.small_runs import train_few_steps


@pytest.fixture
def run(simclr_run, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(simclr_run, tmp_path / "run")


def test_it_writes_into_the_first_run(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    page = (run / "report.html").read_text()
    assert out == f"{run}/report.html: 1 run, {len(page.encode()) / 1e3:,.0f} kB\n"
    assert "<h2>Nearest neighbours</h2>" in page
    assert err == "fasttrain: run: no attention: the network has no [CLS] token: it is no ViT, or pools its patches.\n"
    assert page.count("Left out: the network has no [CLS] token") == 1


def test_a_training_leaves_its_curves(simclr_run):
    page = (simclr_run / "report.html").read_text()
    assert "<h3>Loss</h3>" in page
    assert "fasttrain report" in page
    assert "<h2>Nearest neighbours</h2>" not in page


def test_a_run_that_was_stopped_before_its_first_checkpoint(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert main(["report", str(run), "--output", str(run / "page.html")]) == 0
    err = capsys.readouterr().err
    assert "never finished: 2 of 2 steps" in err
    assert "no map, no neighbours, no attention" in err
    assert "no complete checkpoint" in err
    page = (run / "page.html").read_text()
    assert "never finished: 2 of 2 steps" in page
    assert page.count("no complete checkpoint") == 3


def test_data_that_is_gone(run, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("data_path: /", "data_path: /gone/"))
    assert main(["report", str(run)]) == 0
    assert "no such folder" in capsys.readouterr().err
    assert "<h3>Loss</h3>" in (run / "report.html").read_text()


def test_names_that_are_no_utf_8(run, images, tmp_path, capsys):
    data = shutil.copytree(images, tmp_path / "noise")
    for path in list((data / "val").rglob("*.*")):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9-" + os.fsencode(path.name)))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"data_path: {images}", f"data_path: {data}"))
    assert main(["report", str(run)]) == 0
    assert "caf\\udce9-" in (run / "report.html").read_text()


def test_data_without_labels(tmp_path, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    run = train_few_steps(folder, tmp_path / "run")
    capsys.readouterr()
    assert main(["report", str(run), "--images", "12"]) == 0
    assert "no labels, so nothing is coloured or marked" in capsys.readouterr().err
    page = (run / "report.html").read_text()
    assert "12 training images (none are held out)" in page
    assert page.count("The data has no labels") == 2
    assert 'class="wrong"' not in page


def test_runs_of_different_data(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1.0, "loss": 1.0}))
    (other / "config.yaml").write_text("method: simclr\n")
    assert main(["report", str(run), str(other), "--images", "0"]) == 0
    assert "fasttrain: The runs are of different data" in capsys.readouterr().err
