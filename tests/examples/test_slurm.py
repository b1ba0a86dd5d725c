"""Run the SLURM script on this machine, with substitutes for SLURM's commands that start two tasks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import flags, lines, write_images

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_SRUN = """#!/usr/bin/env bash
kill=1
while [[ $1 == --* ]]; do [[ $1 == --kill-on-bad-exit=0 ]] && kill=0; shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
if [ -n "${WARN_AFTER:-}" ]; then
  until [ -s "$WARN_AFTER" ]; do sleep 0.02; done
  kill -USR1 "${tasks[@]}"
fi
worst=0
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > worst)) && worst=$status; done
((kill && worst)) && worst=137 # srun killed the others after the first failure
exit "$worst"
"""
_SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >>"$REQUEUED"; fi
"""


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Return a function that runs the script as a job, and returns its exit status and the requeued jobs."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    # The script must call the python that runs the tests, also if its environment is not activated.
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("REQUEUED", str(tmp_path / "requeued"))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))

    def run(*arguments, **environment):
        script = [str(part) for part in (_ROOT / "examples/slurm.sh", *arguments)]
        process = subprocess.run(script, cwd=_ROOT, env=os.environ | environment, timeout=240, check=False)
        requeued = tmp_path / "requeued"
        return process.returncode, requeued.read_text().splitlines() if requeued.exists() else []

    return run


def test_slurm_script_requeues_and_resumes_after_the_signal(batch, tmp_path):
    """Regression: with --kill-on-bad-exit=1, srun killed the unfinished ranks and returned their status.

    A requeued job resumes whatever its --resume is. Earlier it started from the beginning every time.
    """
    data, output = write_images(tmp_path / "data"), tmp_path / "run"
    long = flags(data, output, "--epochs", 300, "--knn_every", 0, "--num_workers", 1)
    job = str(os.getpid())
    status, requeued = batch(*long, SLURM_JOB_ID=job, WARN_AFTER=str(output / "metrics.jsonl"))
    assert (status, requeued) == (138, [f"requeue {job}"])
    stopped = lines(output / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped < 600
    again = (*long, "--limit_steps", stopped + 2, "--resume", "never")
    status, requeued = batch(*again, SLURM_JOB_ID=job, SLURM_RESTART_COUNT="1")
    assert (status, requeued) == (0, [f"requeue {job}"])
    assert [line["step"] for line in lines(output / "metrics.jsonl")] == list(range(1, stopped + 3))


def test_slurm_script_with_invalid_flags_is_not_requeued(batch):
    assert batch("--method", "dine", SLURM_JOB_ID=str(os.getpid())) == (2, [])
