"""Train over the link of two machines: through each launcher, over a slow link, and with the link cut during the run.

    python -m bench.scale.two_machines            # as root; two network namespaces simulate the machines

The training is DINO's twin on the embedded digits at ZeRO 2 over gloo, with one rank per machine. The final tensors are
compared with two ranks on one machine, to the last bit. The bytes of a step are counted at the veth device, headers
included, and compared with the bytes that `fasttrain plan` predicts per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench.scale.ends import State, ended, same
from bench.scale.machines import Machine, two_machines

_RESULT = RESULTS / "two-machines.json"
_SCRIPT = str(ROOT / "fasttrain/run.py")
_FLAGS = ["--method", "dino", "--entropy", "--recipe", "demo", "--batch_size_per_gpu", "16"]
_RUN = ["--zero_stage", "2", "--log_every", "1", "--knn_every", "0", "--num_workers", "1"]
_STEPS, _EVERY, _CUT_AT = 60, 20, 30
_PORT = 29577
_WATCHDOG = 0.25  # minutes
_RATES: tuple[int | None, ...] = (None, 1000, 100)  # Mbit/s


def torchrun(machines: Sequence[Machine], rank: int) -> list[str]:
    """Return the launcher's words on one of two nodes. The first node is the master."""
    master = ["--master_addr", machines[0].address, "--master_port", str(_PORT)]
    nodes = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
    return [sys.executable, "-m", "torch.distributed.run", *nodes, *master, _SCRIPT]


def deepspeed(machines: Sequence[Machine], rank: int) -> list[str]:
    """Return the launcher's words on one of two nodes, without ssh."""
    hosts = Path(tempfile.gettempdir(), "fasttrain-hostfile")
    hosts.write_text("".join(f"{machine.address} slots=1\n" for machine in machines))
    master = ["--master_addr", machines[0].address, "--master_port", str(_PORT)]
    nodes = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank), "--num_gpus", "1", "--num_nodes", "2"]
    return [str(Path(sys.executable).with_name("deepspeed")), *nodes, *master, _SCRIPT]


LAUNCHERS = {"torchrun": torchrun, "deepspeed --no_ssh": deepspeed}


class Job:
    """A training with one rank on each machine."""

    def __init__(self, machines: Sequence[Machine], output: Path, *more: str, launcher: str = "torchrun") -> None:
        self.output, self.started = output, time.monotonic()
        flags = [*_FLAGS, *_RUN, "--output_dir", str(output), "--saveckp_freq_steps", str(_EVERY), *more]
        self.logs = [output.with_suffix(f".{rank}.log") for rank in range(2)]
        self.ranks = []
        for rank, machine in enumerate(machines):
            command = [*machine.prefix(rank), *LAUNCHERS[launcher](machines, rank), *flags]
            with self.logs[rank].open("w") as log:
                self.ranks.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def until(self, step: int, patience: float = 300) -> None:
        """Wait until a step is logged."""
        limit = time.monotonic() + patience
        while _last_step(self.output) < step:
            if time.monotonic() > limit or any(rank.poll() not in (None, 0) for rank in self.ranks):
                raise SystemExit(f"bench.scale.two_machines: step {step} was not logged: {self.last_lines()}")
            time.sleep(0.02)

    def end(self, patience: float = 300) -> list[int]:
        """Wait for both ranks, and return their exit statuses."""
        return [rank.wait(patience) for rank in self.ranks]

    def last_lines(self) -> list[str]:
        """Return fasttrain's last message on each machine."""
        texts = [log.read_text() for log in self.logs]
        return [next((x for x in reversed(text.splitlines()) if x.startswith("fasttrain:")), "") for text in texts]


def _last_step(output: Path) -> int:
    path = output / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    return int(json.loads(whole.rpartition("\n")[2])["step"]) if whole else 0


