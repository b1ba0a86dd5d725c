"""A run that is ended from outside: by signals, errors, hangs and a full disk."""

import errno
import os
import re
import signal
import sys
import time

import pytest

from fasttrain.checkpoint import store
from fasttrain.distributed import signals
from fasttrain.evaluate import evaluator
from fasttrain.run import main
from fasttrain.training.records import Recorder
from tests.small_runs import assert_same_run, flags, lines, start, when_logged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_sigterm_publishes_a_checkpoint_that_resumes(images, tmp_path):
    output = tmp_path / "run"
    process = start(flags(images, output, "--epochs", 100_000, "--knn_every", 0))
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    done = len(lines(metrics))
    assert err == f"fasttrain: stopped by SIGTERM at step {done}; resume with --resume auto --output_dir {output}\n"
    assert (output / "checkpoints" / "latest").read_text() == f"step-{done:08d}"
    assert not (output / "summary.json").exists()
    assert main(flags(images, output, "--epochs", 100_000, "--knn_every", 0, "--limit_steps", done + 2)) == 0
    assert [line["step"] for line in lines(metrics)] == list(range(1, done + 3))


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_stop_within_an_epoch_and_resume_equals_one_run(straight, images, tmp_path, capsys, number, status):
    with when_logged(6, lambda: os.kill(os.getpid(), signal.Signals[number])):
        assert main(flags(images, tmp_path, "--knn_every", 1)) == status
    assert capsys.readouterr().err.startswith(f"fasttrain: stopped by {number} at step 6; ")
    assert main(flags(images, tmp_path, "--knn_every", 1)) == 0
    assert_same_run(tmp_path, straight[0])


def test_a_second_ctrl_c_stops_at_once(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signals, "_REPEAT_SECONDS", 0)
    with when_logged(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):
        assert main(flags(images, tmp_path, "--knn_every", 0)) == 130
    assert (
        capsys.readouterr().err
        == "fasttrain: a second SIGINT stopped the run at once. The last checkpoint is intact.\n"
    )
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("trackers", ["none", "tensorboard"])
@pytest.mark.parametrize("frequency", [1, 0])
def test_a_removed_output_folder_is_one_line(straight, images, tmp_path, capsys, trackers, frequency):
    """A traceback of TensorBoard's thread came first, and a checkpoint made the folder again without its records."""
    output = tmp_path / "run"
    command = flags(images, output, "--knn_every", 1, "--trackers", trackers, "--saveckp_freq_steps", frequency)
    with when_logged(3, lambda: output.rename(tmp_path / "removed")):  # at once, as a checkpoint is being written
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: --output_dir {output}: was removed")
    assert not output.exists()
    assert main(command) == 0
    assert_same_run(output, straight[0])


def _fail():
    raise RuntimeError("a bug\nof two lines")


def test_unexpected_error_is_one_line_and_status_1(images, tmp_path, capsys):
    with when_logged(2, _fail):
        assert main(flags(images, tmp_path, "--knn_every", 0)) == 1
    log = tmp_path / "rank-0.log"
    said = f"fasttrain: rank 0 failed: RuntimeError: a bug; its traceback is in {log}\n"
    assert capsys.readouterr().err == said
    assert "in _fail" in log.read_text()
    assert "of two lines" in log.read_text()


