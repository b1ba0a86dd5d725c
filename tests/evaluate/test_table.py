"""The table has a row for every figure."""

import io
import math

from rich.console import Console

from fasttrain.evaluate.table import table

_FIGURES = {
    "knn": {"20": {"top1": 0.5125, "top5": 0.9, "balanced": 0.4}},
    "linear": {"top1": 0.61, "top5": 0.95, "balanced": 0.61, "lr": 0.3, "epochs": 100},
    "few_shot": [{"fraction": 0.01, "images": 40, "draws": 5, "mean": 0.3, "std": 0.015, "balanced": 0.3}],
    "rankme": 12.3456,
    "alpha_req": math.nan,
    "spectrum_images": 25600,
}


def _rows(figures):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table("title", figures))
    return [" ".join(line.split()) for line in console.export_text().splitlines()[2:]]


def test_table_has_a_row_per_figure():
    rows = _rows(_FIGURES)
    starts = (
        "k-NN, k = 20 51.25 %",
        "linear probe 61.00 %",
        "1 % of the labels 30.00 %",
        "RankMe 12.346",
        "alpha-ReQ none",
    )
    assert [row.startswith(start) for row, start in zip(rows, starts, strict=True)] == [True] * 5
    for row, setting in zip(rows, ("90.00 %", "lr 0.3", "5 draws of 40", "25,600 images"), strict=False):
        assert setting in row
    assert _rows({}) == []
