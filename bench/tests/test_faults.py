"""Test the fault campaign: its plan, its damages, and that its oracle sees errors."""

import json
import zlib
from dataclasses import replace

import pytest
import torch

from bench.faults import campaign, course, oracle, strikes
from bench.faults.plan import (
    CLOSED,
    DAMAGED,
    EVERY,
    FROZEN,
    FULL,
    KILLED,
    ON_TIME,
    PAUSED,
    REMOVED,
    SETTINGS,
    STEPS,
    Fault,
    plan,
)
from fasttrain.files import difference, fingerprint

FAULT = Fault("lost file", 3, False, 0.0, 0, 0.5)


def _publish(output, step, value=0.0, latest=True):
    """Write a checkpoint of one tensor."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    torch.save({"module": {"w": torch.full((300,), value)}}, folder / "a.pt")
    card = {"step": step, "files": {"a.pt": fingerprint(folder / "a.pt")._asdict()}}
    card["crc32"] = f"{zlib.crc32(json.dumps(card, sort_keys=True).encode()):08x}"
    (folder / "fasttrain.json").write_text(json.dumps(card))
    if latest:
        (output / "checkpoints" / "latest").write_text(folder.name)
    return folder


def test_plan_depends_on_its_seed_and_fits_the_runs():
    assert plan(3, 5) == plan(3, 20)[:5]
    assert plan(3, 5) != plan(4, 5)
    faults = [(fault, SETTINGS[trial.setting]) for trial in plan(0, 200) for fault in trial.faults]
    for fault, setting in faults:
        assert fault.kind in (setting.kinds if fault.step else KILLED)
        assert fault.rank < setting.ranks
        assert fault.step < STEPS - EVERY
        assert not fault.saving or fault.kind in ON_TIME
    assert any(fault.step == 0 for fault, _ in faults)
    assert {fault.kind for fault, _ in faults} == {kind for setting in SETTINGS.values() for kind in setting.kinds}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_seen_and_repaired(tmp_path, kind):
    folder = _publish(tmp_path, 5)
    files = [folder / "a.pt", folder / "fasttrain.json", tmp_path / "checkpoints" / "latest"]
    before = [file.read_bytes() for file in files]
    original = fingerprint(folder / "a.pt")  # a flipped bit of the padding is no damage
    damaged = set()
    for draw in range(20):
        repair = strikes.damage(replace(FAULT, kind=kind, draw=draw / 20), tmp_path)
        changed = [f.name for f, old in zip(files, before, strict=True) if not f.is_file() or f.read_bytes() != old]
        assert len(changed) == 1
        damaged |= set(changed)
        padding = changed == ["a.pt"] and kind == "flipped bit" and not difference(folder / "a.pt", original)
        assert oracle.last_whole(tmp_path) == (5 if changed == ["latest"] or padding else 0)
        repair()
        assert [file.read_bytes() for file in files] == before
    assert damaged == {"a.pt", "fasttrain.json", "latest"}


def test_last_whole_is_latest_or_the_newest_before_it(tmp_path):
    assert oracle.last_whole(tmp_path) == 0
    for step in (5, 10, 15):
        _publish(tmp_path, step, latest=step < 15)  # killed before latest was written
    assert oracle.last_whole(tmp_path) == 10
    (tmp_path / "checkpoints" / "step-00000010" / "a.pt").write_bytes(b"")
    assert oracle.last_whole(tmp_path) == 5
    for content in ("", "step-00000007", "no text \0"):
        (tmp_path / "checkpoints" / "latest").write_text(content)
        assert oracle.last_whole(tmp_path) == 15


def test_runs_are_compared_to_the_last_bit_but_for_times(tmp_path):
    """A last line that was cut does not count."""
    lines = [json.dumps({"step": 1, "images_per_s": speed}) + "\n" for speed in (1, 2)]
    runs = {"one": (float("nan"), lines[0]), "same": (float("nan"), lines[1] + '{"step": 2, "lo'), "zero": (0.0, "")}
    for name, (value, text) in {**runs, "minus": (-0.0, "")}.items():
        _publish(tmp_path / name, 5, value)
        (tmp_path / name / "log.txt").write_text("")
        (tmp_path / name / "metrics.jsonl").write_text(text)
    for compare in (oracle.same_weights, oracle.same_history):
        assert compare(tmp_path / "one", tmp_path / "same")
        assert not compare(tmp_path / "zero", tmp_path / "minus")
        assert not compare(tmp_path / "nothing", tmp_path / "nothing")
    assert oracle.logged(tmp_path / "same") == 1
    (tmp_path / "same" / "log.txt").write_text('{"epoch": 0}\n')
    assert not oracle.same_history(tmp_path / "one", tmp_path / "same")


@pytest.mark.parametrize(
    ("kind", "statuses", "lines", "right"),
    [
        (KILLED[1], [-9, -9], [], True),
        (KILLED[0], [-9, 1], ["fasttrain: rank 1 failed"], True),
        (KILLED[0], [-9, 0], [], False),
        (KILLED[0], [-9, 1], ["Traceback (most recent call last):", "fasttrain: x"], False),
        (FROZEN, [1, 1], ["fasttrain: rank 0 finished no step", "fasttrain: rank 1 failed"], True),
        (FROZEN, [1, 1], ["fasttrain: rank 0 finished no step"] * 3, False),
        ("SIGTERM", [143, 143], ["fasttrain: stopped"], True),
        (FULL, [2], ["fasttrain: make room"], True),
        (FULL, [2], ["fasttrain: make room", "fasttrain: make room"], False),
        (REMOVED, [2, 2], ["fasttrain: removed"], True),
        (REMOVED, [1], ["fasttrain: rank 0 failed"], False),
        (CLOSED, [0, 0], [], True),
        (CLOSED, [1, 0], [], False),
        (PAUSED, [-9], [], True),
        (PAUSED, [1], ["fasttrain: rank 0 finished no step"], False),
    ],
)
def test_end_is_judged_by_statuses_and_lines(kind, statuses, lines, right):
    assert (course.wrong_end(kind, statuses, lines) == []) is right


def test_resume_from_a_wrong_step_is_an_error():
    """A run must resume from the newest whole checkpoint, and that checkpoint must not be too old."""
    due = [course.due(kind, *s) for kind, *s in ((KILLED[1], 12, 5), (KILLED[1], 14, 13), ("SIGTERM", 7, 5))]
    assert due == [5, 13, 7]  # a kill may hit the checkpoint of step 10, which is written during later steps
    errors = [course.wrong_resume({"resumed_from": step, "due": 10}, last) for step, last in ((10, 10), (5, 5), (7, 5))]
    assert [len(lines) for lines in errors] == [0, 1, 2]


@pytest.mark.parametrize("draw", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_damaged_records_keep_every_whole_line(tmp_path, draw):
    for name in ("metrics.jsonl", "log.txt"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    strikes.damage_records(replace(FAULT, draw=draw), tmp_path)
    assert oracle._lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 4


def test_a_lost_folder_of_a_person_is_seen(tmp_path):
    _publish(tmp_path, 5)
    strikes.add_folders(tmp_path)
    assert course.folders(tmp_path) == {"step-00000005-good", "step-notes"}
    assert oracle.checkpoints(tmp_path) == {5: True}
    (tmp_path / "checkpoints" / "step-notes" / "notes.txt").unlink()
    assert course.folders(tmp_path) == {"step-00000005-good"}


def test_damaged_images_are_a_function_of_the_draw(tmp_path):
    contents = []
    for name, fraction in (("one", 0.1), ("other", 0.1), ("whole", 0)):
        course.write_images(tmp_path / name)
        strikes.spoil(tmp_path / name, draw=0, fraction=fraction)
        files = [path for path in tmp_path.glob(f"{name}/*/*/*.png") if path.is_file()]  # no FIFO
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    one, other, whole = contents
    assert one == other
    assert sum(one.get(name) != content for name, content in whole.items()) == int(0.1 * (160 + 32))


def test_run_all_skips_trials_and_the_table_counts(tmp_path, monkeypatch):
    def run_trial(trial, *_):
        numbers.append(trial.number)
        row = {"trial": trial.number, "seed": trial.seed, "fault": KILLED[1], "moment": {"saving": True}}
        return [row | {"steps_lost": 2, "equal": True, "ok": True, "wrong": []}] * 2

    numbers = []
    monkeypatch.setattr(campaign, "baseline", lambda setting: tmp_path)
    monkeypatch.setattr(campaign, "run_trial", run_trial)
    path = tmp_path / "results" / "faults.json"
    campaign.run_all(plan(0, 2), path)
    campaign.run_all(plan(0, 3), path)
    assert numbers == [0, 1, 2]
    rows = campaign.read(path)
    assert len(rows) == 6
    rows[0] |= {"ok": False, "refused": []}
    assert campaign.table(rows).splitlines()[-1] == "| **all** | 6 | 6 | 1 | 2 (2) | 5 |"
