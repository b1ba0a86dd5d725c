"""The figures of an evaluation as a table."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table


def table(title: str, figures: dict[str, Any]) -> Table:
    """Return a table with a row per figure: its name, its value and its settings."""
    result = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in ("figure", "value", "how"):
        result.add_column(column, justify="right" if column == "value" else "left")
    for row in _rows(figures):
        result.add_row(*row)
    return result


def _rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for k, accuracy in figures.get("knn", {}).items():
        rows.append((f"k-NN, k = {k}", _percent(accuracy["top1"]), f"{_also(accuracy)}; T = 0.07"))
    if linear := figures.get("linear"):
        how = f"{_also(linear)}; SGD, {linear['epochs']} epochs, lr {linear['lr']:g}"
        rows.append(("linear probe", _percent(linear["top1"]), how))
    if logistic := figures.get("logistic"):
        how = f"{_also(logistic)}; L2 penalty {logistic['penalty']:g}"
        rows.append(("logistic regression", _percent(logistic["top1"]), how))
    for few in figures.get("few_shot", []):
        spread = f"+- {100 * few['std']:.2f} over {few['draws']} draws of {few['images']} images"
        how = "; ".join([spread, *_balanced(few["mean"], few["balanced"])])
        rows.append((f"{100 * few['fraction']:g} % of the labels", _percent(few["mean"]), how))
    images = figures.get("spectrum_images", 0)
    for name, label, how in (
        ("rankme", "RankMe", f"effective rank of {images:,} images' features"),
        ("alpha_req", "alpha-ReQ", "decay of the covariance's eigenvalues; good near 1"),
        ("uniformity", "uniformity", "lower is more uniform"),
        ("lidar", "LiDAR", f"{figures.get('lidar_images', 0):,} images, {figures.get('lidar_views')} views each"),
        ("alignment", "alignment", "squared distance of two views; 0 is best"),
    ):
        if name in figures:
            value = figures[name]
            rows.append((label, "none" if math.isnan(value) else f"{value:.3f}", how))
    return rows


def _also(accuracy: dict[str, Any]) -> str:
    """Return the top-5 accuracy, and the balanced accuracy if the classes are not equally large."""
    return "; ".join([f"top-5 {_percent(accuracy['top5'])}", *_balanced(accuracy["top1"], accuracy["balanced"])])


def _balanced(top1: float, balanced: float) -> list[str]:
    return [] if math.isclose(top1, balanced, abs_tol=1e-9) else [f"balanced {_percent(balanced)}"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
