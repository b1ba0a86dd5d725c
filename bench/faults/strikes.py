"""Cause the faults in a running run. Each function returns the function that repairs the damage."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.faults.oracle import last_whole, logged
from bench.faults.plan import (
    CLOCK,
    CLOSED,
    DAMAGED,
    DATA,
    FOLDERS,
    FROZEN,
    FULL,
    IMAGES,
    KILLED,
    PAUSED,
    READ_ONLY,
    RECORDS,
    REMOVED,
    SPECIAL,
    STOPPED,
    Fault,
)
from bench.faults.starts import Ranks

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
Repair = Callable[[], None]


def strike(fault: Fault, ranks: Ranks, output: Path, images: Path, clock: Path, pause: float = 0) -> Repair:
    """Cause a fault now. Files stay damaged until the returned function is called.

    ``pause`` is a number of seconds after which the watchdog would end a run.
    """
    if fault.kind == KILLED[0]:
        ranks.kill([fault.rank])
    elif fault.kind == KILLED[1]:
        ranks.kill()
    elif fault.kind in STOPPED:
        ranks.kill([fault.rank], signal.Signals[fault.kind])
    elif fault.kind in DAMAGED:
        ranks.kill()
        ranks.end()
        return damage(fault, output)
    elif fault.kind == FROZEN:
        return _freeze(fault, ranks)
    elif fault.kind == FULL:
        return _fill(fault, output)
    elif fault.kind == READ_ONLY:
        return _read_only(output)
    elif fault.kind == CLOCK:
        return _jump(fault, ranks, output, clock)
    elif fault.kind in (IMAGES, DATA):
        return _lose_images(fault, images)
    elif fault.kind == CLOSED:
        ranks.close_outputs()
    elif fault.kind == PAUSED:
        _pause(ranks, output, pause)
    elif fault.kind == REMOVED:
        output.rename(output.with_name(f"removed-{time.monotonic_ns()}"))
    elif fault.kind in (RECORDS, FOLDERS, SPECIAL):
        ranks.kill()
        ranks.end()
        if fault.kind == RECORDS:
            damage_records(fault, output)
        elif fault.kind == FOLDERS:
            add_folders(output)
        else:
            add_special_files(images)
    else:
        raise ValueError(f"unknown fault: {fault.kind}")
    return _nothing


def damage(fault: Fault, output: Path) -> Repair:
    """Flip a bit of a file of the newest checkpoint or of ``latest``, cut the file, empty it or remove it."""
    folder = output / "checkpoints"
    files = [*sorted((folder / f"step-{last_whole(output):08d}").glob("*")), folder / "latest"]
    files = [file for file in files if file.is_file()]
    if not files:  # no checkpoint yet
        return _nothing
    rng = random.Random(fault.draw)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    original = bytes(content)
    position = rng.randrange(len(content))
    if fault.kind == "flipped bit":
        content[position] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif fault.kind == "lost file":
        file.unlink()
    else:
        file.write_bytes(content[: position if fault.kind == "cut file" else 0])

    def repair() -> None:
        file.write_bytes(original)

    return repair


def damage_records(fault: Fault, output: Path) -> None:
    """Add a line that cannot be read to metrics.jsonl and log.txt. The other lines stay."""
    rng = random.Random(fault.draw)
    damage = rng.choice([b"\0" * 512, b"\x93\x00a8}", b'{"step": 3, "loss\xff": 1', b'{"step": 3}{"step": 4}'])
    for name in ("metrics.jsonl", "log.txt"):
        path = output / name
        lines = path.read_bytes().splitlines() if path.is_file() else []
        lines.insert(len(lines) if damage[0] == 0 else rng.randrange(len(lines) + 1), damage)
        path.write_bytes(b"\n".join(lines) + b"\n")


def add_folders(output: Path) -> None:
    """Add folders among the checkpoints, as a person does: a copy of a checkpoint and notes."""
    folder = output / "checkpoints"
    (folder / "step-notes").mkdir(parents=True, exist_ok=True)
    (folder / "step-notes" / "notes.txt").write_text("mine")
    if step := last_whole(output):
        copy = folder / f"step-{step:08d}-good"
        shutil.copytree(folder / f"step-{step:08d}", copy, dirs_exist_ok=True)


def add_special_files(images: Path) -> None:
    """Add files among the images that must not be opened: a FIFO, and a link to itself."""
    folder = next(path for path in sorted(images.rglob("*")) if path.suffix == ".png").parent
    if not (folder / "zz-pipe.png").exists():
        os.mkfifo(folder / "zz-pipe.png")
        (folder / "zz-loop.png").symlink_to("zz-loop.png")


def _pause(ranks: Ranks, output: Path, seconds: float) -> None:
    """Stop all ranks for longer than the watchdog's limit, continue them, and kill them two steps later."""
    ranks.kill(number=signal.SIGSTOP)
    time.sleep(seconds)
    ranks.kill(number=signal.SIGCONT)
    last = logged(output) + 2
    while ranks.running and logged(output) < last:
        time.sleep(0.01)
    ranks.kill()


