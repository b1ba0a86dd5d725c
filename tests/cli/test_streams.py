"""Commands whose standard output has no reader any more."""

import os
import sys

import pytest

from fasttrain.cli.streams import LossyStream, lossy_output
from tests.small_runs import flags, lines, start


@pytest.fixture
def pipe():
    """A pipe without a reader, as a text stream."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_a_closed_pipe_ends_the_output_only(pipe):
    stream = LossyStream(pipe)
    assert stream.write("a") == 1
    stream.flush()
    assert print("b", file=stream, flush=True) is None
    pipe.flush()  # as the interpreter does at its end


def test_both_streams_are_restored(pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "stderr", pipe)
    with lossy_output():
        print("never read")
        print("never read", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == (pipe, pipe)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_run_outlives_the_reader_of_its_output(images, tmp_path, streams):
    """``| head`` ended a run with status 1 and without a word or a checkpoint."""
    command = flags(images, tmp_path, "--limit_steps", 3, "--num_workers", 1, "--knn_every", 1)
    process = start(command)
    process.stdout.readline()
    process.stdout.close()
    if streams == "both":
        process.stderr.close()
    assert process.wait(120) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "summary.json").is_file()
