"""The live display, in terminals and notebooks, and plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SHOWN = {
    "images_per_s": "{:,.0f} img/s",
    "loss": "loss {:.4f}",
    "entropy": "entropy {:.3f}",
    "reconstruction": "reconstruction {:.3f}",
    "information": "information {:.3f}",
    "knn_top1": "k-NN {:.3f}",
}
_NOTEBOOK = 150  # columns; the cell scrolls where it is narrower


class Display:
    """One bar over all steps with the latest figures, in a terminal or a notebook that has ipywidgets.

    Elsewhere a line every ``interval`` seconds.
    """

    def __init__(self, total: int, done: int = 0, *, console: Console | None = None, interval: float = 10.0) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        if console is None and self.console.is_jupyter:
            self.console.width = _NOTEBOOK
        self.total, self.first, self.done = total, done, done
        self.interval = interval
        self._figures: dict[str, float] = {}
        self._started = time.monotonic()
        self._printed = -float("inf")
        columns = (
            TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}[/] steps"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)
        self._bar = Progress(*columns, console=self.console) if live else None
        self._task = self._bar.add_task("train", total=total, completed=done, figures="") if self._bar else None

    def step(self, done: int, values: dict[str, Any] | None = None) -> None:
        """Show that ``done`` steps are made, with new figures where there are any."""
        self.done = done
        if values:
            self._figures |= {k: v for k, v in values.items() if k in _SHOWN and v is not None}
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=self._text())
        elif values and (time.monotonic() - self._printed >= self.interval or done == self.total):
            self._printed = time.monotonic()
            self.console.print(f"step {done}/{self.total}  {self._text()}  {self._left()} left")

    def note(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(line)

    def _text(self) -> str:
        return "  ".join(form.format(self._figures[k]) for k, form in _SHOWN.items() if k in self._figures)

    def _left(self) -> str:
        elapsed = time.monotonic() - self._started
        seconds = int(elapsed / max(self.done - self.first, 1) * (self.total - self.done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

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
            print(record.getMessage().encode(coding, "backslashreplace").decode(coding), flush=True)

    def __enter__(self) -> DataNotes:
        logging.getLogger("fasttrain.data").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        logging.getLogger("fasttrain.data").removeHandler(self)
