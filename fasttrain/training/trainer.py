"""A run from configuration to summary: build, restore, train, evaluate, record."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoint import store
from ..checkpoint.card import Card, changes, check, read_card
from ..checkpoint.provenance import changed_settings, provenance
from ..config.resolve import Config
from ..distributed.lockstep import of_all_ranks
from ..distributed.signals import Signals
from ..distributed.watchdog import Watchdog
from ..distributed.world import World, all_gather_object
from ..engine.build import build_method
from ..engine.engine import Engine, global_batch
from ..engine.zero import full_numel
from ..errors import Collapsed, ConfigError, DataError, Diverged, Interrupted
from ..evaluate.evaluator import Evaluation, Evaluator
from ..files import DISK_ERRORS, finite, write_text
from ..methods import Method, Network
from ..models.architectures import user_backbone
from ..models.layouts import Report
from ..models.weights import load_weights, read_weights
from ..pipelines import Loader, Splits, open_source
from .display import DataNotes, Display
from .guard import Guard
from .loop import Loop
from .records import BOUND, Recorder, output_folder, read_summary, write_summary

_COLLAPSED_RANK = 2
"""RankMe below which the features of a finished run have collapsed."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    summary: dict[str, Any]
    """The content of ``summary.json``."""
    output: Path
    """The folder of the run."""
    steps: int
    """Steps that this call made; 0 for a run that was finished before."""
    ignored: tuple[str, ...] = ()
    """Settings of this call that differ from the settings of a run that was finished before."""


