"""Write report.html for one run or several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError, printable
from ..flags import user_path
from ..pipelines import Splits
from ..training.display import DataNotes
from .page import Pictures, images_of, pictures, render, warnings
from .runs import Run, read_runs
from .samples import Sample, look

IMAGES = 1000
"""Images in the map of features, by default."""


def write_report(
    runs: Sequence[Path], output: Path | None = None, *, images: int = IMAGES, splits: Splits | None = None
) -> tuple[Path, int]:
    """Write the page of these runs; return its path and its size in bytes. Print what is left out on stderr.

    With ``images`` 0 the page shows only logged values and opens neither data nor network. ``splits`` are the images of
    runs whose data has no path. Raise ConfigError if there is no run, a run has not logged a step, or the page cannot
    be written.
    """
    described = read_runs(runs)
    for line in warnings(described) + [
        f"{run.name} {run.state}." for run in described if run.state.startswith("never")
    ]:
        _note(line)
    count = images_of(len(described), images)
    drawn = [_pictures(run, count, splits) for run in described] if images else []
    page = render(described, drawn).encode(errors="backslashreplace")  # a file's name may not be UTF-8
    path = described[0].path / "report.html" if output is None else user_path(output)
    try:
        path.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}.") from None
    return path, len(page)


def _pictures(run: Run, images: int, splits: Splits | None) -> Pictures:
    sample: Sample | str
    with DataNotes():
        try:
            sample = look(run, images, splits)
        except (ConfigError, DataError) as error:
            sample = str(error)
        drawn = pictures(run, sample)
    if isinstance(sample, str):
        _note(f"{run.name}: no map, no neighbours, no attention, no patches: {sample}")
        return drawn
    panels = {"map": drawn.map, "neighbours": drawn.neighbours, "attention": drawn.attention, "patches": drawn.patches}
    for name, panel in panels.items():
        if panel.missing:
            _note(f"{run.name}: no {name}: {panel.missing}.")
    if sample.labels is None:
        _note(f"{run.name}: the data has no labels, so classes are not marked.")
    return drawn


def _note(line: str) -> None:
    print(f"fasttrain: {printable(line)}", file=sys.stderr)
