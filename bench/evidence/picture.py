"""Draw the pictures of the campaigns as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

from bench.evidence.campaign import Row, summary

_BASE, _TWIN = "#8da0cb", "#1b7837"


def bars(rows: Sequence[Row], names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw base and twin of every method with the range over seeds, and lines for the untrained network and pixels."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for offset, twin, color in ((-0.2, "", _BASE), (0.2, "+er", _TWIN)):
        values = [summary(rows, name + twin) for name in names]
        label = "with --entropy" if twin else "the method's own objective"
        axes.bar(
            [i + offset for i in range(len(names))],
            [value[0] for value in values],
            0.38,
            yerr=[value[1] for value in values],
            color=color,
            label=label,
        )
    for key, style, label in (("knn_top1_untrained", ":", "untrained"), ("knn_top1_pixels", "--", "raw pixels")):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            axes.axhline(sum(values) / len(values), color="black", linestyle=style, linewidth=1, label=label)
    shown = [row[key] for row in rows for key in ("knn_top1", "knn_top1_untrained") if row[key] is not None]
    low = min(shown, default=0.0)
    axes.set_ylim(max(0, low - 0.05), 1 if low > 0.4 else None)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("k-NN top-1")
    axes.set_title(title)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    _save(figure, path)


def drops(
    groups: Sequence[str], ours: Sequence[tuple[float, float]], papers: Sequence[tuple[float, float]], path: Path
) -> None:
    """Draw the points lost by base and twin, in one panel ours and in one the paper's."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, title, values in ((panels[0], "here", ours), (panels[1], "the paper's Table 2 (ImageNet)", papers)):
        for offset, which, color, label in ((-0.2, 0, _BASE, "base"), (0.2, 1, _TWIN, "with ER")):
            axes.bar(
                [i + offset for i in range(len(groups))], [v[which] for v in values], 0.38, color=color, label=label
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), groups, fontsize=8)
        axes.set_title(title)
        axes.set_ylabel("points lost")
    panels[0].legend(frameon=False)
    _save(figure, path)


def curves(runs: Mapping[str, Mapping[str, Sequence[float]]], families: Mapping[str, str], path: Path) -> None:
    """Draw entropy, its ceiling and reconstruction over the steps: a column per family, with the twins below."""
    figure, panels = plt.subplots(2, len(families), figsize=(9, 5), sharex="col", sharey="col", layout="constrained")
    for column, (family, method) in zip(panels.T, families.items(), strict=True):
        for axes, twin, label in zip(column, ("", "+er"), ("", ", with --entropy"), strict=True):
            _bound(axes, runs[method + twin])
            axes.set_title(f"{family}: {method}{label}", fontsize=9)
        column[-1].set_xlabel("step")
    for axes in panels[:, 0]:
        axes.set_ylabel("nats")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=3, loc="outside lower center", frameon=False)
    _save(figure, path)


def twins(runs: Mapping[str, Mapping[str, Sequence[float]]], method: str, title: str, path: Path) -> None:
    """Draw the bound of one method and of its twin next to each other."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    labels = (f"{title}: the entropy is lost", f"{title} with --entropy: it is kept")
    for axes, twin, label in zip(panels, ("", "+er"), labels, strict=True):
        run = runs[method + twin]
        _bound(axes, run)
        axes.annotate(
            f"information {run['entropy'][-1] - run['reconstruction'][-1]:.1f} nats",
            (run["step"][-1], (run["entropy"][-1] + run["reconstruction"][-1]) / 2),
            ha="right",
            va="center",
            fontsize=9,
        )
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
    panels[0].set_ylabel("nats")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", frameon=False)
    _save(figure, path)


def _bound(axes: plt.Axes, run: Mapping[str, Sequence[float]]) -> None:
    axes.plot(run["step"], run["entropy_max"], color="gray", linestyle="--", linewidth=1, label="its ceiling")
    axes.plot(run["step"], run["entropy"], color=_TWIN, label="entropy")
    axes.plot(run["step"], run["reconstruction"], color=_BASE, label="reconstruction")
    axes.fill_between(run["step"], run["reconstruction"], run["entropy"], color=_TWIN, alpha=0.12)


def _save(figure: plt.Figure, path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "fasttrain"  # makes equal pictures equal files
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
