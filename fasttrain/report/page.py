"""The report as one self-contained HTML page: no network, no script, no other file."""

from __future__ import annotations

import base64
import hashlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import ConfigError, printable
from . import attention, maps, neighbours, patches
from .charts import NOTHING, number, sample
from .curves import bound_chart, charts, style
from .neighbours import Shown
from .rerun import command, differences
from .runs import Run
from .samples import Sample

_HERE = Path(__file__).parent
_MOST_DOTS = 5000  # in all maps together; a dot takes 100 bytes


@dataclass(frozen=True)
class Panel:
    """A section's content for one run: rows of pictures or drawings, or the reason why there are none."""

    run: str
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[Shown, ...], ...] = ()
    drawings: tuple[tuple[str, Markup, str], ...] = ()
    text: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Pictures:
    """The panels of a run."""

    map: Panel
    neighbours: Panel
    attention: Panel
    patches: Panel


def images_of(runs: int, images: int) -> int:
    """Return the number of images in each map, so that a page of many runs stays small."""
    return min(images, _MOST_DOTS // max(1, 2 * runs))


def pictures(run: Run, sample: Sample | str) -> Pictures:
    """Return the panels that need features. A string instead of a sample is the reason why there are none."""
    return Pictures(
        *(_panel(run, sample, draw) for draw in (_map_panel, _neighbours_panel, _attention_panel, _patches_panel)),
    )


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return what a reader must know before comparing runs."""
    lines = []
    data = dict.fromkeys(run.data for run in runs)
    counts = dict.fromkeys(run.summary["images"] for run in runs if run.summary and "images" in run.summary)
    if len(data) == 1 and len(counts) > 1:  # images in memory have no other name
        data = dict.fromkeys(f"{count:,} images" for count in counts)
    if len(data) > 1:
        lines.append(f"The runs have different data ({'; '.join(data)}), so their figures cannot be compared.")
    return lines + [f"{run.name}: {note}." for run in runs for note in run.notes]


def render(runs: Sequence[Run], drawn: Sequence[Pictures] = ()) -> str:
    """Return the page. Without pictures it shows the command that draws them."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    css = (_HERE / "page.css").read_text()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    heads, changed = differences(runs)
    return environment.get_template("page.html").render(
        names=", ".join(run.name for run in runs),
        runs=runs,
        single=len(runs) == 1,
        several_methods=len({run.config.method for run in runs if run.config}) > 1,
        warnings=warnings(runs),
        facts=facts(runs),
        commands=[(run, command(run)) for run in runs],
        heads=heads,
        changed=changed,
        bounds=[chart for run in runs if (chart := bound_chart(run))],
        charts=charts(runs),
        drawn=drawn,
        sections=_sections(drawn),
        again=shlex.join(["fasttrain", "report", *(str(run.path) for run in runs)]),
        sample=sample,
        style=style,
        css=Markup(css),
        csp=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        version=__version__,
        now=time.strftime("%Y-%m-%d %H:%M"),
    )


_FACTS: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("state", lambda run: run.state),
    ("method", lambda run: run.config and run.config.method),
    ("objective", lambda run: run.config and ("entropy-reconstruction" if run.config.entropy else "the method's own")),
    ("network", lambda run: run.config and run.config.train.arch),
    ("recipe", lambda run: run.config and run.config.recipe),
    ("data", lambda run: run.data),
    ("images", lambda run: run.last("images")),
    ("batch", lambda run: run.card and run.card.batch),
    ("seed", lambda run: run.config and str(run.config.train.seed)),
    ("k-NN", lambda run: _percent(run.last("knn_top1"))),
    ("k-NN, untrained", lambda run: _percent(run.last("knn_top1_untrained"))),
    ("k-NN, raw pixels", lambda run: _percent(run.last("knn_top1_pixels"))),
    ("RankMe", lambda run: run.last("rankme")),
    ("entropy, nats", lambda run: run.last("entropy")),
    ("entropy ceiling, nats", lambda run: run.last("entropy_max")),
    ("reconstruction, nats", lambda run: run.last("reconstruction")),
    ("information, nats", lambda run: run.last("information")),
    ("deficit, nats", lambda run: run.last("deficit")),
    ("images/s", lambda run: run.last("images_per_s")),
    ("seconds", lambda run: run.last("seconds")),
    ("ranks", lambda run: run.last("world_size") or (run.card and run.card.world_size)),
    ("ZeRO stage", lambda run: run.card and str(run.card.zero_stage)),
    ("fasttrain", lambda run: run.card and _version(run)),
    ("torch", lambda run: run.card and run.card.origin.get("torch")),
    ("DeepSpeed", lambda run: run.card and run.card.origin.get("deepspeed")),
)


