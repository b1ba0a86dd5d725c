"""A run from configuration to summary: build, restore, train, evaluate, record."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import __version__
from ..checkpoint import store
from ..checkpoint.card import Card, ahead_of, changes, check, is_complete, read_card, tag
from ..checkpoint.provenance import changed_settings, provenance
from ..config.fit import Fit, fit_to_data
from ..config.recipes import recipe_names
from ..config.resolve import Config, read_yaml
from ..distributed.lockstep import of_all_ranks
from ..distributed.signals import Signals, Stopped, stop_signal
from ..distributed.watchdog import Watchdog
from ..distributed.world import World, all_gather_object
from ..engine.build import build_method
from ..engine.engine import Engine, global_batch
from ..engine.zero import full_numel
from ..errors import Collapsed, ConfigError, DataError, Diverged, Forgotten, Interrupted, SaveError
from ..evaluate.evaluator import Evaluator
from ..files import DISK_ERRORS, write_text
from ..methods import Method, Network
from ..models.architectures import user_backbone
from ..models.layouts import Report
from ..models.weights import load_weights, read_weights
from ..pipelines import Loader, Splits
from .baseline import Baseline, read_baseline, write_baseline
from .display import DataNotes, Display, new_console
from .guard import Guard
from .introduction import check_ranks, data_lines, slow_random_layers, without_effect
from .lock import FolderLock
from .loop import Loop
from .opening import open_together
from .pixels import settled_on_every_rank
from .records import BOUND, REFERENCE_KEYS, Recorder, output_folder, read_summary, write_summary
from .reference import open_reference
from .trackers import check_trackers, open_trackers

_COLLAPSED_RANK = 2
"""RankMe below which the features of a finished run have collapsed."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    summary: dict[str, Any]
    """The content of ``summary.json``."""
    output: Path
    """The folder of the run."""
    config: Config
    """The configuration, fitted to the data, with the measured pixel format."""
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
            output = watchdog.folder = output_folder(config, world)
            stack.enter_context(FolderLock(output, world))
            watchdog.begin()
            data = splits or open_together(config.train, output / "index", world)
            fit = _fit(config, data, output, world)
            if (summary := _finished(fit.config, output, world)) is not None:
                return Outcome(summary, output, fit.config, 0)
            run = _Run(fit, world, output, data, watchdog, signals, network)
            stack.callback(run.close)
            return run.train()
        except Exception as error:
            if line := _line_for(error, watchdog.folder):
                raise ConfigError(line) from None
            if isinstance(error, ConfigError | DataError | Diverged | Collapsed | Interrupted):
                raise
            raise watchdog.crashed(error) from error


def _line_for(error: Exception, output: Path | None) -> str | None:
    """Return the message for an error of the system that a user can fix, or None."""
    if isinstance(error, OSError | SaveError) and output is not None and not output.is_dir():
        return f"--output_dir {output}: was removed during the run. Start the run again."
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        path = os.fsdecode(error.filename or "a file of the run")  # TensorBoard's names are bytes
        return f"{path}: cannot be written: {error.strerror}. Free space, then resume."
    # On the CPU torch raises a plain RuntimeError for a failed allocation, and NumPy a MemoryError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            "--batch_size_per_gpu: the memory is too small for a step. Lower it, or the size of the views, or choose a "
            "smaller --arch. fasttrain plan shows what a run needs."
        )
    return None


