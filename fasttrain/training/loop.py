"""The loop over steps: data, step, record, monitors, evaluation, checkpoint. It reads from top to bottom."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..config.settings import TrainConfig
from ..distributed.lockstep import Feed, in_step
from ..distributed.signals import Signals, stop_signal
from ..distributed.watchdog import Watchdog
from ..distributed.world import all_gather_object
from ..engine.engine import Engine
from ..errors import Collapsed
from ..evaluate.evaluator import ShowProgress
from ..pipelines import Batch, Loader
from .display import Display
from .garbage import GarbageCollection
from .guard import Finding, Guard
from .monitors import CollapseMonitor, SpikeMonitor, describe_spike
from .records import Meter, Recorder, epoch_line, metrics_line

_FIRST_PASS = -1
"""The epoch number of the initial pass in which a method may need to see every image."""


@dataclass
class Progress:
    """The position of a loop and what it has logged."""

    done: int
    """Finished optimizer steps."""
    logged: dict[str, Any] = field(default_factory=dict)
    """The newest line of metrics.jsonl."""
    epoch_lines: list[dict[str, Any]] = field(default_factory=list)
    """The lines of the current epoch's good steps, for its line in log.txt."""
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def resumed(cls, done: int, past: list[dict[str, Any]], of_epoch: int) -> Progress:
        """Return the progress after ``done`` steps, from the lines that an earlier part of the run logged.

        ``of_epoch`` of the steps are of the current epoch.
        """
        epoch_start = done - of_epoch
        lines = [line for line in past if line["step"] > epoch_start and line.get("grad_norm", 0) is not None]
        return cls(done, past[-1] if past else {}, lines)


