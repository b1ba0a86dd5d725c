"""An event on one of two ranks reaches both: a bad batch, a signal, an error. One start for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.failing_ranks import STAGES
from tests.small_runs import lines, write_images

pytestmark = pytest.mark.slow
_SCRIPT = Path(__file__).with_name("failing_ranks.py")
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder, the finished process, and both ranks' observations."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(_SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(write_images(folder / "noise")), str(folder)]
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=500)
    assert (folder / "rank-1.json").is_file(), done.stderr
    return folder, done, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_batch_of_one_rank_is_skipped_by_both(ended, stage):
    one, two = (rank["bad_steps"][str(stage)] for rank in ended[2])
    assert one == two
    assert one["faults"] == [None, "the loss is nan at step 2", None]
    assert one["differ"] == []
    assert one["norms"] == pytest.approx(ended[2][0]["bad_steps"]["0"]["norms"], rel=1e-5)  # shards and whole tensors


def test_a_signal_to_one_rank_stops_both_at_the_same_step(ended):
    folder, done, ranks = ended
    assert [rank["signal"] for rank in ranks] == [{"status": [138, 0], "latest": "step-00000003"}] * 2
    assert "fasttrain: stopped by SIGUSR1 at step 3; " in done.stderr
    assert [line["step"] for line in lines(folder / "signal" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_rank_without_images_ends_both_and_loses_no_step(ended):
    folder, _, ranks = ended
    seen = {"reason": "no image can be read", "latest": "step-00000002", "steps": 2}
    assert [rank["images"] for rank in ranks] == [seen] * 2
    assert [line["step"] for line in lines(folder / "images" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_rank_0_opens_the_data_for_both(ended):
    one, two = (rank["opened"] for rank in ended[2])
    assert one["results"] == two["results"]
    assert (one["read"], two["read"]) == (3, 0)
    count, missing, differing = one["results"]
    assert count == 32
    assert missing.startswith("/none: no such folder")
    assert differing.startswith("--data_path: rank 0 and rank 1 read other images")


def test_a_signal_to_one_rank_ends_the_knn_of_both(ended):
    _, done, ranks = ended
    assert [rank["signal_in_knn"] for rank in ranks] == [{"status": 143, "evaluated": False}] * 2
    assert "fasttrain: stopped by SIGTERM at step 0; start the run again\n" in done.stderr


def test_a_rank_that_fails_ends_the_other_with_one_line(ended):
    folder, done, _ = ended
    assert done.returncode == 1
    log = folder / "crash" / "rank-1.log"
    printed = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert printed[2:] == [f"fasttrain: rank 1 failed: RuntimeError: a bug in the step; its traceback is in {log}"]
    assert 'raise RuntimeError("a bug in the step")' in log.read_text()
    assert not (folder / "crash" / "rank-0.log").exists()
    assert [line["step"] for line in lines(folder / "crash" / "metrics.jsonl")] == [1, 2]
    assert "SIGKILL" not in done.stderr  # without the watchdog, the launcher kills the other rank after 30 s
