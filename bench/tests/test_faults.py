"""The fault campaign's own logic: what it draws, how it damages, and that its oracle sees what is wrong."""

import json
import zlib
from dataclasses import replace

import pytest
import torch

from bench.faults import campaign, course, oracle, strikes
from bench.faults.plan import DAMAGED, EVERY, FROZEN, FULL, KILLED, ON_TIME, SETTINGS, STEPS, Fault, plan

FAULT = Fault("lost file", 3, False, 0.0, 0, 0.5)


def _publish(output, step, value=0.0, latest=True):
    """A checkpoint of one tensor."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    torch.save({"module": {"w": torch.full((300,), value)}}, folder / "a.pt")
    content = (folder / "a.pt").read_bytes()
    card = {"step": step, "files": {"a.pt": [len(content), f"{zlib.crc32(content):08x}"]}}
    card["crc32"] = f"{zlib.crc32(json.dumps(card, sort_keys=True).encode()):08x}"
    (folder / "fasttrain.json").write_text(json.dumps(card))
    if latest:
        (output / "checkpoints" / "latest").write_text(folder.name)
    return folder


def test_a_plan_is_a_function_of_its_seed_and_grows_at_its_end():
    assert plan(3, 5) == plan(3, 20)[:5]
    assert plan(3, 5) != plan(4, 5)
    assert {trial.setting for trial in plan(0, len(SETTINGS))} == SETTINGS.keys()


def test_faults_fit_their_runs():
    drawn = [(fault, SETTINGS[trial.setting]) for trial in plan(0, 200) for fault in trial.faults]
    for fault, setting in drawn:
        assert fault.kind in (setting.kinds if fault.step else KILLED)
        assert fault.rank < setting.ranks
        assert fault.step < STEPS - EVERY
        assert not fault.saving or fault.kind in ON_TIME
    assert any(fault.step == 0 for fault, _ in drawn)
    assert {fault.kind for fault, _ in drawn} == {kind for setting in SETTINGS.values() for kind in setting.kinds}
    assert 0.2 < sum(fault.saving for fault, _ in drawn) / len(drawn) < 0.5


@pytest.mark.parametrize("kind", DAMAGED)
def test_every_damage_is_seen_and_mended(tmp_path, kind):
    folder = _publish(tmp_path, 5)
    files = [folder / "a.pt", folder / "fasttrain.json", tmp_path / "checkpoints" / "latest"]
    before = [file.read_bytes() for file in files]
    struck = set()
    for draw in range(20):
        mend = strikes.damage(replace(FAULT, kind=kind, draw=draw / 20), tmp_path)
        changed = [f.name for f, old in zip(files, before, strict=True) if not f.is_file() or f.read_bytes() != old]
        assert len(changed) == 1
        struck |= set(changed)
        if changed == ["a.pt"]:
            assert not oracle.whole(folder)
            assert oracle.last_whole(tmp_path) == 0
        mend()
        assert [file.read_bytes() for file in files] == before
        assert oracle.last_whole(tmp_path) == 5
    assert struck == {"a.pt", "fasttrain.json", "latest"}


def test_the_last_whole_checkpoint_is_what_latest_names_or_the_newest_whole_one_before(tmp_path):
    assert oracle.last_whole(tmp_path) == 0
    for step in (5, 10, 15):
        _publish(tmp_path, step, latest=step < 15)  # killed before latest was written
    assert oracle.last_whole(tmp_path) == 10
    (tmp_path / "checkpoints" / "step-00000010" / "a.pt").write_bytes(b"")
    assert oracle.last_whole(tmp_path) == 5
    for content in ("", "step-00000007", "no text \0"):
        (tmp_path / "checkpoints" / "latest").write_text(content)
        assert oracle.last_whole(tmp_path) == 15
    card = tmp_path / "checkpoints" / "step-00000015" / "fasttrain.json"
    card.write_text(card.read_text().replace('"step": 15', '"step": 14'))
    assert oracle.last_whole(tmp_path) == 5


def test_weights_are_the_same_only_to_the_last_bit(tmp_path):
    _publish(tmp_path / "one", 5, float("nan"))
    _publish(tmp_path / "same", 5, float("nan"))
    _publish(tmp_path / "zero", 5, 0.0)
    _publish(tmp_path / "minus", 5, -0.0)
    assert oracle.same_weights(tmp_path / "one", tmp_path / "same")
    assert not oracle.same_weights(tmp_path / "zero", tmp_path / "minus")
    assert not oracle.same_weights(tmp_path / "nothing", tmp_path / "nothing")


def test_histories_are_the_same_but_for_times_and_a_cut_last_line(tmp_path):
    for name, speed, more in (("one", 1, ""), ("other", 2, '{"step": 2, "lo')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.txt").write_text("")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "images_per_s": speed}) + "\n" + more)
    assert oracle.same_history(tmp_path / "one", tmp_path / "other")
    assert oracle.logged(tmp_path / "other") == 1
    (tmp_path / "other" / "log.txt").write_text('{"epoch": 0}\n')
    assert not oracle.same_history(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "statuses", "said", "right"),
    [
        (KILLED[1], [-9, -9], [], True),
        (KILLED[1], [-9, 1], ["fasttrain: x"], False),
        (KILLED[0], [-9, 1], ["fasttrain: rank 1 failed"], True),
        (KILLED[0], [-9, 0], [], False),
        (KILLED[0], [-9, None], [], False),
        (KILLED[0], [-9, 1], ["Traceback (most recent call last):", "fasttrain: x"], False),
        (FROZEN, [1, 1], ["fasttrain: rank 0 finished no step", "fasttrain: rank 1 failed"], True),
        (FROZEN, [1, 1], ["fasttrain: rank 0 finished no step"] * 3, False),
        ("SIGTERM", [143, 143], ["fasttrain: stopped"], True),
        ("SIGTERM", [143, 1], ["fasttrain: stopped"], False),
        (FULL, [2], ["fasttrain: make room"], True),
        (FULL, [2], ["fasttrain: make room", "fasttrain: make room"], False),
        (FULL, [0], [], False),
    ],
)
def test_an_end_is_judged_by_statuses_and_lines(kind, statuses, said, right):
    assert (course.wrong_end(kind, statuses, said) == []) is right


@pytest.mark.parametrize(
    ("kind", "step", "base", "expected"),
    [
        (KILLED[1], 12, 5, 10),
        (KILLED[1], 10, 5, 5),
        (KILLED[1], 4, 0, 0),
        (KILLED[1], 14, 13, 13),
        ("SIGTERM", 7, 5, 7),
    ],
)
def test_the_checkpoint_that_must_be_there(kind, step, base, expected):
    assert course.due(kind, step, base) == expected


def test_going_on_from_elsewhere_is_seen():
    row = {"resumed_from": 5, "due": 10}
    assert course.wrong_resume(row, 5) == ["went on from step 5, but step 10 was to be kept"]
    assert len(course.wrong_resume(row | {"resumed_from": 7}, 5)) == 2
    assert course.wrong_resume(row | {"resumed_from": 10}, 10) == []


def test_spoilt_images_are_the_same_for_the_same_draw(tmp_path):
    def content(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}

    for name in ("one", "other", "whole"):
        course.write_images(tmp_path / name)
        if name != "whole":
            strikes.spoil(tmp_path / name, draw=0, fraction=0.1)
    ours, theirs, whole = (content(tmp_path / name) for name in ("one", "other", "whole"))
    assert ours == theirs
    assert sum(ours.get(name) != content for name, content in whole.items()) == int(0.1 * (160 + 32)) > 0


def _row(trial):
    what = {"trial": trial.number, "seed": trial.seed, "fault": KILLED[1], "moment": {"saving": True}}
    return what | {"steps_lost": 2, "equal": True, "ok": True, "wrong": []}


def test_what_is_done_is_not_done_again_and_the_table_counts(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(campaign, "baseline", lambda setting: tmp_path)
    monkeypatch.setattr(campaign, "run_trial", lambda trial, *_: made.append(trial.number) or [_row(trial)] * 2)
    path = tmp_path / "results" / "faults.json"
    campaign.run_all(plan(0, 2), path)
    campaign.run_all(plan(0, 3), path)
    assert made == [0, 1, 2]
    rows = campaign.read(path)
    assert len(rows) == 6
    rows[0] |= {"ok": False, "refused": []}
    last = campaign.table(rows).splitlines()[-1]
    assert last.startswith("| **all** | 6 | 6 | 1 | ")
    assert last.endswith(" | 5 |")
