"""Run one trial: a run meets a fault, resumes, meets the next fault, and must end like a run without faults."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.faults.oracle import broken, last_whole, logged, same_history, same_weights, under_way
from bench.faults.plan import (
    CLOSED,
    DAMAGED,
    DATA,
    EVERY,
    FOLDERS,
    FROZEN,
    FULL,
    IMAGES,
    KILLED,
    READ_ONLY,
    RECORDS,
    REMOVED,
    SETTINGS,
    STEPS,
    STOPPED,
    Fault,
    Setting,
    Trial,
)
from bench.faults.starts import Ranks
from bench.faults.strikes import FAKETIME, spoil, strike

Row = dict[str, Any]
_BATCH = 16
_LONG = 1800
"""Seconds for a start without a fault. On a busy core a start takes minutes."""
_STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129}
_STAYS = (FULL, READ_ONLY, IMAGES, DATA)
"""Faults that may still exist at the next start, which must then report them again."""


class Course:
    """A run's folder, its images, and its starts."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.setting, self.folder = setting, folder
        self.output, self.images, self.clock = folder / "disk" / "run", folder / "images", folder / "clock"
        (folder / "disk").mkdir(parents=True)
        self.starts = self.base = 0
        self.damaged: set[int] = set()
        self.own: set[str] = set()
        """Folders of a person among the checkpoints, which must stay."""
        if setting.images:
            write_images(self.images)
        if setting.images == "some dead":
            spoil(self.images, draw=0, fraction=0.05)

    @property
    def flags(self) -> list[str]:
        """Return the command's flags."""
        s = self.setting
        flags = f"--batch_size_per_gpu {_BATCH // s.ranks} --epochs 6 --limit_steps {STEPS} --log_every 1 --knn_every 0"
        flags += f" --saveckp_freq_steps {EVERY} --keep 3"
        flags += f" --watchdog_minutes {s.watchdog_minutes}"
        if s.images:
            flags += f" --recipe cifar --data_path {self.images}"
        if s.images == "good":
            flags += " --max_bad_fraction 0"
        return [*s.flags, *flags.split(), "--output_dir", str(self.output)]

    def start(self) -> Ranks:
        """Start the command again."""
        self.starts += 1
        environment = {}
        if self.setting.faked_clock:
            if not self.clock.exists():
                self.clock.write_text("+0")
            environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.clock)}
            environment |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        logs = self.folder / f"start-{self.starts}"
        return Ranks(self.flags, self.setting.ranks, logs, environment, piped=self.setting.piped)

    def finish(self) -> tuple[list[int | None], Ranks]:
        """Run the command to its end, and return its statuses."""
        ranks = self.start()
        return ranks.end(_LONG)[0], ranks


def run_trial(trial: Trial, baseline: Path, folder: Path) -> list[Row]:
    """Return a row per fault that occurred. ``baseline`` is the output of the same run without faults."""
    setting = SETTINGS[trial.setting]
    course = Course(setting, folder)
    if setting.in_memory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder / "disk")], check=True)
    rows: list[Row] = []
    try:
        for fault in trial.faults:
            if not (row := _meet(course, fault, rows[-1:])):
                break
            what = {"trial": trial.number, "seed": trial.seed, "setting": setting.name, "ranks": setting.ranks}
            rows.append(what | {"flags": " ".join(course.flags[:-2])} | row)
        _end(course, rows, baseline)
    finally:
        if setting.in_memory:
            subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)
    return rows


def _end(course: Course, rows: list[Row], baseline: Path) -> None:
    """Finish the run, and compare it with the run without faults."""
    statuses, ranks = _resume(course, rows[-1:], lambda ranks: (ranks.end(_LONG)[0], ranks))
    lost = sorted(course.own - folders(course.output))
    finished = set(statuses) == {0}
    equal = finished and same_weights(course.output, baseline)
    history = finished and same_history(course.output, baseline)
    for row in rows:
        row |= {"finished": finished, "equal": equal, "same_history": history}
        row["wrong"] += [] if finished else [f"the last start ended with {statuses}: {ranks.errors()[-1:]}"]
        row["wrong"] += [] if equal or not finished else ["the final weights differ"]
        row["wrong"] += [f"{name} was removed" for name in lost]
        row["wrong"] += [] if history or not finished else ["metrics.jsonl or log.txt differ"]
        row["ok"] = not row["wrong"]


def _meet(course: Course, fault: Fault, before: list[Row]) -> Row | None:
    """Resume, cause a fault, and judge the end. Return None if the run ended before the moment of the fault."""

    def until_fault(ranks: Ranks) -> Ranks | None:
        return ranks if _await(course, ranks, fault) else None

    ranks = _resume(course, before, until_fault)
    if ranks is None:
        return None
    step = logged(course.output)
    pause = course.setting.watchdog_minutes * 60 + 2
    repair = strike(fault, ranks, course.output, course.images, course.clock, pause)
    saving = under_way(course.output)
    statuses, seconds = ranks.end(_LONG if fault.kind == CLOSED else 120)
    saving = saving or under_way(course.output)
    said = ranks.errors()
    if fault.kind in (IMAGES, DATA) and set(statuses) == {0} and logged(course.output) == STEPS:
        repair()  # the run had read its last images before
        return None
    course.own = folders(course.output) if fault.kind in (FOLDERS, REMOVED) else course.own
    step = step if fault.kind == REMOVED else logged(course.output)
    row: Row = {"fault": fault.kind, "moment": {"step": step, "saving": saving}}
    row["moment"] |= {"asked": fault.step, "delay": fault.delay, "rank": fault.rank, "draw": fault.draw}
    row |= {"statuses": statuses, "said": _lines_of_ours(said), "seconds_to_end": round(seconds, 1)}
    row["wrong"] = wrong_end(fault.kind, statuses, said)
    if fault.kind in _STAYS and fault.draw >= 0.5:
        statuses_again, repeated = course.finish()
        row["again"] = {"statuses": statuses_again, "said": _lines_of_ours(repeated.errors())}
        row["wrong"] += wrong_end(fault.kind, statuses_again, repeated.errors())
    if fault.kind in DAMAGED:
        course.damaged |= broken(course.output)
        row["repair"] = repair
    else:
        repair()
        row["wrong"] += [f"checkpoint {step} is not whole" for step in sorted(broken(course.output) - course.damaged)]
    row["due"] = due(fault.kind, row["moment"]["step"], course.base)
    return row


