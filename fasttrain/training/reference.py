"""What a network still knows of a reference set: k-NN, CKA to the start and RankMe, for continued pretraining."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.resolve import Config
from ..distributed.world import World
from ..errors import ConfigError, DataError
from ..evaluate.evaluator import Evaluator, ShowProgress
from ..evaluate.similarity import linear_cka
from .opening import open_together
from .records import REFERENCE_KEYS, read_lines

_KNN = "knn_top1"


@dataclass(frozen=True)
class Start:
    """The reference set before training: features of some images [N, D], and the k-NN accuracy, if it has classes."""

    features: Tensor
    knn_top1: float | None


class Reference:
    """Compares a network with its start on ``--reference_path``. All ranks call every method."""

    def __init__(self, config: Config, output: Path, device: torch.device, world: World) -> None:
        t = config.train
        try:
            splits = open_together(
                replace(t, data_path=t.reference_path, val_path=None, data_weights=()), output / "index", world
            )
        except DataError as error:
            raise DataError(f"--reference_path: {str(error).removeprefix('--data_path: ')}") from None
        if t.max_forgetting is not None and splits.missing_for_knn:
            raise ConfigError(
                f"--max_forgetting: needs k-NN accuracy, and {t.reference_path} has no {splits.missing_for_knn}. Leave "
                "it out, or give a reference set with train/ and val/ folders of classes."
            )
        self.path, self.most, self.world = t.reference_path, t.max_forgetting, world
        self._evaluator = Evaluator(splits, config, device, world)
        self._output, self._file = output, output / "reference.safetensors"
        self._start: Start | None = None

    def begin(self, backbone: nn.Module, progress: ShowProgress, *, resumed: bool) -> str:
        """Measure the start, or read it in a resumed run. Return a line that says what it is.

        Raise ConfigError if a resumed run did not measure it.
        """
        if resumed:
            self._start = _read(self._file)
        else:
            evaluation = self._evaluator.backbone(backbone, progress, "reference images before training")
            self._start = Start(evaluation.rows, evaluation.knn_top1)
            if self.world.is_main:
                _write(self._file, self._start)
        images = f"reference set {self.path}, {len(self._start.features):,} images compared"
        knn = self._start.knn_top1
        return images + ("" if knn is None else f": k-NN before training {knn:.3f}")

    def measure(self, backbone: nn.Module, progress: ShowProgress) -> dict[str, float | None]:
        """Return the values of ``REFERENCE_KEYS``."""
        assert self._start is not None
        evaluation = self._evaluator.backbone(backbone, progress, "reference images")
        rows = self._start.features.to(evaluation.rows.device)
        # An image may have become unreadable since; then the rows are not of the same images.
        cka = linear_cka(rows, evaluation.rows) if len(rows) == len(evaluation.rows) and evaluation.finite else None
        return dict(zip(REFERENCE_KEYS, (evaluation.knn_top1, cka, evaluation.rankme), strict=True))

    def forgotten(self, values: dict[str, float | None]) -> str | None:
        """Return what has been forgotten, if it is more than ``--max_forgetting`` points of k-NN accuracy."""
        before = None if self._start is None else self._start.knn_top1
        now = values.get(REFERENCE_KEYS[0])
        if self.most is None or before is None or now is None or 100 * (before - now) <= self.most:
            return None
        return (
            f"k-NN accuracy on {self.path} fell from {before:.3f} to {now:.3f}, by more than --max_forgetting "
            f"{self.most:g} points"
        )

    def steps_within_limit(self) -> list[int]:
        """Return the steps whose values in metrics.jsonl are within the limit. Rank 0 has the file."""
        path = self._output / "metrics.jsonl"
        lines = read_lines(path)[0] if path.is_file() else []
        return [line["step"] for line in lines if REFERENCE_KEYS[0] in line and self.forgotten(line) is None]

    def close(self) -> None:
        """Free the loaders."""
        self._evaluator.close()


def open_reference(config: Config, output: Path, device: torch.device, world: World) -> Reference | None:
    """Return the reference set of a run, or None without ``--reference_path``.

    Raise ConfigError for a limit without a reference set, or a reference set that is never measured.
    """
    t = config.train
    if t.reference_path is None:
        if t.max_forgetting is not None:
            raise ConfigError("--max_forgetting: needs --reference_path, the images not to be forgotten.")
        return None
    if not t.knn_every:
        raise ConfigError("--reference_path: is measured every --knn_every epochs, got 0. Use 1 or more.")
    return Reference(config, output, device, world)


def _write(path: Path, start: Start) -> None:
    header = {} if start.knn_top1 is None else {_KNN: repr(start.knn_top1)}
    save_file({"features": start.features.cpu().contiguous()}, path, metadata=header)


def _read(path: Path) -> Start:
    try:
        with safe_open(path, "pt") as file:
            knn = (file.metadata() or {}).get(_KNN)
            return Start(file.get_tensor("features"), None if knn is None else float(knn))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"--reference_path: {path} cannot be read ({error}), and the run has moved on from its start. Leave the "
            "flag out, or start a new run."
        ) from None
