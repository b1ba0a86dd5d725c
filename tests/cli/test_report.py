"""``fasttrain report`` writes a page and names what it leaves out."""

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
    """A copy of a run that a test may change."""
    return shutil.copytree(simclr_run, tmp_path / "run")


def _change_data(run, old, new):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"data_path: {old}", f"data_path: {new}"))


def test_report_goes_into_the_first_run(run, capsys):
    """The training leaves a page with curves; the command adds pictures."""
    page = (run / "report.html").read_text()
    assert "<h3>Loss</h3>" in page
    assert "<h2>Nearest neighbours</h2>" not in page
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    page = (run / "report.html").read_text()
    assert out == f"{run}/report.html: 1 run, {len(page.encode()) / 1e3:,.0f} kB\n"
    assert "<h2>Nearest neighbours</h2>" in page
    assert err.startswith("fasttrain: run: no attention: ")
    assert page.count("Left out: the network has no [CLS] token") == 1


def test_report_of_a_run_without_checkpoint_and_data(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert main(["report", str(run), "--output", str(run / "page.html")]) == 0
    page, err = (run / "page.html").read_text(), capsys.readouterr().err
    for text in ("never finished: 2 of 2 steps", "no complete checkpoint"):
        assert text in err
        assert text in page
    assert "no map, no neighbours, no attention" in err


def test_report_without_the_run_s_data_has_the_curves(run, capsys):
    _change_data(run, "/", "/gone/")
    assert main(["report", str(run)]) == 0
    assert "/gone/" in capsys.readouterr().err
    assert "<h3>Loss</h3>" in (run / "report.html").read_text()


def test_report_writes_names_that_are_not_utf_8(run, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "noise")
    for path in list((data / "val").rglob("*.*")):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9-" + os.fsencode(path.name)))
    _change_data(run, images, data)
    assert main(["report", str(run)]) == 0
    assert "caf\\udce9-" in (run / "report.html").read_text()


def test_report_of_data_without_labels_marks_no_classes(tmp_path, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    run = train_few_steps(folder, tmp_path / "run")
    capsys.readouterr()
    assert main(["report", str(run), "--images", "12"]) == 0
    assert "no labels" in capsys.readouterr().err
    page = (run / "report.html").read_text()
    assert "12 training images (none are held out)" in page
    assert page.count("The data has no labels") == 2
    assert 'class="wrong"' not in page


def test_report_of_different_data_warns(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1.0, "loss": 1.0}))
    (other / "config.yaml").write_text("method: simclr\n")
    assert main(["report", str(run), str(other), "--images", "0"]) == 0
    assert "different data" in capsys.readouterr().err


def test_report_that_cannot_be_written_is_refused(simclr_run, capsys):
    assert main(["report", str(simclr_run), "--images", "0", "--output", "/no/such/page.html"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: --output /no/such/page.html: ")
