"""A run from configuration to summary: build, loop, evaluate, record."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import store
from ..checkpoint.card import Card, changes, check, read_card
from ..checkpoint.provenance import provenance
from ..cli.report import report
from ..config.settings import Config
from ..distributed.lockstep import in_step, of_all_ranks
from ..distributed.signals import Signals, stop_signal
from ..distributed.watchdog import Watchdog
from ..distributed.world import World
from ..engine.build import build_method, doubts
from ..engine.engine import Engine, global_batch
from ..engine.zero import full_numel
from ..errors import Collapsed, ConfigError, Diverged, Interrupted
from ..evaluate.evaluator import Evaluation, Evaluator
from ..files import DISK_ERRORS
from ..methods import Method
from ..models.weights import start_from
from ..pipelines import Batch, DataError, Loader, Splits, open_source
from .display import DataNotes, Display
from .guard import Finding, Guard
from .metrics import Meter, metrics_line
from .monitors import Watch
from .records import Recorder, epoch_line, output_folder, read_summary, write_summary
from .spikes import Spikes, told

_COLLAPSED_RANK = 2
_BOUND = ("entropy", "entropy_max", "reconstruction", "information", "deficit")
_BEFORE = -1  # the number of the epoch that a method may see before the first


def train(config: Config, world: World, splits: Splits | None = None) -> dict[str, Any]:
    """Train, and return what ``summary.json`` holds.

    ``splits`` are images that no path names, such as those of ``source_from_dataset``; ``data_path`` is then not read.
    Raises ConfigError or DataError for what cannot be run or has no room on the disk, Diverged where loss or gradient
    stay not finite, Collapsed, Interrupted after a signal, and Crashed for any other error, if this is the only rank:
    of several, one that fails ends its process and thereby the others. Collective: every rank calls it.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.enter_context(DataNotes())
        watchdog = stack.enter_context(Watchdog(world, config.train.watchdog_minutes))
        try:
            run = _Run(config, world, splits, watchdog)
            stack.callback(run.close)
            return run.train(signals)
        except (ConfigError, DataError, Diverged, Collapsed, Interrupted):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                what = os.fsdecode(error.filename or "a file of the run")  # TensorBoard's names are bytes
                raise ConfigError(f"{what} cannot be written: {error.strerror}; make room, then start again") from None
            raise watchdog.crashed(error) from error


