"""The live display, in terminals and notebooks, and plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import printable

_SHOWN = {
    "images_per_s": "{:,.0f} img/s",
    "loss": "loss {:.4f}",
    "entropy": "entropy {:.3f}",
    "reconstruction": "reconstruction {:.3f}",
    "information": "information {:.3f}",
    "knn_top1": "k-NN {:.3f}",
}
_NOTEBOOK = 150  # columns; the cell scrolls where it is narrower
_FIRST_STEPS = 10
"""Steps, or seconds if that is sooner, after which the duration of the whole run is estimated."""
_DAY = 86_400


class _LineConsole(Console):
    """A console whose lines cannot control the terminal, whatever names they hold."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)


def new_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console for lines that may hold brackets and may be longer than the terminal is wide."""
    console = _LineConsole(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True, markup=False)
    if console.is_jupyter:
        console.width = _NOTEBOOK
    return console


class Display:
    """One bar over all steps with the latest figures, in a terminal or a notebook that has ipywidgets.

    Elsewhere a line every ``interval`` seconds. ``too_long`` is printed if the run will take more than a day.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        console: Console | None = None,
        interval: float = 10.0,
        too_long: str | None = None,
    ) -> None:
        self.console = console or new_console()
        self.total, self.first, self.done = total, done, done
        self.interval, self.too_long = interval, too_long
        self._figures: dict[str, float] = {}
        self._started = self._first_done = time.monotonic()
        self._estimated = False
        self._printed = -float("inf")
        columns = (
            TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}[/] {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)
        self._bar = Progress(*columns, console=self.console) if live else None
        self._task: TaskID | None = None
        self._work: tuple[str, TaskID | None, float] | None = None
        """Work between steps: its name, its bar, and when it started."""

    def begin(self, done: int) -> None:
        """Start the clock of the training, which continues after ``done`` steps."""
        self.first = self.done = done
        self._started = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("steps", total=self.total, completed=done, figures="")

    def step(self, done: int, values: dict[str, Any] | None = None) -> None:
        """Show that ``done`` steps are made, with new figures where there are any."""
        self.done = done
        if done == self.first + 1:  # the first step compiles and allocates
            self._first_done = time.monotonic()
        self._estimate()
        if values:
            self._figures |= {k: v for k, v in values.items() if k in _SHOWN and v is not None}
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=self._text())
        elif values and (time.monotonic() - self._printed >= self.interval or done == self.total):
            self._printed = time.monotonic()
            left = (time.monotonic() - self._started) / max(done - self.first, 1) * (self.total - done)
            self.console.print(f"step {done}/{self.total}  {self._text()}  {_clock(left)} left")

    def work(self, name: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images of the work ``name`` are done, with the time left."""
        now = time.monotonic()
        if self._work is None or self._work[0] != name:
            task = self._bar.add_task(f"images, {name}", total=total, figures="") if self._bar else None
            self._work, self._printed = (name, task, now), now
        _, task, started = self._work
        if self._bar is not None and task is not None:
            self._bar.update(task, completed=done)
            if done == total:
                self._bar.remove_task(task)
        elif now - self._printed >= self.interval and done < total:
            self._printed = now
            left = (now - started) / done * (total - done)
            self.console.print(f"{name}: {done:,}/{total:,} images  {_clock(left)} left")
        if done == total:
            self._work, self._printed = None, -float("inf")

    def _estimate(self) -> None:
        """Print, once and after the first steps, how long the rest of the run takes."""
        steps, seconds = self.done - self.first - 1, time.monotonic() - self._first_done
        if self._estimated or steps < 1 or (steps < _FIRST_STEPS and seconds < _FIRST_STEPS):
            return
        self._estimated = True
        left = seconds / steps * (self.total - self.first)
        if left >= 60:
            self.note(f"at the speed of the first steps, the {self.total - self.first:,} steps take {duration(left)}")
        if left > _DAY and self.too_long:
            self.note(self.too_long)

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(line)

    def _text(self) -> str:
        return "  ".join(form.format(self._figures[k]) for k, form in _SHOWN.items() if k in self._figures)

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.refresh()  # rich leaves a notebook's bar where it was last drawn
            self._bar.stop()


def duration(seconds: float) -> str:
    """Return a time in words, rounded to minutes: ``2 days 3 h``, ``4 h 10 min``, ``5 min``."""
    minutes = max(round(seconds / 60), 1)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} day{'s' * (days > 1)} {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class DataNotes(logging.Handler):
    """Prints each line about a file that cannot be read once, whichever loaders meet it; stderr stays for the end."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[object] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record unless its file was named before."""
        name = record.args[0] if isinstance(record.args, tuple) and record.args else record.msg
        if name not in self._told:
            self._told.add(name)
            coding = sys.stdout.encoding or "utf-8"  # a file's name may have what the stream refuses
            print(printable(record.getMessage()).encode(coding, "backslashreplace").decode(coding), flush=True)

    def __enter__(self) -> DataNotes:
        logging.getLogger("fasttrain.data").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        logging.getLogger("fasttrain.data").removeHandler(self)
