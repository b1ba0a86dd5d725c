"""What happens to one of two ranks happens to both: a bad batch, a signal, an error. One start for all."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.failing_ranks import STAGES
from tests.small_runs import lines, write_images

_SCRIPT = Path(__file__).with_name("failing_ranks.py")
_ROOT = _SCRIPT.parent.parent


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(_SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(write_images(folder / "noise")), str(folder)]
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=500)
    return folder, done, time.time()


@pytest.fixture(scope="module")
def found(ended):
    folder, done, _ = ended
    assert (folder / "rank-1.json").is_file(), done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_batch_of_one_rank_is_skipped_by_both(found, stage):
    one, two = (rank["bad_steps"][str(stage)] for rank in found)
    assert one == two
    assert one["faults"] == [None, "the loss is nan at step 2", None]
    assert one["differ"] == []
    assert one["norms"] == pytest.approx(found[0]["bad_steps"]["0"]["norms"], rel=1e-5)  # of shards as of the whole


def test_a_signal_to_one_rank_stops_both_at_the_same_step(ended, found):
    assert [rank["signal"] for rank in found] == [{"status": [138, 0], "latest": "step-00000003"}] * 2
    assert "fasttrain: stopped by SIGUSR1 at step 3; " in ended[1].stderr
    assert [line["step"] for line in lines(ended[0] / "signal" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_rank_that_fails_ends_the_other_and_says_why_once(ended, found):
    folder, done, end = ended
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    log = folder / "crash" / "rank-1.log"
    assert said[1:] == [f"fasttrain: rank 1 failed: RuntimeError: a bug in the step; its traceback is in {log}"]
    assert 'raise RuntimeError("a bug in the step")' in log.read_text()
    assert not (folder / "crash" / "rank-0.log").exists()
    assert [line["step"] for line in lines(folder / "crash" / "metrics.jsonl")] == [1, 2]
    # Not a matter of speed: without the watchdog the other rank would wait until the launcher kills it, after 30 s.
    assert end - float((folder / "crash" / "failed_at").read_text()) < 25