class _Run:
    def __init__(
        self,
        fit: Fit,
        world: World,
        output: Path,
        splits: Splits,
        watchdog: Watchdog,
        signals: Signals,
        network: nn.Module | Network | None,
    ) -> None:
        t = fit.config.train
        self.world, self.watchdog, self.signals, self.output, self.splits = world, watchdog, signals, output, splits
        self.has_weights = isinstance(network, nn.Module)
        self.console = new_console() if world.is_main else None
        self.display: Display | None = None  # only rank 0 has one
        self.recorder: Recorder | None = None
        if t.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch raises an error at the first product
        torch.use_deterministic_algorithms(t.deterministic)
        check_trackers(t.trackers)
        self.data = splits.summary
        check_ranks(self.data, world)
        self._print(*data_lines(self.data, splits.damaged), *fit.reasons)  # before the slow part
        self.checkpoint, self.notes = store.choose(t.resume, output, world)
        resumed = None if self.checkpoint is None else self.checkpoint.parent.parent
        config, lines = settled_on_every_rank(fit.config, splits.train, world, resumed=resumed)
        self._print(*lines)
        self.config = config
        self.origin = provenance(config) if world.is_main else {}  # only rank 0 writes the card
        if global_batch(t, world) > len(splits.train):
            raise ConfigError(
                f"--batch_size_per_gpu: a step of {global_batch(t, world)} images is larger than the data "
                f"({len(splits.train)}). Lower it or --gradient_accumulation_steps."
            )
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
            labels=False,
        )
        steps_per_epoch = self.loader.steps_per_epoch // t.gradient_accumulation_steps
        torch.manual_seed(t.seed)
        method = build_method(
            config, images=len(self.splits.train), world_size=world.size, network=_factory(network, config)
        )
        if t.init_from is not None and self.checkpoint is None:  # a checkpoint holds all weights
            self.notes += _start_from(method, read_weights(Path(t.init_from)), f"--init_from {t.init_from}").lines()
        elif t.init_from is None and isinstance(network, nn.Module):
            _start_from(method, network.state_dict(), "model")  # a method may have initialised the copy again
        self.engine = Engine(config, method, world, steps_per_epoch=steps_per_epoch)
        self.guard = Guard(self.engine, t.max_skipped_steps)
        self.publisher = store.Publisher(self.engine, output / "checkpoints", newest=t.keep, note=self._print)
        self.evaluator = Evaluator(self.splits, config, self.engine.device, world)
        self.reference = open_reference(config, output, self.engine.device, world)
        self.last = self._last_step()
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
            progress=self._progress,
            save=self._save,
            advice="Lower --lr." if config.entropy else "Try --entropy, or a lower --lr.",
        )

    @property
    def method(self) -> Method:
        return self.engine.method

    def _print(self, *lines: str) -> None:
        if self.console is not None:
            for line in lines:
                self.console.print(line)

    def train(self) -> Outcome:
        t, main = self.config.train, self.world.is_main
        checkpoint, notes = self.checkpoint, self.notes
        if checkpoint is not None:  # before any work: the card shows whether the checkpoint fits
            card = check(checkpoint, self._card(0))
            notes += changes(card, self._card(0))
            changed = changed_settings(checkpoint.parent.parent, self.config)
            self.rollback_source = t.resume
            self._continue_schedules(card)
            if card.step == self.last and (summary := self._finished_summary()) is not None:
                return Outcome(summary, self.output, self.config, 0, tuple(changed))
            notes += [f"changed setting {line}" for line in changed]
        done = first = 0 if checkpoint is None else card.step
        with ExitStack() as stack:
            if main:
                write_text(self.output / "config.yaml", self.config.with_absolute_paths().to_yaml())
                self.display = stack.enter_context(
                    Display(self.last, done, console=self.console, too_long=self._too_long())
                )
                self._introduce(self.display, done, notes)
            try:
                baseline = self._baseline(resumed=checkpoint is not None)
                self._begin_reference(resumed=checkpoint is not None)
                if checkpoint is not None:
                    self._restore(checkpoint)
                started = time.perf_counter()
                logged = self._train_with_rollbacks(done)
                seconds = time.perf_counter() - started
                evaluation = self._evaluate(self.last) if t.knn_every else None
                self.publisher.wait()
            except Stopped as error:
                raise Interrupted(error.number, done, self.output) from None
            except Exception as error:
                self._wait_after(error)
                raise
            summary = self._summary(logged, evaluation, baseline, seconds, self.last - first)
            if main:
                write_summary(self.output, summary)
        return Outcome(summary, self.output, self.config, self.last - first)

    def _last_step(self) -> int:
        """Return the number of the run's last step."""
        steps = self.engine.total_steps - self.engine.ahead
        return min(steps, self.config.train.limit_steps or steps)

    def _continue_schedules(self, card: Card) -> None:
        """Continue epochs and schedules where a checkpoint had them."""
        self.engine.ahead = ahead_of(card, self.engine.steps_per_epoch)
        self.last = max(self._last_step(), card.step)

    def _wait_after(self, error: Exception) -> None:
        """Let the checkpoint that is being written be published, unless another rank may have ended with the error."""
        if self.world.size == 1 or isinstance(error, Diverged | Collapsed | DataError):
            with suppress(SaveError):
                self.publisher.wait()

    def _too_long(self) -> str | None:
        """Return the advice for a run of more than a day."""
        if self.engine.device.type != "cpu" or "photos-small" not in recipe_names(self.config.method):
            return None
        return "A run on the CPU that long needs a smaller network: --recipe photos-small takes minutes."

    def _finished_summary(self) -> dict[str, Any] | None:
        """Return the summary of a run that was finished before, so that its times stay as they are."""
        summary = read_summary(self.output)
        return summary if summary and summary.get("steps") == self.last else None

    def _baseline(self, *, resumed: bool) -> Baseline:
        """Return the k-NN accuracy of the untrained network and of raw pixels. Measure it once per run. Collective."""
        if not self.config.train.knn_every:
            return Baseline()
        path = self.output / "baseline.json"
        stored = read_baseline(path, self.config, resumed=resumed) if self.world.is_main else None
        baseline = all_gather_object(self.world, stored)[0]
        if baseline is None:
            with self._interruptible():
                network = self.evaluator.backbone(self.method.backbone, self._progress, "k-NN of the untrained network")
                baseline = Baseline(network.knn_top1, self.evaluator.pixels(self._progress))
            if self.world.is_main:
                write_baseline(path, baseline, self.config)
        if self.display:
            self.display.note(self._describe(baseline))
        return baseline

    def _begin_reference(self, *, resumed: bool) -> None:
        """Measure what the network knows of the reference set before training. Collective."""
        if self.reference:
            with self._interruptible():
                line = self.reference.begin(self.method.backbone, self._progress, resumed=resumed)
            if self.display:
                self.display.note(line)

    def _describe(self, baseline: Baseline) -> str:
        if baseline.untrained is None:
            return f"no k-NN accuracy: the data has no {self.splits.missing_for_knn}"
        train, val = self.evaluator.images
        raw = "skipped: more than 2 GiB" if baseline.pixels is None else f"{baseline.pixels:.3f}"
        used = f"{train:,} training and {val:,} held-out images"
        return f"k-NN before training, {used}: untrained network {baseline.untrained:.3f}, raw pixels {raw}"

    def _restore(self, checkpoint: Path) -> int:
        """Restore a checkpoint, the guard's count and the order of the data; return its step."""
        card = read_card(checkpoint)
        done = store.restore(self.engine, checkpoint, self._card(0))
        self.guard.reset(card.skipped_steps)
        self._continue_schedules(card)
        self._set_order(card.rollbacks)
        return done

    def _set_order(self, rollbacks: int) -> None:
        """Order the data as if the seed were higher by the number of rollbacks, which checkpoints store."""
        self.rollbacks = rollbacks
        self.loader.seed = (self.config.train.seed + rollbacks) % 2**63

    def _train_with_rollbacks(self, done: int) -> dict[str, Any]:
        """Run the loop. After a divergence, run it again from the last checkpoint with another order of the data."""
        while True:
            try:
                with self._recorder(done) if self.world.is_main else nullcontext() as self.recorder:
                    return self.loop.run(done, self.last, self.signals, self.recorder, self.display)
            except Diverged as error:
                limit = self.config.train.rollback
                if self.rollbacks >= limit:
                    raise
                self.publisher.wait()
                checkpoint, notes = store.choose(self.rollback_source, self.output, self.world)
                if checkpoint is None:
                    raise
                rollbacks = self.rollbacks + 1
                done = self._restore(checkpoint)
                self._set_order(rollbacks)
                if self.display:
                    for line in (*notes, f"{error} Rolled back to step {done} ({rollbacks} of {limit})."):
                        self.display.note(line)

    def _recorder(self, done: int) -> Recorder:
        settings = self.config.with_absolute_paths().to_yaml()
        trackers = open_trackers(self.config.train.trackers, self.output, settings, done)
        return Recorder(self.output, resumed_at=done, trackers=trackers, note=self._print)

    def _evaluate(self, done: int) -> dict[str, float | None]:
        """Measure the backbone after a step whose checkpoint exists or is being written. Collective.

        Raise Interrupted if a signal arrives. The run then makes the evaluation when it is resumed. Raise Forgotten if
        too much of the reference set is forgotten.
        """
        try:
            with self._interruptible():
                evaluation = self.evaluator.backbone(self.method.backbone, self._progress)
                known = self.reference.measure(self.method.backbone, self._progress) if self.reference else {}
        except Stopped as error:
            self.publisher.wait()
            raise Interrupted(error.number, done, self.output) from None
        if not evaluation.finite:
            raise Diverged(f"the weights are not finite after step {done}. Lower --lr or set --clip_grad.")
        values = {"knn_top1": evaluation.knn_top1, "rankme": evaluation.rankme, **known}
        if self.reference and (reason := self.reference.forgotten(values)):
            if self.recorder and done < self.last:
                self.recorder.extend_last(done, values)
            raise Forgotten(f"forgotten: {reason}, at step {done}. {self._go_back(done)} Lower --lr, or freeze more.")
        return values

    def _go_back(self, done: int) -> str:
        """Make the last checkpoint within the limit the newest one; return a line that names it. Collective."""
        self.publisher.wait()
        line = ""
        if self.world.is_main and self.reference:
            good = store.set_aside_after(self.output / "checkpoints", self.reference.steps_within_limit())
            line = "No checkpoint is within the limit." if good is None else f"The run is back at {good.name}."
        return all_gather_object(self.world, line)[0]

    def _interruptible(self) -> AbstractContextManager[None]:
        """Return a context in which a signal ends the work at once. With several ranks, :meth:`_progress` ends it."""
        self.watchdog.step_done()
        return self.signals.raising(self.world.size)

    def _progress(self, name: str, done: int, total: int) -> None:
        """Show the progress of work between steps, and raise Stopped on all ranks if a signal arrived on any of them.

        Collective.
        """
        self.watchdog.step_done()
        if self.display:
            self.display.work(name, done, total)
        if self.world.size > 1:
            counts = torch.tensor(self.signals.counts, device=self.engine.device)
            dist.all_reduce(counts)
            if number := stop_signal(counts.tolist()):
                raise Stopped(number)

    def _save(self, done: int, ends_epoch: bool, stop: signal.Signals | None) -> None:
        """Start to save a checkpoint after every epoch, every N steps, at the end, or after a signal on any rank.

        No checkpoint is saved while steps are being skipped: the last good one stays the newest. A run that a signal
        stops waits for its checkpoint.
        """
        t = self.config.train
        epochs = self.engine.position(done)[0]
        keep = ends_epoch and (epochs % t.saveckp_freq == 0 or (bool(self.reference) and epochs % t.knn_every == 0))
        due = ends_epoch or (bool(t.saveckp_freq_steps) and done % t.saveckp_freq_steps == 0)
        if (due and not self.guard.consecutive) or stop or done == self.last:
            if not self.engine.finite():
                raise Diverged(f"the weights are not finite after step {done}. Lower --lr or set --clip_grad.")
            if self.recorder:
                self.recorder.sync()
            self.publisher.publish(self._card(done), keep=keep)
            self.rollback_source = "auto"
        else:
            self.publisher.check(done)
        if stop and done < self.last:
            self.publisher.wait()
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
            images=len(self.splits.train),
            data=self.data.train.digest,
            steps_per_epoch=self.engine.steps_per_epoch,
            ahead=self.engine.ahead,
        )

    def _introduce(self, display: Display, done: int, notes: Sequence[str]) -> None:
        c, t, engine = self.config, self.config.train, self.engine
        parameters = sum(full_numel(p) for p in self.method.student.parameters())
        display.note(f"{c.title}  {t.arch}, {parameters / 1e6:.2f} M parameters, recipe {c.recipe}")
        display.note(
            f"{self.last:,} steps of {global_batch(t, self.world)} images, {self.world.size} x {engine.device.type}, "
            f"{engine.precision}, ZeRO {engine.stage}, into {self.output}"
        )
        if done:
            display.note(f"resumed after step {done}")
        for line in self.method.warnings_for(len(self.splits.train), engine.rows):
            display.note(line)
        for line in (
            *without_effect(c, self.method.backbone),
            *slow_random_layers(c, has_weights=self.has_weights),
            *notes,
        ):
            display.note(line)

    def _unreadable(self) -> int:
        """Return the number of unreadable images and damaged shards over all ranks."""
        return len(of_all_ranks({*self.loader.bad, *self.evaluator.bad, *self.splits.damaged}, self.world.size))

    def _summary(
        self,
        logged: dict[str, Any],
        evaluation: dict[str, float | None] | None,
        baseline: Baseline,
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
            "epochs": (self.last + self.engine.ahead) / self.engine.steps_per_epoch,
            "steps": self.last,
            "seconds": seconds,
            "images_per_s": steps * global_batch(t, self.world) / seconds,
            "world_size": self.world.size,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if self.engine.device.type == "cuda" else None,
            "knn_top1": evaluation and evaluation["knn_top1"],
            "knn_top1_untrained": baseline.untrained,
            "knn_top1_pixels": baseline.pixels,
            "knn_train_images": evaluation and self.evaluator.images[0],
            "knn_val_images": evaluation and self.evaluator.images[1],
            "rankme": evaluation and evaluation["rankme"],
            **({name: evaluation and evaluation[name] for name in REFERENCE_KEYS} if self.reference else {}),
            **{name: logged.get(name) for name in BOUND},
            "skipped_steps": self.guard.skipped,
            "rollbacks": self.rollbacks,
            "collapsed": self.loop.collapse.collapsed
            or (evaluation is not None and (evaluation["rankme"] or 0) < _COLLAPSED_RANK),
        }

    def close(self) -> None:
        self.evaluator.close()
        if self.reference:
            self.reference.close()
        self.loader.close()
        self.engine.close()