def on_one_machine(folder: Path) -> State:
    """Return the end of a run with two ranks on this machine."""
    output = folder / "one"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", _SCRIPT]
    flags = [*_FLAGS, *_RUN, "--saveckp_freq_steps", str(_EVERY), "--output_dir", str(output)]
    subprocess.run([*launch, *flags, "--limit_steps", str(_STEPS)], check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    return ended(output)


def through(launcher: str, machines: Sequence[Machine], folder: Path, expected: State) -> dict[str, Any]:
    """Train a whole run through a launcher."""
    job = Job(machines, folder / launcher.split()[0], "--limit_steps", str(_STEPS), launcher=launcher)
    status = job.end()
    return {"launcher": launcher, "status": status, "equal": same(job.output, expected)}


def short_cut(machines: Sequence[Machine], folder: Path, expected: State) -> dict[str, Any]:
    """Cut the link for some seconds. TCP sends again, and the run continues."""
    job = Job(machines, folder / "short", "--limit_steps", str(_STEPS))
    job.until(_CUT_AT)
    machines[1].cut()
    time.sleep(5)
    last = _last_step(job.output)
    time.sleep(1)
    stood_still = _last_step(job.output) == last
    machines[1].restore()
    status = job.end()
    return {"cut_s": 6, "stood_still": stood_still, "status": status, "equal": same(job.output, expected)}


def long_cut(machines: Sequence[Machine], folder: Path, expected: State) -> dict[str, Any]:
    """Cut the link until the watchdogs end both ranks. Then restore it, and resume with the same command."""
    more = ["--limit_steps", str(_STEPS), "--watchdog_minutes", str(_WATCHDOG)]
    job = Job(machines, folder / "long", *more)
    job.until(_CUT_AT)
    machines[1].cut()
    since = time.monotonic()
    status = job.end()
    seconds, lines = time.monotonic() - since, job.last_lines()
    machines[1].restore()
    again = Job(machines, folder / "long", *more)
    return {
        "watchdog_s": 60 * _WATCHDOG,
        "seconds_to_end": round(seconds, 1),
        "status": status,
        "said": [line.replace(str(folder), "...") for line in lines],
        "resumed_status": again.end(),
        "equal": same(again.output, expected),
    }


def rates(machines: Sequence[Machine], folder: Path) -> list[dict[str, Any]]:
    """Measure seconds and bytes per step over links of several speeds, at ZeRO 0 and 2."""
    rows = []
    for stage in (0, 2):
        planned = _planned(folder, stage)
        for rate in _RATES:
            for machine in machines:
                machine.shape(rate)
            job = Job(machines, folder / f"rate-{stage}-{rate}", "--limit_steps", "80", "--zero_stage", str(stage))
            marks = []
            for step in (20, 40, 60):
                job.until(step)
                marks.append((time.monotonic(), _last_step(job.output), machines[0].sent()))
            job.end()
            pairs = list(pairwise(marks))
            rows.append(
                {
                    "zero_stage": stage,
                    "megabits": rate,
                    "step_s": statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs),
                    "bytes_on_the_wire": (marks[-1][2] - marks[0][2]) / (marks[-1][1] - marks[0][1]),
                    "bytes_planned": planned,
                }
            )
        for machine in machines:
            machine.shape(None)
    return rows


def _planned(folder: Path, stage: int) -> float:
    """Return the planned bytes that one of two ranks sends per step: reduced bytes and half of the others."""
    path = folder / f"plan-{stage}.json"
    flags = ["--nodes", "2", "--gpus_per_node", "1", "--precision", "fp32", "--images", "4000", "--output", str(path)]
    command = "import sys; from fasttrain.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["plan", *_FLAGS, "--zero_stage", str(stage), *flags]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    sent = json.loads(path.read_text())["stages"][stage]["sent"]
    return sum(one["bytes"] * (1 if one["kind"] == "all_reduce" else 0.5) for one in sent)


def main() -> None:
    """Run the selected parts, and add their results to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("equal", "cut", "rates"), default=["equal", "cut", "rates"])
    only = parser.parse_args().only
    results = json.loads(_RESULT.read_text()) if _RESULT.is_file() else {}
    results |= {"cores": os.cpu_count(), "method": "dino+er", "steps": _STEPS}
    with tempfile.TemporaryDirectory() as name, two_machines() as machines:
        folder = Path(name)
        expected = on_one_machine(folder) if {"equal", "cut"} & set(only) else {}
        if "equal" in only:
            results["launchers"] = [through(launcher, machines, folder, expected) for launcher in LAUNCHERS]
        if "cut" in only:
            results["short_cut"] = short_cut(machines, folder, expected)
            results["long_cut"] = long_cut(machines, folder, expected)
        if "rates" in only:
            results["rates"] = rates(machines, folder)
    _RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
