"""A run is read as far as its files are valid."""

import json

import pytest

from fasttrain.errors import ConfigError
from fasttrain.report.runs import read_run, read_runs

_LINE = {"step": 1, "epoch": 1.0, "loss": 1.0}


def _lines(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_read_runs_of_a_finished_run(simclr_run):
    (run,) = read_runs([simclr_run])
    assert (run.state, run.card.step, run.notes) == ("finished: 2 steps", 2, ())
    assert run.last("knn_top1") == run.summary["knn_top1"]
    assert [x for x, _ in run.curve("loss")] == [0.25, 0.5]
    assert run.data == run.config.train.data_path


def test_read_run_that_never_finished(simclr_run, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((simclr_run / name).read_bytes())
    run = read_run(tmp_path, "cut")
    assert run.state == "never finished: 2 of 2 steps"  # --limit_steps 2
    assert run.summary is None
    assert any("checkpoint" in note for note in run.notes)
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path, "cut").state == "never finished: no step was logged"


def test_read_run_counts_invalid_lines(tmp_path):
    _lines(tmp_path, {"step": 1, "epoch": 0.5, "loss": None, "lr": 0.1}, {"no": "step"}, {"step": 2, "epoch": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    run = read_run(tmp_path, "it")
    assert len(run.lines) == 2
    assert run.notes[0].startswith("2 lines of metrics.jsonl")
    assert (run.curve("loss"), run.curve("lr")) == ([], [(0.5, 0.1)])


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", text) for text in (b"[1]", b"{", b"\xff\xfe")]
    + [("config.yaml", text) for text in (b"method: dino\nlrr: 1\n", b"method: nobody\n", b"- 1\n", b"{", b"")],
)
def test_read_run_notes_an_invalid_file(tmp_path, name, content):
    (_lines(tmp_path, _LINE) / name).write_bytes(content)
    run = read_run(tmp_path, "it")
    assert run.summary is run.config is None
    assert any(note.startswith(name) for note in run.notes)
    assert run.curve("loss") == [(1.0, 1.0)]


def test_read_runs_names_each_folder_by_its_end(tmp_path):
    folders = [_lines(tmp_path / name, _LINE) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [run.name for run in read_runs([folders[0], folders[2], folders[0]])] == ["run", "other"]


def test_read_runs_refuses_folders_without_a_run(tmp_path):
    (tmp_path / "none").mkdir()
    empty = _lines(tmp_path / "empty")
    for folder in (tmp_path / "no/such", tmp_path / "none", empty):
        with pytest.raises(ConfigError, match=f"{folder}: "):
            read_runs([folder])
    assert len(read_runs([empty, _lines(tmp_path / "full", _LINE)])) == 2