class _Run:
    def __init__(self, config: Config, world: World, splits: Splits | None, watchdog: Watchdog) -> None:
        t = config.train
        self.config, self.world, self.watchdog = config, world, watchdog
        torch.use_deterministic_algorithms(t.deterministic)
        self.output = watchdog.folder = output_folder(config, world)
        self.origin = provenance(config) if world.is_main else {}  # the others write no card
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
                f"a batch of {global_batch(t, world)} images is larger than the data ({len(self.splits.train)}); "
                "lower --batch_size_per_gpu or --gradient_accumulation_steps"
            )
        torch.manual_seed(t.seed)
        method = build_method(config, images=len(self.splits.train), world_size=world.size)
        if t.init_from is not None:
            start_from(method, Path(t.init_from))
        self.engine = Engine(config, method, world, steps_per_epoch=steps_per_epoch)
        self.rollbacks = 0
        self.good = "never"
        """Where a rollback goes, as ``--resume`` has it; not to what another run has left in the folder."""
        self.guard = Guard(self.engine, t.max_skipped_steps)
        self.watch, self.spikes = Watch(steps_per_epoch), Spikes()
        self.evaluator = Evaluator(self.splits, config, self.engine.device, world)
        self.last = min(self.engine.total_steps, t.limit_steps or self.engine.total_steps)

    @property
    def method(self) -> Method:
        return self.engine.method

    def train(self, signals: Signals) -> dict[str, Any]:
        t, main = self.config.train, self.world.is_main
        found, notes = store.choose(t.resume, self.output, self.world)
        if found is not None:  # before any work: a wrong checkpoint is known from its card
            notes += changes(check(found, self._card(0)), self._card(0))
            self.good = t.resume
        untrained, pixels = self.evaluator.backbone(self.method.backbone), self.evaluator.pixels()
        done = 0 if found is None else self._restore(found)
        self.last = max(self.last, done)
        if done == self.last and (summary := read_summary(self.output)) and summary.get("steps") == done:
            return summary  # finished before: nothing to train, and its times stay what they were
        display = Display(self.last, done) if main else None
        with ExitStack() as stack:
            if main:
                (self.output / "config.yaml").write_text(self.config.anywhere().to_yaml())
            if display:
                self._introduce(display, done, untrained.knn_top1, pixels)
                for line in notes:
                    display.note(line)
                stack.enter_context(display)
            started = time.perf_counter()
            final = self._loops(done, signals, display)
            seconds = time.perf_counter() - started
            evaluation = self._evaluate(self.last)
            summary = self._summary(final, evaluation, untrained.knn_top1, pixels, seconds, self.last - done)
            if main:
                write_summary(self.output, summary)
            if display and done < self.last:
                report([self.output], images=0)  # what was logged; the pictures take time and the data
                display.note(f"{self.output}/report.html shows it; fasttrain report {self.output} adds pictures")
        return summary

    def _restore(self, found: Path) -> int:
        """Take everything from a store, what the guard counted and the order of the data too; returns its step."""
        card, done = read_card(found), store.restore(self.engine, found, self._card(0))
        self.guard.skipped, self.guard.row = card.skipped_steps, 0
        self._order(card.rollbacks)
        return done

    def _order(self, rollbacks: int) -> None:
        """See the data as if the seed were higher by the rollbacks, which checkpoints hold."""
        self.rollbacks = rollbacks
        self.loader.seed = (self.config.train.seed + rollbacks) % 2**63

    def _loops(self, done: int, signals: Signals, display: Display | None) -> dict[str, Any]:
        """The loop, and after a divergence the loop again from the last store, in another order of the data."""
        while True:
            try:
                with Recorder(self.output, resumed_at=done) if self.world.is_main else nullcontext() as recorder:
                    return self._loop(done, signals, recorder, display)
            except Diverged as error:
                if self.rollbacks >= self.config.train.rollback:
                    raise
                found, notes = store.choose(self.good, self.output, self.world)
                if found is None:
                    raise
                rollbacks = self.rollbacks + 1
                done = self._restore(found)
                self._order(rollbacks)
                if display:
                    for line in notes:
                        display.note(line)
                    display.note(f"{error}: rolled back to step {done} ({rollbacks} of {self.config.train.rollback})")

    def _loop(self, done: int, signals: Signals, recorder: Recorder | None, display: Display | None) -> dict[str, Any]:
        t, engine = self.config.train, self.engine
        micro_steps = t.gradient_accumulation_steps
        if not done and self.method.needs_first_pass:
            engine.first_pass(in_step(self.loader, _BEFORE))
        meter, past = Meter(), recorder.past if recorder else []
        logged = past[-1] if past else {}
        epoch_start = done - done % engine.steps_per_epoch
        epoch_values = [
            values for values in past if values["step"] > epoch_start and values.get("grad_norm", 0) is not None
        ]
        self.watchdog.step_done()
        while done < self.last:
            epoch, offset = divmod(done, engine.steps_per_epoch)
            if not offset:
                engine.start_epoch(epoch)
            batches = in_step(self.loader, epoch, offset * micro_steps)
            for index in range(offset, engine.steps_per_epoch):
                last_of_epoch = index + 1 == engine.steps_per_epoch
                evaluate = bool(t.knn_every) and last_of_epoch and (epoch + 1) % t.knn_every == 0
                evaluate = evaluate and done + 1 < self.last  # after the last step all is evaluated anyway
                log = done == 0 or (done + 1) % t.log_every == 0 or done + 1 == self.last or evaluate
                step = engine.step_at(done, measure=log)
                micro_batches = (self._next(batches, meter) for _ in range(micro_steps))
                objective, found = self.guard.step(micro_batches, step, signals)
                done += 1
                self.watchdog.step_done()
                if log:
                    logged = metrics_line(engine, step, objective, found, self.guard.skipped, meter)
                    if found.fault is None:
                        epoch_values.append(logged)
                    if evaluate and not self.guard.row:
                        evaluation = self._evaluate(done)
                        logged = logged | {"knn_top1": evaluation.knn_top1, "rankme": evaluation.rankme}
                    meter = Meter()
                if log and recorder:
                    recorder.step(logged)
                if display:
                    display.step(done, logged if log else None)
                self._judge(done, found, logged, display)
                if last_of_epoch and recorder:
                    recorder.epoch(epoch_line(epoch, done, epoch_values))
                self._save(done, last_of_epoch, found.stop if self.world.size > 1 else stop_signal(signals.counts))
                if done >= self.last:
                    break
            epoch_values = []
            batches.close()
        return logged

    def _judge(self, step: int, found: Finding, logged: dict[str, Any], display: Display | None) -> None:
        """Stop a run that has no future, and say early what points to one: skipped steps, spikes, a collapse."""
        if found.fault is not None and display:
            display.note(f"skipped: {found.fault}")
        self.guard.judge(found)
        if found.fault is None and (spike := self.spikes.look(found.terms["loss"])) and display:
            display.note(told(spike, step, found.terms, logged))
        if logged.get("step") != step or found.fault is not None:
            return
        if (what := self.watch.look(logged)) and display:
            display.note(f"step {step}: collapsing: {what}; {self._against_collapse()}")
        if self.config.train.stop_on_collapse and self.watch.hopeless:
            raise Collapsed(f"collapsed: {self.watch.what} at step {step}; {self._against_collapse()}")

    def _against_collapse(self) -> str:
        return "lower --lr" if self.config.entropy else "try --entropy, or a lower --lr"

    def _evaluate(self, done: int) -> Evaluation:
        with self.watchdog.suspended():
            evaluation = self.evaluator.backbone(self.method.backbone)
        if not evaluation.finite:
            raise Diverged(f"the weights are not finite after step {done}; lower --lr or set --clip_grad")
        return evaluation

    def _next(self, batches: Iterator[Batch], meter: Meter) -> Batch:
        since = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - since
        meter.images += len(batch.indices) * self.world.size
        return batch

    def _save(self, done: int, last_of_epoch: bool, stopping: signal.Signals | None) -> None:
        """Publish a checkpoint after every epoch, by steps, at the end, or because of a signal on any rank.

        Not while steps are being skipped: what they could not be made from would take the last good one's place.
        """
        t = self.config.train
        keep = last_of_epoch and done // self.engine.steps_per_epoch % t.saveckp_freq == 0
        due = last_of_epoch or (bool(t.saveckp_freq_steps) and done % t.saveckp_freq_steps == 0)
        if (due and not self.guard.row) or stopping or done == self.last:
            if not self.engine.finite():  # the last good checkpoint stays the last
                raise Diverged(f"the weights are not finite after step {done}; lower --lr or set --clip_grad")
            folder = self.output / "checkpoints"
            store.publish(self.engine, folder, self._card(done), keep=keep, newest=t.keep)
            self.good = "auto"
        if stopping and done < self.last:
            raise Interrupted(stopping, done, self.output)

    def _card(self, step: int) -> Card:
        c = self.config
        t, size, stage = c.train, self.world.size, self.engine.stage
        batch, counts = global_batch(t, self.world), (self.guard.skipped, self.rollbacks)
        return Card(
            c.method, c.entropy, t.arch, t.optimizer, step, size, stage, __version__, batch, self.origin, *counts
        )

    def _introduce(self, display: Display, done: int, untrained: float | None, pixels: float | None) -> None:
        c, t, engine = self.config, self.config.train, self.engine
        parameters = sum(full_numel(p) for p in self.method.student.parameters())
        display.note(f"{_title(c)}  {t.arch}, {parameters / 1e6:.2f} M parameters, on {self.splits.name}")
        display.note(
            f"{len(self.splits.train):,} images, {self.last:,} steps of {global_batch(t, self.world)}, "
            f"{self.world.size} x {engine.device.type}, {engine.precision}, ZeRO {engine.stage}, into {self.output}"
        )
        if done:
            display.note(f"resumed after step {done}")
        for name, damage in self.splits.damaged.items():
            display.note(f"{name}: {damage}")
        for line in doubts(c, images=len(self.splits.train), batch=engine.rows):
            display.note(line)
        if untrained is None:
            display.note(f"no k-NN accuracy: the data has no {self.splits.missing_for_knn}")
        else:
            raw = "left out: more than 2 GiB" if pixels is None else f"{pixels:.3f}"
            display.note(f"k-NN before training: untrained network {untrained:.3f}, raw pixels {raw}")

    def _unreadable(self) -> int:
        """Images that any rank could not read, and shards of which a part is lost."""
        return len(of_all_ranks({*self.loader.bad, *self.evaluator.bad, *self.splits.damaged}, self.world.size))

    def _summary(
        self,
        logged: dict[str, Any],
        evaluation: Evaluation,
        untrained: float | None,
        pixels: float | None,
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
            "knn_top1_untrained": untrained,
            "knn_top1_pixels": pixels,
            "rankme": evaluation.rankme,
            **{name: logged.get(name) for name in _BOUND},
            "skipped_steps": self.guard.skipped,
            "rollbacks": self.rollbacks,
            "collapsed": self.watch.collapsed or evaluation.rankme < _COLLAPSED_RANK,
        }

    def close(self) -> None:
        self.evaluator.close()
        self.loader.close()
        self.engine.close()


def _title(config: Config) -> str:
    return config.method + ("+ER" if config.entropy else "")
