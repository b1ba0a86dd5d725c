"""The files of a run: their content, and what a resumed run keeps."""

import errno
import json
import math
import os

import pytest
import torch

from fasttrain.methods import Objective, Step
from fasttrain.training.guard import Finding
from fasttrain.training.records import Meter, Recorder, metrics_line, write_summary
from tests.small_runs import lines


def _line(step, **values):
    return {"step": step, "epoch": step / 4, "loss": 1 / step, **values}


def test_lines_are_on_disk_at_once(tmp_path):
    with Recorder(tmp_path / "new" / "folder") as recorder:
        recorder.step(_line(1))
        assert lines(tmp_path / "new" / "folder" / "metrics.jsonl") == [_line(1)]
        recorder.epoch({"train_loss": 0.5, "epoch": 0, "step": 4})
        assert lines(tmp_path / "new" / "folder" / "log.txt") == [{"train_loss": 0.5, "epoch": 0, "step": 4}]


def test_json_has_null_for_nan(tmp_path):
    """RFC 8259 has no NaN; Python's json would write one."""
    broken = _line(1, loss=math.nan, entropy=math.inf, momentum=None)
    with Recorder(tmp_path) as recorder:
        recorder.step(broken)
        recorder.epoch({"train_loss": -math.inf, "step": 1})
        write_summary(recorder.folder, {"knn_top1": math.nan, "collapsed": False, "arch": "vit"})
    for name in ("metrics.jsonl", "log.txt", "summary.json"):
        assert "NaN" not in (tmp_path / name).read_text()
        assert "Infinity" not in (tmp_path / name).read_text()
    assert lines(tmp_path / "metrics.jsonl") == [_line(1, loss=None, entropy=None, momentum=None)]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"knn_top1": None, "collapsed": False, "arch": "vit"}


def test_resumed_recorder_keeps_lines_before_the_step_only(tmp_path):
    with Recorder(tmp_path) as recorder:
        assert recorder.past == []
        for step in (1, 4, 5, 8):
            recorder.step(_line(step, loss=0.1 + 0.2))
        for step in (4, 8):
            recorder.epoch({"train_loss": step, "step": step})
    with Recorder(tmp_path, resumed_at=5) as recorder:
        assert recorder.past == [_line(step, loss=0.1 + 0.2) for step in (1, 4, 5)]  # to the last bit
        recorder.step(_line(6))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path / "log.txt")] == [4]


_DAMAGES = {
    "NUL tail": b"%s\n%s\n\0\0\0\0",
    "garbage": b"%s\n\x93a8}\n%s\n",
    "invalid UTF-8": b'%s\n{"step": 3, "loss\xff\xfe": 1}garbage\n%s\n',
    "cut in the middle": b'%s\n{"step": 3, "lo\n%s\n',
    "two objects": b'%s\n{"step": 3}{"step": 4}\n%s\n',
    "deep": b"%s\n" + b"[" * 100_000 + b"\n%s\n",
}


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_damaged_lines_are_counted_and_left_out(tmp_path, name, damage):
    """A run with a whole checkpoint could not be resumed."""
    whole = [json.dumps(_line(step)).encode() for step in (1, 2)]
    (tmp_path / name).write_bytes(_DAMAGES[damage].replace(b"%s", whole[0], 1).replace(b"%s", whole[1], 1))
    notes = []
    with Recorder(tmp_path, resumed_at=2, note=notes.append):
        assert lines(tmp_path / name) == [_line(1), _line(2)]
    (note,) = notes
    assert note.startswith(f"{tmp_path / name}: 1 damaged line ")


def test_sync_flushes_both_files_to_the_disk(tmp_path, monkeypatch):
    synced = []
    with Recorder(tmp_path) as recorder:
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
        recorder.sync()
    assert synced == [(tmp_path / name).stat().st_ino for name in ("metrics.jsonl", "log.txt")]


def test_fresh_recorder_in_the_same_folder_starts_empty(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.step(_line(1))
        recorder.epoch({"train_loss": 1.0, "step": 4})
    with Recorder(tmp_path) as recorder:
        assert recorder.past == []
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "log.txt").read_text() == ""


@pytest.mark.parametrize("damaged", [b'{"step": 2, "lo', b"null", b'{"step": "a"}', b"{}", b'{"step": 2, "\xff}'])
def test_damaged_line_is_dropped(tmp_path, damaged):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(_line(1)).encode() + b"\n" + damaged)
    with Recorder(tmp_path, resumed_at=3) as recorder:
        assert recorder.past == [_line(1)]
        recorder.step(_line(3))
    assert lines(tmp_path / "metrics.jsonl") == [_line(1), _line(3)]


def test_files_are_closed_when_a_run_fails(tmp_path):
    try:
        with Recorder(tmp_path) as recorder:
            recorder.step(_line(1))
            raise RuntimeError
    except RuntimeError:
        pass
    assert recorder._metrics.closed
    assert recorder._log.closed


def test_full_disk_at_a_resume_leaves_the_history(tmp_path, monkeypatch):
    """The file was once emptied before it was written again, so a full disk lost the history."""
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.step(_line(step))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Recorder(tmp_path, resumed_at=2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_log_with_a_name_of_the_trainer_is_refused():
    objective = Objective(torch.zeros(()), logs={"lr": torch.zeros(())})
    finding = Finding({"loss": 0.0, "lr": 0.0}, 1.0, None, None)
    with pytest.raises(ValueError, match="'lr'"):
        metrics_line(None, Step(0, 1, 1), objective, finding, 0, Meter())
