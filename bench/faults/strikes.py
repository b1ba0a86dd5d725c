"""The faults themselves. Each strikes a run that is under way and returns what mends it again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.faults.oracle import last_whole
from bench.faults.plan import CLOCK, DAMAGED, DATA, FROZEN, FULL, IMAGES, KILLED, READ_ONLY, STOPPED, Fault
from bench.faults.starts import Ranks

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
Mend = Callable[[], None]


def strike(fault: Fault, ranks: Ranks, output: Path, images: Path, clock: Path) -> Mend:
    """Let a fault happen now. What it damages in files stays damaged until the mend is called."""
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
    else:
        raise ValueError(f"no such fault: {fault.kind}")
    return _nothing


def damage(fault: Fault, output: Path) -> Mend:
    """Flip a bit of a file, cut it short, empty it or remove it: one of the newest checkpoint's, or ``latest``."""
    folder = output / "checkpoints"
    files = [*sorted((folder / f"step-{last_whole(output):08d}").glob("*")), folder / "latest"]
    files = [file for file in files if file.is_file()]
    if not files:  # no checkpoint yet
        return _nothing
    rng = random.Random(fault.draw)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    kept = bytes(content)
    position = rng.randrange(len(content))
    if fault.kind == "flipped bit":
        content[position] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif fault.kind == "lost file":
        file.unlink()
    else:
        file.write_bytes(content[: position if fault.kind == "cut file" else 0])

    def mend() -> None:
        file.write_bytes(kept)

    return mend


def _nothing() -> None:
    pass


def _freeze(fault: Fault, ranks: Ranks) -> Mend:
    """One rank stands still, and comes back once the others are gone."""
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


def _fill(fault: Fault, output: Path) -> Mend:
    """Leave less room than a checkpoint takes, maybe none, on the output's own file system."""
    ballast = output.parent / "ballast"
    free = shutil.disk_usage(output).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - int(fault.draw * 1e6), 1))
    return ballast.unlink


def _read_only(output: Path) -> Mend:
    """Nothing new can be made in the output folder; files that are open stay so."""
    for options in (["--bind", str(output), str(output)], ["-o", "remount,bind,ro", str(output)]):
        subprocess.run(["mount", *options], check=True)

    def mend() -> None:
        subprocess.run(["umount", "--lazy", str(output)], check=True)

    return mend


def _jump(fault: Fault, ranks: Ranks, output: Path, clock: Path) -> Mend:
    """The wall clock jumps by up to ten years, either way, and so do the files' times; soon after all are killed."""
    seconds = int((2 * fault.draw - 1) * 10 * 365 * 86400)
    clock.write_text(f"{seconds:+d}")
    time.sleep(0.2 + fault.delay)
    ranks.kill()
    ranks.end()
    for path in output.rglob("*"):
        moment = time.time() + seconds * random.Random(str(path)).random()
        os.utime(path, (moment, moment))
    return _nothing


def _lose_images(fault: Fault, images: Path) -> Mend:
    """A fifth of the image files is cut short, emptied, garbled or gone, or all of the folder is."""
    aside = images.with_name("aside")
    if fault.kind == DATA:
        images.rename(aside)
    else:
        shutil.copytree(images, aside)
        spoil(images, fault.draw)

    def mend() -> None:
        shutil.rmtree(images, ignore_errors=True)
        aside.rename(images)

    return mend


def spoil(images: Path, draw: float, fraction: float = 0.2) -> None:
    """Make some image files bad, each in one of four ways."""
    rng = random.Random(draw)
    files = sorted(path for path in images.rglob("*") if path.is_file())
    for file in rng.sample(files, int(fraction * len(files))):
        content = file.read_bytes()
        way = rng.randrange(4)
        if way == 0:
            file.unlink()
        else:
            file.write_bytes([b"", content[: len(content) // 2], b"\0" * len(content)][way - 1])
