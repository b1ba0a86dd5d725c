"""Every tracker has the scalars and the settings of a run, with its real library and without a network."""

import errno
import json
import struct
import threading

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from wandb.proto.wandb_internal_pb2 import Record

from fasttrain.errors import ConfigError
from fasttrain.run import main
from fasttrain.training import trackers
from fasttrain.training.records import Recorder
from fasttrain.training.trackers import check_trackers, open_trackers
from tests.small_runs import flags, lines

pytestmark = pytest.mark.usefixtures("one_thread")
_SETTINGS = "lr: 0.1\nviews: [{size: 32}]\n"


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """A file for MLflow, and Weights & Biases without its server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def _recorder(folder, *names, resumed_at=0):
    opened = open_trackers(names or ["tensorboard"], folder, _SETTINGS, resumed_at)
    return Recorder(folder, resumed_at=resumed_at, trackers=opened)


def _line(step, **values):
    return {"step": step, "epoch": step / 4, "loss": 1 / step, **values}


def _tensorboard(folder):
    board = EventAccumulator(str(folder)).Reload()
    text = board.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    return {name: {e.step: e.value for e in board.Scalars(name)} for name in board.Tags()["scalars"]}, text


def _mlflow(folder):
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fasttrain").experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: {m.step: m.value for m in history} for name, history in histories.items()}, run.data.params


def _records(content):
    """Yield the records of a file of Weights & Biases: LevelDB's log format after a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(record)
            record = b""


def _wandb(folder):
    scalars, settings = {}, {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in _records(path.read_bytes()):
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in values:
                if not name.startswith("_"):
                    scalars.setdefault(name, {})[values["_step"]] = values[name]
    return scalars, settings


@pytest.mark.slow
def test_every_tracker_has_the_scalars_and_settings_of_a_run(images, tmp_path):
    output = tmp_path / "run"
    arguments = flags(images, output, "--knn_every", 0, "--trackers", "tensorboard", "wandb", "mlflow", "--limit_steps")
    for steps in (3, 5):  # a resumed run continues its run in each tracker
        assert main([*arguments, str(steps)]) == 0
    logged = lines(output / "metrics.jsonl")
    names = {name for line in logged for name, value in line.items() if value is not None}
    for read in (_tensorboard, _mlflow, _wandb):
        scalars, settings = read(output)
        assert scalars["loss"] == pytest.approx({line["step"]: line["loss"] for line in logged}, rel=1e-6), read
        assert set(scalars) == names - {"step", "epoch"}, read
        assert "batch_size_per_gpu" in settings, read


def test_tensorboard_hides_steps_that_are_repeated(tmp_path):
    with _recorder(tmp_path) as recorder:
        for step in (1, 4, 5, 8):
            recorder.step(_line(step, momentum=None, lr=step / 8))
    with _recorder(tmp_path, resumed_at=5) as recorder:
        recorder.step(_line(6, lr=0.75))
    scalars, _ = _tensorboard(tmp_path)
    assert scalars["lr"] == {1: 0.125, 4: 0.5, 5: 0.625, 6: 0.75}
    assert set(scalars) == {"loss", "lr"}


def test_tracker_that_fails_is_left_out_and_the_run_continues(tmp_path, capsys):
    with _recorder(tmp_path, "mlflow") as recorder:
        recorder.step(_line(1))
        recorder._trackers[0]._client = None  # a server that is gone
        recorder.step(_line(2))
        recorder.step(_line(3))
    assert capsys.readouterr().out.count("--trackers mlflow: stopped") == 1
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_missing_or_refused_tracker_is_one_line(tmp_path, monkeypatch):
    check_trackers(["tensorboard", "none"])
    assert open_trackers(["none"], tmp_path, _SETTINGS, 0) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://")
    with pytest.raises(ConfigError, match="--trackers mlflow: "):
        open_trackers(["mlflow"], tmp_path, _SETTINGS, 0)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--trackers wandb: .*fasttrain\[trackers\]"):
        check_trackers(["wandb"])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_in_tensorboards_thread_is_raised_not_printed(tmp_path, monkeypatch, capsys):
    """Its traceback came before the line that says what to do."""
    before = threading.excepthook

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", b"events")

    def log(recorder):
        with recorder:
            recorder.step(_line(1))
            recorder._trackers[0]._board.file_writer.event_writer._async_writer._worker.join()
            recorder.step(_line(2))

    recorder = _recorder(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        log(recorder)
    assert threading.excepthook is before
    assert capsys.readouterr().err == ""