def facts(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows with a heading and every run's value. Rows without any value are left out."""
    rows = [[name, *(_text(value(run)) for run in runs)] for name, value in _FACTS]
    return [row for row in rows if set(row[1:]) != {NOTHING}]


def _version(run: Run) -> str:
    assert run.card is not None
    commit = run.card.origin.get("commit")
    return run.card.version + (f", {commit[:10]}{'-dirty' * commit.endswith('-dirty')}" if commit else "")


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else number(value)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _panel(run: Run, sample: Sample | str, draw: Callable[[Run, Sample], Panel]) -> Panel:
    if isinstance(sample, str):
        return Panel(run.name, missing=sample)
    try:
        return draw(run, sample)
    except ConfigError as error:
        return Panel(run.name, missing=str(error))


def _map_panel(run: Run, sample: Sample) -> Panel:
    drawings = tuple((one.name, maps.draw(one, sample), one.how) for one in maps.project(sample))
    which = "held-out images" if sample.held_out else "training images (none are held out)"
    text = f"{len(sample.source):,} {which}, {sample.backbone.name}"
    if sample.labels is None:
        return Panel(run.name, drawings=drawings, text=f"{text}. The data has no labels, so the dots have no colours.")
    more = len(set(sample.labels)) - maps.COLOURS
    grey = f" The {maps.COLOURS} most frequent classes have colours, the other {more} are grey." if more > 0 else ""
    return Panel(run.name, drawings=drawings, text=f"{text}. Colours are classes; the training did not use them.{grey}")


def _neighbours_panel(run: Run, sample: Sample) -> Panel:
    if len(sample.source) < 2:
        raise ConfigError("one image has no neighbours")
    rows = neighbours.table(sample)
    heads = ("image", *(str(place) for place in range(1, len(rows[0]))))
    text = "The data has no labels, so other classes are not marked."
    if sample.labels is not None:
        near = [shown.same for row in rows for shown in row[1:]]
        text = f"{sum(map(bool, near))} of {len(near)} have the image's class. The others are marked ✗."
    return Panel(run.name, heads, tuple(map(tuple, rows)), text=text)


def _attention_panel(run: Run, sample: Sample) -> Panel:
    rows = attention.table(sample)
    heads = ("image", "mean", *(f"head {number}" for number in range(1, len(rows[0]) - 1)))
    return Panel(run.name, heads, tuple(map(tuple, rows)), text="Each map is scaled to its own maximum.")


def _patches_panel(run: Run, sample: Sample) -> Panel:
    rows = patches.table(sample)
    text = "The components are of the patches of all these images together."
    return Panel(run.name, ("image", "patches"), tuple(map(tuple, rows)), text=text)


def _sections(drawn: Sequence[Pictures]) -> list[dict[str, Any]]:
    return [
        {
            "id": "map",
            "title": "Map of the features",
            "about": "Backbone features of unit norm, in two dimensions. Hover over a dot for its image.",
            "panels": [one.map for one in drawn],
        },
        {
            "id": "neighbours",
            "title": "Nearest neighbours",
            "about": "The images whose backbone features have the highest cosines with the first image's features.",
            "panels": [one.neighbours for one in drawn],
        },
        {
            "id": "attention",
            "title": "Attention of the [CLS] token",
            "about": "Attention in the last block of the ViT, one square per patch: dark is little, bright is much.",
            "panels": [one.attention for one in drawn],
        },
        {
            "id": "patches",
            "title": "Features of the patches",
            "about": "Their first three principal components are red, green and blue: equal colours are equal content.",
            "panels": [one.patches for one in drawn],
        },
    ]