def _factory(network: nn.Module | Network | None, config: Config) -> Network | None:
    """Return a function that builds the given backbone, or None to build ``config.train.arch``."""
    if network is None:
        return None
    size = config.views.views[0].size
    return lambda channels: user_backbone(network, channels, size)


def _start_from(method: Method, tensors: dict[str, torch.Tensor], origin: str) -> Report:
    """Load weights into all copies of a method's backbone, and report them. Heads keep their random start.

    Raise ConfigError if the weights are of another network.
    """
    if bad := next((name for name, tensor in tensors.items() if tensor.isnan().any()), None):
        raise ConfigError(f"{origin}: {bad!r} has NaN values. Use the weights of a run that did not diverge.")
    reports = [load_weights(backbone, tensors, origin) for backbone in method.backbones]
    return reports[0]


def _fit(config: Config, data: Splits, output: Path, world: World) -> Fit:
    """Fit the configuration to the data, or to the run in the folder that it continues. Collective."""
    former: dict[str, Any] = {}
    if world.is_main and config.train.resume == "auto" and (output / "config.yaml").is_file():
        former = read_yaml(output / "config.yaml")
    return fit_to_data(config, len(data.train), all_gather_object(world, former)[0])


def _finished(config: Config, output: Path, world: World) -> dict[str, Any] | None:
    """Return the summary of a run that ended with exactly this configuration, or None. Collective."""
    summary, settings = read_summary(output) if world.is_main else None, output / "config.yaml"
    if summary is not None and (
        config.train.resume != "auto"
        or summary.get("world_size") != world.size
        or not settings.is_file()
        or settings.read_text() != config.with_absolute_paths().to_yaml()
        or not is_complete(output / "checkpoints" / tag(summary["steps"]))
    ):
        summary = None
    return all_gather_object(world, summary)[0]
