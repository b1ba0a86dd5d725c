"""``fasttrain report RUN...`` and ``fasttrain report --views``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed.world import prepare_environment

if TYPE_CHECKING:
    from ..pipelines import Splits
    from ..report.page import Pictures
    from ..report.runs import Run

_IMAGES = 1000


def main(arguments: Sequence[str]) -> int:
    """Draw what the arguments ask for; returns the exit status, 2 with one line for what cannot be used."""
    prepare_environment()
    try:
        from ..errors import ConfigError
        from ..pipelines import DataError
        from ..report.contact_sheet import main as views
    except ModuleNotFoundError as error:
        return _fail(f"a report needs {error.name}; type: pip install 'fasttrain[train]'")
    try:
        if "--views" in arguments:
            return views([word for word in arguments if word != "--views"])
        return _report(arguments)
    except (ConfigError, DataError) as error:
        return _fail(str(error))


def _report(arguments: Sequence[str]) -> int:
    from ..config.arguments import Parser, underscored
    from ..errors import ConfigError

    parser = Parser(
        prog="fasttrain report",
        description="Write a page that shows one run, or several beside each other; or, with --views and a training's "
        "flags, a contact sheet of the views that it would see.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders that trainings wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    images = f"images in the map of features (default: {_IMAGES}); 0 leaves out all that needs the data"
    parser.add_argument("--images", type=int, default=_IMAGES, metavar="N", help=images)
    parser.add_argument("--views", action="store_true", help="with a training's flags: a contact sheet of its views")
    given = parser.parse_args([underscored(a) for a in arguments])
    if not given.runs:
        raise ConfigError("report of what? give the folders of runs, or --views and a training's flags")
    if given.images < 0:
        raise ConfigError(f"--images must be at least 0, got {given.images}")
    path, size = report(given.runs, given.output, images=given.images)
    count = len(set(given.runs))
    print(f"{path}: {count} run{'s' * (count > 1)}, {size / 1e3:,.0f} kB")
    return 0


def report(
    runs: Sequence[Path], output: Path | None = None, *, images: int = _IMAGES, splits: Splits | None = None
) -> tuple[Path, int]:
    """Write the page of these runs; returns its path and its size in bytes. Lines on stderr say what is left out.

    With ``images`` 0 only what was logged is shown, and neither data nor network is opened. ``splits`` are the images
    of runs whose data has no path. Raises ConfigError where there is no run, none has logged a step, or the page cannot
    be written.
    """
    from ..errors import ConfigError
    from ..report.page import images_of, render, warnings
    from ..report.runs import read_runs

    found = read_runs(runs)
    for line in warnings(found) + [f"{run.name} {run.state}." for run in found if run.state.startswith("never")]:
        _note(line)
    drawn = [_pictures(run, images_of(len(found), images), splits) for run in found] if images else []
    page = render(found, drawn).encode(errors="backslashreplace")  # a file's name may be no UTF-8
    path = found[0].path / "report.html" if output is None else output.expanduser()
    try:
        path.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from None
    return path, len(page)


def _pictures(run: Run, images: int, splits: Splits | None) -> Pictures:
    from ..errors import ConfigError
    from ..pipelines import DataError
    from ..report.page import pictures
    from ..report.samples import Sample, look
    from ..training.display import DataNotes

    sample: Sample | str
    with DataNotes():
        try:
            sample = look(run, images, splits)
        except (ConfigError, DataError) as error:
            sample = str(error)
        drawn = pictures(run, sample)
    if isinstance(sample, str):
        _note(f"{run.name}: no map, no neighbours, no attention: {sample}.")
    else:
        panels = {"map": drawn.map, "neighbours": drawn.neighbours, "attention": drawn.attention}
        for name, panel in panels.items():
            if panel.missing:
                _note(f"{run.name}: no {name}: {panel.missing}.")
        if sample.labels is None:
            _note(f"{run.name}: the data has no labels, so nothing is coloured or marked by class.")
    return drawn


def _note(line: str) -> None:
    print(f"fasttrain: {line}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"fasttrain: {message}", file=sys.stderr)
    return 2
