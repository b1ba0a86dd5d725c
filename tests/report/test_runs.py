"""A run is read as far as it goes."""

import json

import pytest

from fasttrain.errors import ConfigError
from fasttrain.report.runs import read_run, read_runs


def _lines(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_finished_run(simclr_run):
    (run,) = read_runs([simclr_run])
    assert run.state == "finished: 2 steps"
    assert run.card.step == 2
    assert run.notes == ()
    assert run.last("knn_top1") == run.summary["knn_top1"]
    assert [x for x, _ in run.curve("loss")] == [0.25, 0.5]
    assert run.data == run.config.train.data_path


def test_a_run_that_never_finished(simclr_run, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((simclr_run / name).read_bytes())
    run = read_run(tmp_path, "cut")
    assert run.state == "never finished: 2 of 2 steps"  # --limit_steps 2
    assert run.summary is None
    assert any("no complete checkpoint" in note for note in run.notes)
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path, "cut").state == "never finished: no step was logged"


def test_lines_that_are_cut_or_hold_no_step_are_counted(tmp_path):
    _lines(tmp_path, {"step": 1, "epoch": 0.5, "loss": None, "lr": 0.1}, {"no": "step"}, {"step": 2, "epoch": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    run = read_run(tmp_path, "it")
    assert len(run.lines) == 2
    assert run.notes[0] == "2 of the lines of metrics.jsonl cannot be read and are left out"
    assert run.curve("loss") == []
    assert run.curve("lr") == [(0.5, 0.1)]


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe"])
def test_a_summary_that_cannot_be_read_is_a_note(tmp_path, content):
    _lines(tmp_path, {"step": 1, "epoch": 1.0, "loss": 1.0})
    (tmp_path / "summary.json").write_bytes(content)
    run = read_run(tmp_path, "it")
    assert run.summary is None
    assert "summary.json cannot be read, so whether it finished is unknown" in run.notes


@pytest.mark.parametrize("text", ["method: dino\nlrr: 1\n", "method: nobody\n", "- 1\n", "{", ""])
def test_a_configuration_that_cannot_be_used_is_a_note(tmp_path, text):
    _lines(tmp_path, {"step": 1, "epoch": 1.0, "loss": 1.0})
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path, "it")
    assert run.config is None
    assert any(note.startswith("config.yaml cannot be used") for note in run.notes)
    assert run.curve("loss") == [(1.0, 1.0)]


def test_names_tell_runs_apart(tmp_path):
    line = {"step": 1, "epoch": 1.0}
    folders = [_lines(tmp_path / name, line) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [run.name for run in read_runs([folders[0], folders[2], folders[0]])] == ["run", "other"]


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no/such: no such run; give the folder"):
        read_runs([tmp_path / "no/such"])
    with pytest.raises(ConfigError, match=r"holds no run: neither metrics\.jsonl nor config\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="has logged no step"):
        read_runs([_lines(tmp_path / "empty")])
    _lines(tmp_path / "full", {"step": 1, "epoch": 1.0})
    assert len(read_runs([tmp_path / "empty", tmp_path / "full"])) == 2
