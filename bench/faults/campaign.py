"""Cause faults at random moments in small runs of the real command, and check that they resume and end the same.

python -m bench.faults.campaign            # 45 runs with 4 faults each; resumes an interrupted campaign
python -m bench.faults.campaign --show     # print the table of the results

``python -m bench.tables`` writes the table into docs/reliability.md. The campaign needs Linux, ``unshare`` and
``mount`` for a full or read-only disk in a mount namespace of its own, and ``apt-get install faketime`` for the clock
jump.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

from bench import RESULTS, ROOT
from bench.faults.course import Course, run_trial
from bench.faults.plan import SETTINGS, Setting, Trial, plan
from bench.faults.strikes import FAKETIME

_RESULT = RESULTS / "faults.json"
_NAMESPACE = "FASTTRAIN_FAULTS_NAMESPACE"
Row = dict[str, Any]


def main() -> None:
    """Run the missing trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at the same time")
    parser.add_argument("--show", action="store_true", help="print the results; run nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, lambda *_: None)  # under nohup the runs would inherit that it is ignored
    if not options.show:
        _in_own_namespace()
        if not FAKETIME.is_file():
            raise SystemExit(f"{FAKETIME}: is missing. Type: apt-get install faketime")
        run_all(plan(options.seed, options.trials), _RESULT, options.jobs)
    rows = read(_RESULT)
    print(table(rows))
    for row in rows:
        if not row["ok"]:
            print(f"trial {row['trial']}, {row['setting']}, {row['fault']}: {'; '.join(row['wrong'])}")


def run_all(trials: Sequence[Trial], path: Path, jobs: int = 1) -> None:
    """Run the trials that ``path`` lacks, ``jobs`` at a time, and write it after each trial."""
    done = {(row["trial"], row["seed"]) for row in read(path)}
    missing = [trial for trial in trials if (trial.number, trial.seed) not in done]
    with ThreadPoolExecutor(jobs) as pool, tempfile.TemporaryDirectory(prefix="fasttrain-faults-") as work:
        settings = [SETTINGS[name] for name in dict.fromkeys(trial.setting for trial in missing)]
        baselines = {setting.name: pool.submit(baseline, setting) for setting in settings}

        def make(trial: Trial) -> tuple[Trial, list[Row]]:
            return trial, run_trial(trial, baselines[trial.setting].result(), Path(work, str(trial.number)))

        for future in as_completed([pool.submit(make, trial) for trial in missing]):
            trial, trial_rows = future.result()
            print(f"trial {trial.number}, {trial.setting}", flush=True)
            for row in trial_rows:
                print(f"    {row['fault']}: {'ok' if row['ok'] else row['wrong']}", flush=True)
            rows = [*read(path), *({"commit": commit(), **row} for row in trial_rows)]
            write(path, sorted(rows, key=lambda row: (row["seed"], row["trial"])))


def baseline(setting: Setting) -> Path:
    """Return the output of a setting's run without faults. It is made once per machine and commit of the trainer."""
    folder = Path(tempfile.gettempdir(), "fasttrain-faults-baselines", commit(), setting.name.replace(" ", "-"))
    if not (folder / "disk" / "run" / "summary.json").is_file():
        statuses, ranks = Course(setting, folder).finish()
        if set(statuses) != {0}:
            raise SystemExit(f"{setting.name}: the run without faults ended with {statuses}: {ranks.errors()[-1:]}")
    return folder / "disk" / "run"


def read(path: Path) -> list[Row]:
    """Return the rows of the result file, or none if the file is missing."""
    rows: list[Row] = json.loads(path.read_text())["faults"] if path.is_file() else []
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Replace the result file atomically."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"faults": rows}, indent=1) + "\n")
    part.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Return a table with a line per kind of fault, and a line for all."""
    head = "fault | times | during a save | refused once | steps lost, median (most) | ended the same to the last bit"
    lines = [f"| {head} |", "|---|" + "---:|" * 5]
    for kind in [*dict.fromkeys(row["fault"] for row in rows), None]:
        of_kind = [row for row in rows if kind in (row["fault"], None)]
        lost = [row["steps_lost"] for row in of_kind if row["steps_lost"] is not None]
        cells = [
            str(kind or "**all**"),
            str(len(of_kind)),
            str(sum(row["moment"]["saving"] for row in of_kind)),
            str(sum("refused" in row for row in of_kind)),
            f"{median(lost):g} ({max(lost)})" if lost else "",
            f"{sum(row['equal'] and row['ok'] for row in of_kind)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Return the last commit that changed the trainer."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "fasttrain", "kernels", "pipelines"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _in_own_namespace() -> None:
    """Restart this process in a mount namespace of its own, so that its mounts end with it."""
    if not os.environ.get(_NAMESPACE):
        os.environ[_NAMESPACE] = "1"
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = [sys.executable, "-m", "bench.faults.campaign", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", *root, *command])


if __name__ == "__main__":
    main()