def train(
    config: Config, world: World, splits: Splits | None = None, *, network: nn.Module | Network | None = None
) -> Outcome:
    """Train.

    ``splits`` are images without a path, such as a ``source_from_dataset``; ``data_path`` is not read then.
    ``network`` is a backbone to train instead of ``config.train.arch``, or a function that builds one for a number of
    input channels. A module is copied, and its weights are where the training starts.

    Raise ConfigError or DataError for invalid input or a full disk, Diverged if loss or gradient stay not finite,
    Collapsed if the run should stop then, and Interrupted after a signal. On one rank, raise Crashed for any other
    error. With several ranks, a rank that fails ends its process, which brings down the others.
    Collective: every rank calls it.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.enter_context(DataNotes())
        watchdog = stack.enter_context(Watchdog(world, config.train.watchdog_minutes))
        try:
            run = _Run(config, world, splits, watchdog, network)
            stack.callback(run.close)
            return run.train(signals)
        except (ConfigError, DataError, Diverged, Collapsed, Interrupted):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                path = os.fsdecode(error.filename or "a file of the run")  # TensorBoard's names are bytes
                raise ConfigError(f"{path}: cannot be written: {error.strerror}. Free space, then resume.") from None
            raise watchdog.crashed(error) from error


class _Run:
    def __init__(
        self,
        config: Config,
        world: World,
        splits: Splits | None,
        watchdog: Watchdog,
        network: nn.Module | Network | None,
    ) -> None:
        t = config.train
        self.config, self.world, self.watchdog = config, world, watchdog
        torch.use_deterministic_algorithms(t.deterministic)
        self.output = watchdog.folder = output_folder(config, world)
        self.origin = provenance(config) if world.is_main else {}  # only rank 0 writes the card
        self.splits = splits or open_source(t.data_path, t.val_path, cache=self.output / "index")
        self.loader = Loader(
            self.splits.train,
            config.views,
            t.batch_size_per_gpu,
            seed=t.seed,
            rank=world.rank,
            world_size=world.size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            threads=t.num_workers or world.threads,
            max_bad_fraction=t.max_bad_fraction,
        )
        steps_per_epoch = self.loader.steps_per_epoch // t.gradient_accumulation_steps
        if steps_per_epoch < 1:
            raise ConfigError(
                f"--batch_size_per_gpu: a step of {global_batch(t, world)} images is larger than the data "
                f"({len(self.splits.train)}). Lower it or --gradient_accumulation_steps."
            )
        torch.manual_seed(t.seed)
        method = build_method(
            config, images=len(self.splits.train), world_size=world.size, network=_factory(network, config)
        )
        self.checkpoint, self.notes = store.choose(t.resume, self.output, world)
        if t.init_from is not None and self.checkpoint is None:  # a checkpoint holds all weights
            path = Path(t.init_from).expanduser()
            self.notes += _start_from(method, read_weights(path), f"--init_from {path}").lines()
        elif t.init_from is None and isinstance(network, nn.Module):
            _start_from(method, network.state_dict(), "model")  # a method may have initialised the copy again
        self.engine = Engine(config, method, world, steps_per_epoch=steps_per_epoch)
        self.guard = Guard(self.engine, t.max_skipped_steps)
        self.evaluator = Evaluator(self.splits, config, self.engine.device, world)
        self.last = min(self.engine.total_steps, t.limit_steps or self.engine.total_steps)
        self.rollbacks = 0
        self.rollback_source = "never"
        """The ``--resume`` value for a rollback. Checkpoints that another run left in the folder do not count."""
        self.loop = Loop(
            t,
            self.engine,
            self.loader,
            self.guard,
            watchdog,
            evaluate=self._evaluate,
            save=self._save,
            advice="Lower --lr." if config.entropy else "Try --entropy, or a lower --lr.",
        )

    @property
    def method(self) -> Method:
        return self.engine.method

    def train(self, signals: Signals) -> Outcome:
        t, main = self.config.train, self.world.is_main
        checkpoint, notes = self.checkpoint, self.notes
        if checkpoint is not None:  # before any work: the card shows whether the checkpoint fits
            card = check(checkpoint, self._card(0))
            notes += changes(card, self._card(0))
            changed = changed_settings(checkpoint.parent.parent, self.config)
            self.rollback_source = t.resume
            self.last = max(self.last, card.step)
            if card.step == self.last and (summary := self._finished_summary()) is not None:
                return Outcome(summary, self.output, 0, tuple(changed))
            notes += [f"changed setting {line}" for line in changed]
        baseline = self._baseline(resumed=checkpoint is not None)
        done = 0 if checkpoint is None else self._restore(checkpoint)
        display = Display(self.last, done) if main else None
        with ExitStack() as stack:
            if main:
                (self.output / "config.yaml").write_text(self.config.with_absolute_paths().to_yaml())
            if display:
                self._introduce(display, done, baseline)
                for line in notes:
                    display.note(line)
                stack.enter_context(display)
            started = time.perf_counter()
            logged = self._train_with_rollbacks(done, signals, display)
            seconds = time.perf_counter() - started
            evaluation = self._evaluate(self.last)
            summary = self._summary(logged, evaluation, baseline, seconds, self.last - done)
            if main:
                write_summary(self.output, summary)
        return Outcome(summary, self.output, self.last - done)

    def _finished_summary(self) -> dict[str, Any] | None:
        """Return the summary of a run that was finished before, so that its times stay as they are."""
        summary = read_summary(self.output)
        return summary if summary and summary.get("steps") == self.last else None

    def _baseline(self, *, resumed: bool) -> dict[str, float | None]:
        """Return the k-NN accuracy of the untrained network and of raw pixels. Measure it once per run. Collective."""
        path = self.output / "baseline.json"
        stored = _read_baseline(path) if resumed and self.world.is_main else None
        stored = all_gather_object(self.world, stored)[0]
        if stored is not None:
            return stored
        untrained = self.evaluator.backbone(self.method.backbone).knn_top1
        baseline = {"knn_top1_untrained": untrained, "knn_top1_pixels": self.evaluator.pixels()}
        if self.world.is_main:
            write_text(path, json.dumps(finite(baseline)) + "\n")
        return baseline

    def _restore(self, checkpoint: Path) -> int:
        """Restore a checkpoint, the guard's count and the order of the data; return its step."""
        card = read_card(checkpoint)
        done = store.restore(self.engine, checkpoint, self._card(0))
        self.guard.reset(card.skipped_steps)
        self._set_order(card.rollbacks)
        return done

    def _set_order(self, rollbacks: int) -> None:
        """Order the data as if the seed were higher by the number of rollbacks, which checkpoints store."""
        self.rollbacks = rollbacks
        self.loader.seed = (self.config.train.seed + rollbacks) % 2**63

    def _train_with_rollbacks(self, done: int, signals: Signals, display: Display | None) -> dict[str, Any]:
        """Run the loop. After a divergence, run it again from the last checkpoint with another order of the data."""
        while True:
            try:
                with Recorder(self.output, resumed_at=done) if self.world.is_main else nullcontext() as recorder:
                    return self.loop.run(done, self.last, signals, recorder, display)
            except Diverged as error:
                limit = self.config.train.rollback
                if self.rollbacks >= limit:
                    raise
                checkpoint, notes = store.choose(self.rollback_source, self.output, self.world)
                if checkpoint is None:
                    raise
                rollbacks = self.rollbacks + 1
                done = self._restore(checkpoint)
                self._set_order(rollbacks)
                if display:
                    for line in (*notes, f"{error} Rolled back to step {done} ({rollbacks} of {limit})."):
                        display.note(line)

    def _evaluate(self, done: int) -> Evaluation:
        with self.watchdog.suspended():
            evaluation = self.evaluator.backbone(self.method.backbone)
        if not evaluation.finite:
            raise Diverged(f"the weights are not finite after step {done}. Lower --lr or set --clip_grad.")
        return evaluation

    def _save(self, done: int, ends_epoch: bool, stop: signal.Signals | None) -> None:
        """Save a checkpoint after every epoch, every N steps, at the end, or after a signal on any rank.

        No checkpoint is saved while steps are being skipped: the last good one stays the newest.
        """
        t = self.config.train
        keep = ends_epoch and done // self.engine.steps_per_epoch % t.saveckp_freq == 0
        due = ends_epoch or (bool(t.saveckp_freq_steps) and done % t.saveckp_freq_steps == 0)
        if (due and not self.guard.consecutive) or stop or done == self.last:
            if not self.engine.finite():
                raise Diverged(f"the weights are not finite after step {done}. Lower --lr or set --clip_grad.")
            store.publish(self.engine, self.output / "checkpoints", self._card(done), keep=keep, newest=t.keep)
            self.rollback_source = "auto"
        if stop and done < self.last:
            raise Interrupted(stop, done, self.output)

    def _card(self, step: int) -> Card:
        c = self.config
        return Card(
            method=c.method,
            entropy=c.entropy,
            arch=c.train.arch,
            optimizer=c.train.optimizer,
            step=step,
            world_size=self.world.size,
            zero_stage=self.engine.stage,
            version=__version__,
            batch=global_batch(c.train, self.world),
            origin=self.origin,
            skipped_steps=self.guard.skipped,
            rollbacks=self.rollbacks,
        )

    def _introduce(self, display: Display, done: int, baseline: dict[str, float | None]) -> None:
        c, t, engine = self.config, self.config.train, self.engine
        parameters = sum(full_numel(p) for p in self.method.student.parameters())
        display.note(f"{c.title}  {t.arch}, {parameters / 1e6:.2f} M parameters, on {self.splits.name}")
        display.note(
            f"{len(self.splits.train):,} images, {self.last:,} steps of {global_batch(t, self.world)}, "
            f"{self.world.size} x {engine.device.type}, {engine.precision}, ZeRO {engine.stage}, into {self.output}"
        )
        if done:
            display.note(f"resumed after step {done}")
        for name, damage in self.splits.damaged.items():
            display.note(f"{name}: {damage}")
        for line in self.method.warnings_for(len(self.splits.train), engine.rows):
            display.note(line)
        untrained, pixels = baseline["knn_top1_untrained"], baseline["knn_top1_pixels"]
        if untrained is None:
            display.note(f"no k-NN accuracy: the data has no {self.splits.missing_for_knn}")
        else:
            raw = "skipped: more than 2 GiB" if pixels is None else f"{pixels:.3f}"
            display.note(f"k-NN before training: untrained network {untrained:.3f}, raw pixels {raw}")

    def _unreadable(self) -> int:
        """Return the number of unreadable images and damaged shards over all ranks."""
        return len(of_all_ranks({*self.loader.bad, *self.evaluator.bad, *self.splits.damaged}, self.world.size))

    def _summary(
        self,
        logged: dict[str, Any],
        evaluation: Evaluation,
        baseline: dict[str, float | None],
        seconds: float,
        steps: int,
    ) -> dict[str, Any]:
        c, t = self.config, self.config.train
        return {
            "method": c.method,
            "entropy_objective": c.entropy,
            "arch": t.arch,
            "dataset": self.splits.name,
            "images": len(self.splits.train),
            "unreadable_images": self._unreadable(),
            "epochs": self.last / self.engine.steps_per_epoch,
            "steps": self.last,
            "seconds": seconds,
            "images_per_s": steps * global_batch(t, self.world) / seconds,
            "world_size": self.world.size,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if self.engine.device.type == "cuda" else None,
            "knn_top1": evaluation.knn_top1,
            **baseline,
            "rankme": evaluation.rankme,
            **{name: logged.get(name) for name in BOUND},
            "skipped_steps": self.guard.skipped,
            "rollbacks": self.rollbacks,
            "collapsed": self.loop.collapse.collapsed or evaluation.rankme < _COLLAPSED_RANK,
        }

    def close(self) -> None:
        self.evaluator.close()
        self.loader.close()
        self.engine.close()


def _factory(network: nn.Module | Network | None, config: Config) -> Network | None:
    """Return a function that builds the given backbone, or None to build ``config.train.arch``."""
    if network is None:
        return None
    size = config.views.views[0].size
    return lambda channels: user_backbone(network, channels, size)


def _start_from(method: Method, tensors: dict[str, torch.Tensor], origin: str) -> Report:
    """Load weights into a method's backbone, and into the teacher's, and report them. Heads keep their random start.

    Raise ConfigError if the weights are of another network.
    """
    if method.teacher is not None:
        load_weights(method.teacher.backbone, tensors, origin)
    return load_weights(method.student.backbone, tensors, origin)


def _read_baseline(path: Path) -> dict[str, float | None] | None:
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in ("knn_top1_untrained", "knn_top1_pixels")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