class Loop:
    """Makes the steps of a run.

    ``evaluate`` measures the backbone and returns what to log. ``progress`` shows the images of a first pass. ``save``
    receives the finished steps, whether an epoch ended, and the signal that stops the run, if any. ``advice`` says what
    to change against a collapse.
    """

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        loader: Loader,
        guard: Guard,
        watchdog: Watchdog,
        *,
        evaluate: Callable[[int], dict[str, float | None]],
        progress: ShowProgress,
        save: Callable[[int, bool, signal.Signals | None], None],
        advice: str,
    ) -> None:
        self.train, self.engine, self.loader, self.guard, self.watchdog = train, engine, loader, guard, watchdog
        self.evaluate, self.progress, self.save, self.advice = evaluate, progress, save, advice
        self.garbage = GarbageCollection(engine.world.size)
        self.collapse, self.spikes = CollapseMonitor(engine.steps_per_epoch), SpikeMonitor()

    def run(
        self, done: int, last: int, signals: Signals, recorder: Recorder | None, display: Display | None
    ) -> dict[str, Any]:
        """Make the steps after ``done`` up to ``last``; return the newest line of metrics.jsonl."""
        engine = self.engine
        if not done and engine.method.needs_first_pass:
            with signals.raising(engine.world.size):
                engine.first_pass(self._first_pass())
        progress = Progress.resumed(done, recorder.past if recorder else [], engine.position(done)[1])
        self.watchdog.step_done()
        self._finish_last_line(progress, last, recorder)
        if display:
            display.begin(done)
        with self.garbage:
            while progress.done < last:
                self._epoch(progress, last, signals, recorder, display)
        return progress.logged

    def _finish_last_line(self, progress: Progress, last: int, recorder: Recorder | None) -> None:
        """Make the evaluation that an earlier process did not finish after its checkpoint. Collective."""
        epoch, offset = self.engine.position(progress.done)
        due = not offset and 0 < progress.done < last and self._evaluates_after(epoch - 1)
        line = progress.logged
        lacking = due and line.get("step") == progress.done and "knn_top1" not in line
        if all_gather_object(self.engine.world, lacking)[0]:
            self._evaluate_last_line(progress, recorder)

    def _evaluate_last_line(self, progress: Progress, recorder: Recorder | None) -> None:
        """Add an evaluation to the newest line of metrics.jsonl. Collective."""
        added = self.evaluate(progress.done)
        progress.logged, progress.meter = progress.logged | added, Meter()
        if recorder:
            recorder.extend_last(progress.done, added)

    def _first_pass(self) -> Iterator[Batch]:
        """Yield every image once, with its progress."""
        done, total = 0, self.loader.steps_per_epoch * self.loader.batch_size * self.loader.world_size
        for batch in in_step(self.loader, _FIRST_PASS):
            yield batch
            done += self.loader.batch_size * self.loader.world_size
            self.progress("first pass", done, total)

    def _epoch(
        self, progress: Progress, last: int, signals: Signals, recorder: Recorder | None, display: Display | None
    ) -> None:
        """Make the remaining steps of an epoch."""
        engine, micro_steps = self.engine, self.train.gradient_accumulation_steps
        epoch, offset = self.engine.position(progress.done)
        if not offset:
            engine.start_epoch(epoch)
        feed = Feed(self.loader, epoch, offset * micro_steps)
        for index in range(offset, engine.steps_per_epoch):
            ends_epoch = index + 1 == engine.steps_per_epoch
            evaluates = ends_epoch and self._evaluates_after(epoch) and progress.done + 1 < last
            only_line = ends_epoch and engine.steps_per_epoch < self.train.log_every
            logs = self._logs(progress.done, last) or evaluates or only_line
            step = engine.step_at(progress.done, measure=logs)
            micro_batches = (self._next(feed, progress.meter) for _ in range(micro_steps))
            objective, finding = self.guard.step(micro_batches, step, signals, lambda: feed.failure is not None)
            if finding.data_failed:
                feed.raise_failure()
            progress.done += 1
            self.watchdog.step_done()
            self.garbage.step_done(progress.done, ends_epoch=ends_epoch)
            if logs:
                line = metrics_line(engine, step, objective, finding, self.guard.skipped, progress.meter)
                if finding.fault is None:
                    progress.epoch_lines.append(line)
                progress.logged, progress.meter = line, Meter()
                if recorder:
                    recorder.step(line)
            if display:
                display.step(progress.done, progress.logged if logs else None)
            self._monitor(progress, finding, display, logged=logs)
            if ends_epoch and recorder:
                recorder.epoch(epoch_line(epoch, progress.done, progress.epoch_lines))
            stop = stop_signal(signals.counts) if engine.world.size == 1 else finding.stop
            self.save(progress.done, ends_epoch, stop)
            if evaluates and not self.guard.consecutive:  # while the checkpoint is being written
                self._evaluate_last_line(progress, recorder)
                if display:
                    display.step(progress.done, progress.logged)
            if progress.done >= last:
                break
        progress.epoch_lines = []
        feed.close()

    def _evaluates_after(self, epoch: int) -> bool:
        every = self.train.knn_every
        return bool(every) and (epoch + 1) % every == 0

    def _logs(self, done: int, last: int) -> bool:
        return done == 0 or (done + 1) % self.train.log_every == 0 or done + 1 == last

    def _next(self, feed: Feed, meter: Meter) -> Batch:
        since = time.perf_counter()
        batch = feed.next()
        meter.waited += time.perf_counter() - since
        meter.images += len(batch.indices) * self.engine.world.size
        return batch

    def _monitor(self, progress: Progress, finding: Finding, display: Display | None, *, logged: bool) -> None:
        """Report skipped steps, spikes and a collapse. Raise Diverged or Collapsed if the run should stop."""
        step, notes = progress.done, list[str]()
        if finding.fault is not None:
            notes.append(f"skipped: {finding.fault}")
        elif spike := self.spikes.observe(finding.terms["loss"]):
            notes.append(describe_spike(spike, step, finding.terms, progress.logged))
        if logged and finding.fault is None and (sign := self.collapse.observe(progress.logged)):
            notes.append(f"step {step}: collapsing: {sign}. {self.advice}")
        if display:
            for line in notes:
                display.note(line)
        self.guard.judge(finding)
        if logged and self.train.stop_on_collapse and self.collapse.final:
            raise Collapsed(f"collapsed: {self.collapse.sign} at step {step}. {self.advice}")