def _resume(course: Course, before: list[Row], then: Callable[[Ranks], Any]) -> Any:
    """Start again, call ``then``, and complete the row of the fault before.

    A start without a whole checkpoint ends with an error. It is repeated after the checkpoint is repaired.
    """
    expected = last_whole(course.output)
    ranks = course.start()
    result = then(ranks)
    for row in before:
        if "resumed_from" in row:  # the run ended before its next fault
            continue
        repair = row.pop("repair", None)
        if ranks.resumed() is None and repair and not ranks.running:
            statuses, said = ranks.end()[0], ranks.errors()
            row["refused"] = _lines_of_ours(said)
            row["wrong"] += wrong_end(FULL, statuses, said)
            row["wrong"] += [f"refused, but checkpoint {expected} is whole"] if expected else []
            repair()
            course.damaged.clear()
            return _resume(course, before, then)
        if row["fault"] == CLOSED:  # the run was not ended
            row["resumed_from"], row["steps_lost"] = None, 0
            continue
        row["resumed_from"], row["steps_lost"] = ranks.resumed(), None
        if ranks.resumed() is None:
            row["wrong"].append(f"the next start ended: {ranks.errors()[-1:]}")
            continue
        row["steps_lost"] = row["moment"]["step"] - row["resumed_from"]
        row["wrong"] += wrong_resume(row, expected)
        if row["fault"] == RECORDS and row["resumed_from"] and ranks.output().count(" damaged line") != 2:
            row["wrong"].append("the damaged lines were not reported")
    course.base = ranks.resumed() or 0
    return result


def wrong_end(kind: str, statuses: list[int | None], said: list[str]) -> list[str]:
    """Return the errors in the end of a run after a fault, from its statuses by rank and its lines on stderr."""
    ours = _lines_of_ours(said)
    wrong = ["a rank did not end"] if None in statuses else []
    if any(line.startswith("Traceback") for line in said):
        wrong.append("a traceback was printed")
    ended = [status for status in statuses if status != -9]  # ranks that were not killed from outside
    if kind in (KILLED[0], FROZEN):
        most = len(statuses) if kind == FROZEN else 1  # a frozen rank does not learn that the others ended
        if 0 in ended or (ended and not 1 <= len(ours) <= most):
            wrong.append(f"the other ranks ended with {ended} and {len(ours)} lines")
    elif kind == CLOSED:
        if set(statuses) != {0} or ours:
            wrong.append(f"ended with {statuses} and {len(ours)} lines")
    elif kind in _STATUS or kind in _STAYS or kind == REMOVED:
        expected = _STATUS.get(kind, 2)
        if set(statuses) != {expected} or len(ours) != 1:
            wrong.append(f"ended with {statuses} and {len(ours)} lines instead of {expected} and one")
    elif ended:
        wrong.append(f"ended with {statuses}, killed")
    return wrong


def due(kind: str, step: int, base: int) -> int | None:
    """Return the step of the checkpoint that must exist after a fault, for a run that resumed from step ``base``.

    The newest checkpoint before ``step`` may have been incomplete, because it is written while the training continues.
    Return None if the fault damages checkpoints.
    """
    if kind in DAMAGED or kind == REMOVED:
        return None
    return step if kind in STOPPED else max(base, ((step - 1) // EVERY - 1) * EVERY)


def wrong_resume(row: Row, expected: int) -> list[str]:
    """Return the errors in the step from which a run resumed."""
    step = row["resumed_from"]
    wrong = [] if step == expected else [f"resumed from step {step} instead of {expected}"]
    if row["due"] is not None and step < row["due"]:
        wrong.append(f"resumed from step {step}, but step {row['due']} must exist")
    return wrong


def _await(course: Course, ranks: Ranks, fault: Fault) -> bool:
    """Wait for the moment of a fault. Return False if the run ended before."""
    if fault.step:
        target = max(fault.step, logged(course.output) + 1)
        while ranks.running and logged(course.output) < target:
            time.sleep(0.004)
        while fault.saving and ranks.running and not under_way(course.output):
            time.sleep(0.0005)
    time.sleep(fault.delay)
    return ranks.running


def _lines_of_ours(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("fasttrain: ")]


def folders(output: Path) -> set[str]:
    """Return the names of the folders of a person among the checkpoints."""
    paths = [*(output / "checkpoints").glob("step-*-good"), *(output / "checkpoints").glob("step-notes")]
    return {path.name for path in paths if any(path.iterdir())}


def write_images(folder: Path) -> None:
    """Write 160 training and 32 held-out images of noise, 32 x 32 pixels, in two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("val", 32)):
        for i in range(count):
            path = folder / split / ("cat", "dog")[i % 2] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
