"""Which curves a report shows, and how the runs are told apart in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..training.records import BOUND, TRAINER_KEYS
from .charts import Level, Line, line_chart, number
from .reading import reading
from .runs import Run

_COLOURS, _DASHES = 6, 5  # of the style sheet; no two of the first 30 runs are alike


@dataclass(frozen=True)
class Legend:
    """An entry below a chart: a piece of the line, a name, the last value."""

    style: str
    name: str
    value: str


@dataclass(frozen=True)
class Chart:
    """A chart and what stands around it."""

    title: str
    svg: Markup
    legend: tuple[Legend, ...]
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Quantity:
    key: str
    title: str
    about: str
    unit: str = ""
    factor: float = 1.0


_QUANTITIES = (
    _Quantity("loss", "Loss", "What is minimised; losses of different methods do not compare."),
    _Quantity("information", "Information, nats", "The bound: entropy less reconstruction. Higher is better.", " nats"),
    _Quantity(
        "deficit",
        "Deficit, nats",
        "How far the projections are from the uniform law, 0; on the sphere without a row's kernel on itself. "
        "It compares all methods.",
        " nats",
    ),
    _Quantity("knn_top1", "k-NN accuracy, %", "Of backbone features on held-out images, k = 20, T = 0.07.", " %", 100),
    _Quantity(
        "effective_rank", "Effective rank", "Dimensions that the projections fill (exp of their spectrum's entropy)."
    ),
    _Quantity("rankme", "RankMe", "Effective rank of the backbone's features on clean images."),
    _Quantity(
        "channel_std", "Channel std", "Spread of the projections, times the root of D: 1 is uniform, 0 one point."
    ),
    _Quantity("grad_norm", "Gradient norm", "Of all parameters together, before it is clipped."),
    _Quantity("lr", "Learning rate", "As scheduled, scaled to the batch."),
    _Quantity("images_per_s", "Throughput, images/s", "All ranks together.", " images/s"),
    _Quantity("data_wait", "Data wait, %", "Part of the time that is spent waiting for the next batch.", " %", 100),
)


def style(index: int) -> str:
    """Colour and dashes of run ``index``: both differ, so that either tells runs apart."""
    return f"c{index % _COLOURS} d{index % _DASHES}"


def bound_chart(run: Run) -> Chart | None:
    """Entropy, its ceiling and reconstruction of a run; what lies between is the information. None without them."""
    entropy, reconstruction, ceiling = run.curve("entropy"), run.curve("reconstruction"), run.curve("entropy_max")
    if not entropy or not reconstruction:
        return None
    levels = [Level("ceiling", ceiling[-1][1], "c2 d2")] if ceiling else []
    lines = [Line("entropy", entropy, "c0 d0"), Line("reconstruction", reconstruction, "c1 d1")]
    svg = line_chart(f"The bound of {run.name}", lines, levels, unit=" nats", band=True)
    legend = [Legend(line.style, line.name, f"{number(line.points[-1][1])} nats") for line in lines]
    legend += [Legend(level.style, "ceiling", f"{number(level.value)} nats") for level in levels]
    legend.append(Legend("band", "information", f"{number(entropy[-1][1] - reconstruction[-1][1])} nats"))
    return Chart(run.name, svg, tuple(legend), tuple(reading(run)))


def charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each quantity that some run has, with all runs in it."""
    drawn = []
    for q in (*_QUANTITIES, *_own_quantities(runs)):
        lines = [
            Line(run.name, [(x, y * q.factor) for x, y in _curve(run, q.key)], style(i)) for i, run in enumerate(runs)
        ]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        levels = _untrained(runs) if q.key == "knn_top1" else []
        legend = [Legend(line.style, line.name, number(line.points[-1][1]) + q.unit) for line in lines]
        legend += [Legend(level.style, level.name, number(level.value) + q.unit) for level in levels]
        svg = line_chart(q.title, lines, levels, unit=q.unit)
        drawn.append(Chart(q.title, svg, tuple(legend), (q.about,)))
    return drawn


def _own_quantities(runs: Sequence[Run]) -> list[_Quantity]:
    """Return the scalars that methods log themselves."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    own = [key for key in keys if key not in TRAINER_KEYS and key not in BOUND]
    return [_Quantity(key, key, "A scalar that the method logs itself.") for key in own]


def _curve(run: Run, key: str) -> list[tuple[float, float]]:
    """The logged values and, where the end was evaluated only after the last step was logged, the summary's."""
    points = run.curve(key)
    end = (run.summary or {}).get(key) if key in ("knn_top1", "rankme") else None
    if end is not None and run.lines and (last := run.lines[-1].get("epoch")) is not None:
        points = [(x, y) for x, y in points if x < last] + [(float(last), float(end))]
    return points


def _untrained(runs: Sequence[Run]) -> list[Level]:
    """What the images themselves reach and an untrained network, where all runs agree on it."""
    levels = []
    for key, name in (("knn_top1_pixels", "raw pixels"), ("knn_top1_untrained", "untrained network")):
        values = {run.summary[key] for run in runs if run.summary and run.summary.get(key) is not None}
        if len(values) == 1:
            levels.append(Level(name, 100 * values.pop(), "c5 d3" if key.endswith("pixels") else "c5 d2"))
    return levels
