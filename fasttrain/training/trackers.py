"""Experiment trackers: TensorBoard, Weights & Biases and MLflow get the scalars of metrics.jsonl and the settings."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from ..errors import ConfigError
from ..files import write_text

Name = Literal["tensorboard", "wandb", "mlflow", "none"]
_IDS = "trackers.json"
"""The file with the identity of the run in each tracker, which a resumed run continues."""
_PARAMETERS = 100  # MLflow takes at most this number at a time
_PROJECT = "fasttrain"


class Tracker(ABC):
    """A place to which a run's scalars are sent, with the settings of the run."""

    name: ClassVar[Name]
    failures: ClassVar[tuple[type[Exception], ...]] = ()
    """Errors that end the tracker and not the run."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the scalars of a step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


def check_trackers(names: Sequence[Name]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        if name != "none" and find_spec(name) is None:
            raise ConfigError(f"--trackers {name}: is not installed. Install it: pip install 'fasttrain[trackers]'.")


def open_trackers(names: Sequence[Name], folder: Path, settings: str, resumed_at: int) -> list[Tracker]:
    """Return the trackers of a run in ``folder`` that continues after step ``resumed_at``; ``settings`` are YAML.

    Raise ConfigError if a tracker refuses the run, for example because nobody is logged in.
    """
    trackers = []
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        try:
            trackers.append(_OPEN[name](folder, settings, resumed_at))
        except ConfigError:
            raise
        except Exception as error:  # each library has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--trackers {name}: {reason}. Fix it, or leave {name} out.") from error
    return trackers


class _TensorBoard(Tracker):
    name = "tensorboard"

    def __init__(self, folder: Path, settings: str, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1)  # it hides that step too
        self._board.add_text("settings", f"```yaml\n{settings}```", resumed_at)
        self._hook = threading.excepthook
        threading.excepthook = self._of_a_thread

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook

    def _of_a_thread(self, unhandled: threading.ExceptHookArgs) -> None:
        """Print an error of another thread, except TensorBoard's: the next ``add_scalar`` raises that one again."""
        if not type(unhandled.thread).__module__.startswith("tensorboard."):
            self._hook(unhandled)


class _Wandb(Tracker):
    """The environment decides project, account and mode: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on.

    Weights & Biases drops steps that it has already. After a resume these are the same values again.
    """

    name = "wandb"
    failures = (Exception,)

    def __init__(self, folder: Path, settings: str, resumed_at: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=_identity(folder, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow(Tracker):
    """The environment decides server and experiment: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    name = "mlflow"
    failures = (Exception,)

    def __init__(self, folder: Path, settings: str, resumed_at: int) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 wait for minutes at a wrong address
        import mlflow
        from mlflow.entities import Metric, Param, RunStatus

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric, self._finished = Metric, RunStatus.to_string(RunStatus.FINISHED)
        self._client = mlflow.MlflowClient()
        former = _read_ids(folder).get("mlflow")
        self._id: str = _identity(folder, "mlflow", lambda: self._create(folder.name))
        if former is None:  # MLflow refuses to change a parameter
            flat = {name: json.dumps(value) for name, value in yaml.safe_load(settings).items()}
            parameters = [Param(name, value) for name, value in flat.items()]
            for start in range(0, len(parameters), _PARAMETERS):
                self._client.log_batch(self._id, params=parameters[start : start + _PARAMETERS])

    def _create(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        run_id: str = self._client.create_run(number, run_name=name).info.run_id
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id, self._finished)


_OPEN: dict[str, Callable[[Path, str, int], Tracker]] = {
    tracker.name: tracker for tracker in (_TensorBoard, _Wandb, _MLflow)
}


def _read_ids(folder: Path) -> dict[str, str]:
    path = folder / _IDS
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _identity(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Return the identity of the folder's run in a tracker. Create and store one for a new run."""
    known = _read_ids(folder)
    if name not in known:
        known[name] = create()
        write_text(folder / _IDS, json.dumps(known) + "\n")
    return known[name]