_HANGS = """
import sys, time
from fasttrain.distributed import watchdog
from fasttrain.run import main
from fasttrain.training import opening, trainer
from tests.small_runs import when_logged

def hang(*_, **__):
    time.sleep(60)

watchdog._GRACE_ALONE, watchdog._LINGER = 10, 0.5
place = sys.argv.pop(1)
if place == "listing":
    opening.open_source = hang
if place == "building":
    trainer.build_method = hang
if place == "k-NN":
    trainer.Evaluator.pixels = hang
with when_logged(2 if place == "step" else 0, hang):
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["listing", "building", "k-NN", "step"])
def test_a_hang_ends_the_run_with_status_1(images, tmp_path, place):
    """The watchdog began at the first step, so a hang before that was for ever."""
    arguments = flags(images, tmp_path, "--knn_every", int(place == "k-NN"), "--watchdog_minutes", 0.08)
    process = start(arguments, sys.executable, "-c", _HANGS, place)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in hang" in (tmp_path / "rank-0.log").read_text()
    assert re.search(r"rank 0 (finished no step|did nothing at its start) for 0.08 minutes \(--watchdog_minutes\)", err)


def test_saveckp_freq_keeps_checkpoints_of_its_epochs(images, tmp_path, monkeypatch):
    """The first one came after --saveckp_freq epochs, 20 by default: a fault before cost all of them."""
    published, publish = [], store.Publisher.publish

    def noted(self, card, *, keep):
        published.append((card.step, keep))
        publish(self, card, keep=keep)

    monkeypatch.setattr(store.Publisher, "publish", noted)
    arguments = flags(images, tmp_path, "--knn_every", 0, "--epochs", 4, "--saveckp_freq", 2)
    with when_logged(14, _fail):
        assert main(arguments) == 1
    assert published == [(4, False), (8, True), (12, False)]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", "step-00000008", "step-00000012"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000012"


@pytest.mark.parametrize("at", ["checkpoint", "metrics"])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(images, tmp_path, capsys, monkeypatch, at):
    """The first checkpoint finds room, the second does not; or a line of metrics.jsonl does not."""
    name = os.fsencode(tmp_path / at) if at == "metrics" else str(tmp_path / at)  # as TensorBoard's are
    full = OSError(errno.ENOSPC, "No space left on device", name)
    publish, write = store.write_tensors, Recorder.step

    def tensors(path, content):
        if at == "checkpoint" and "step-00000004" in str(path):
            raise full
        return publish(path, content)

    def step(self, values):
        if at == "metrics" and values["step"] == 4:
            raise full
        write(self, values)

    monkeypatch.setattr(store, "write_tensors", tensors)
    monkeypatch.setattr(Recorder, "step", step)
    arguments = flags(images, tmp_path / "run", "--knn_every", 0, "--saveckp_freq_steps", 2)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "Free space" in line
    assert "b'" not in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*step*")] == ["step-00000002"]
    monkeypatch.undo()
    assert main([*arguments, "--limit_steps", "5"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_fault_during_a_later_knn_loses_no_step(straight, images, tmp_path, monkeypatch, capsys):
    """The epoch's checkpoint came after its k-NN, so a fault in the k-NN lost the epoch."""
    with monkeypatch.context() as patch:
        _in_evaluation(patch, 6, _fail)
        assert main(flags(images, tmp_path, "--knn_every", 1)) == 1
    capsys.readouterr()
    assert "knn_top1" not in lines(tmp_path / "metrics.jsonl")[-1]
    assert main(flags(images, tmp_path, "--knn_every", 1)) == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert_same_run(tmp_path, straight[0])


def _signal_during(monkeypatch, number, evaluation):
    """Send a signal in the middle of the N-th extraction of features, which must not continue after it."""
    _in_evaluation(monkeypatch, evaluation, lambda: os.kill(os.getpid(), signal.Signals[number]))


def _in_evaluation(monkeypatch, evaluation, action):
    """Call a function in the middle of the N-th extraction of features."""
    calls, extract = [], evaluator.extract

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) != evaluation:
            return extract(*arguments, **options)
        action()
        raise AssertionError("the extraction continued")

    monkeypatch.setattr(evaluator, "extract", interrupted)


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signal_during_the_first_knn_ends_it_at_once(images, tmp_path, monkeypatch, capsys, number, status):
    """SIGTERM during the k-NN of an untrained ResNet-50 was ignored for 24 minutes."""
    with monkeypatch.context() as patch:
        _signal_during(patch, number, 1)
        assert main(flags(images, tmp_path)) == status
    assert capsys.readouterr().err == f"fasttrain: stopped by {number} at step 0; start the run again\n"
    assert not (tmp_path / "checkpoints").exists()
    assert main(flags(images, tmp_path, "--limit_steps", 1)) == 0


def test_signal_during_a_later_knn_saves_and_resumes_the_same(straight, images, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        _signal_during(patch, "SIGTERM", 6)  # after two loaders of the network and of the pixels: held-out images
        assert main(flags(images, tmp_path, "--knn_every", 1)) == 143
    assert capsys.readouterr().err.startswith("fasttrain: stopped by SIGTERM at step 4; resume with ")
    assert "knn_top1" not in lines(tmp_path / "metrics.jsonl")[-1]
    assert main(flags(images, tmp_path, "--knn_every", 1)) == 0
    assert_same_run(tmp_path, straight[0])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_step_larger_than_the_memory_is_one_line(images, tmp_path, capsys, error):
    def fail():
        raise error

    with when_logged(1, fail):
        assert main(flags(images, tmp_path, "--knn_every", 0)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--batch_size_per_gpu" in line