def _nothing() -> None:
    pass


def _freeze(fault: Fault, ranks: Ranks) -> Repair:
    """Stop one rank, and continue it after the others have ended."""
    frozen = ranks.processes[fault.rank]
    frozen.send_signal(signal.SIGSTOP)
    for process in ranks.processes:
        if process is not frozen:
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                break
    frozen.send_signal(signal.SIGCONT)
    return _nothing


def _fill(fault: Fault, output: Path) -> Repair:
    """Leave less space than a checkpoint needs, or none, on the output's own file system."""
    ballast = output.parent / "ballast"
    free = shutil.disk_usage(output).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - int(fault.draw * 1e6), 1))
    return ballast.unlink


def _read_only(output: Path) -> Repair:
    """Make the output folder read-only for new files. Open files stay open."""
    for options in (["--bind", str(output), str(output)], ["-o", "remount,bind,ro", str(output)]):
        subprocess.run(["mount", *options], check=True)

    def repair() -> None:
        subprocess.run(["umount", "--lazy", str(output)], check=True)

    return repair


def _jump(fault: Fault, ranks: Ranks, output: Path, clock: Path) -> Repair:
    """Move the wall clock and the files' times by up to ten years in either direction. Then kill all ranks."""
    seconds = int((2 * fault.draw - 1) * 10 * 365 * 86400)
    clock.write_text(f"{seconds:+d}")
    time.sleep(0.2 + fault.delay)
    ranks.kill()
    ranks.end()
    for path in output.rglob("*"):
        moment = time.time() + seconds * random.Random(str(path)).random()
        os.utime(path, (moment, moment))
    return _nothing


def _lose_images(fault: Fault, images: Path) -> Repair:
    """Cut, empty, zero or remove a fifth of the image files, or move the whole folder."""
    aside = images.with_name("aside")
    images.rename(aside)
    if fault.kind == IMAGES:
        shutil.copytree(aside, images, ignore=shutil.ignore_patterns("zz-*"))  # special files cannot be copied
        spoil(images, fault.draw)

    def repair() -> None:
        shutil.rmtree(images, ignore_errors=True)
        aside.rename(images)

    return repair


def spoil(images: Path, draw: float, fraction: float = 0.2) -> None:
    """Damage some image files, each in one of five ways."""
    rng = random.Random(draw)
    files = sorted(path for path in images.rglob("*") if path.is_file())
    for file in rng.sample(files, int(fraction * len(files))):
        content = file.read_bytes()
        way = rng.randrange(5)
        if way in (0, 4):
            file.unlink()
        if way == 4:
            os.mkfifo(file)
        elif way:
            file.write_bytes([b"", content[: len(content) // 2], b"\0" * len(content)][way - 1])
