"""A row for every figure that there is, and none for those that there are not."""

import io
import math

from rich.console import Console

from fasttrain.evaluate.table import table

_FIGURES = {
    "knn": {"20": {"top1": 0.5125, "top5": 0.9}},
    "linear": {"top1": 0.61, "top5": 0.95, "lr": 0.3, "epochs": 100},
    "few_shot": [{"fraction": 0.01, "images": 40, "draws": 5, "mean": 0.3, "std": 0.015}],
    "rankme": 12.3456,
    "alpha_req": math.nan,
    "spectrum_images": 25600,
}


def _text(figures):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table("it", figures))
    return console.export_text()


def test_figures_are_rows():
    lines = [" ".join(line.split()) for line in _text(_FIGURES).splitlines()]
    assert "k-NN, k = 20 51.25 % top-5 90.00 %; T = 0.07" in lines
    assert "linear probe 61.00 % top-5 95.00 %; SGD, 100 epochs, lr 0.3" in lines
    assert "1 % of the labels 30.00 % +- 1.50 over 5 draws of 40 images" in lines
    assert "RankMe 12.346 effective rank of 25,600 images' features" in lines
    assert any(line.startswith("alpha-ReQ none") for line in lines)
    assert len(lines) == 7


def test_without_figures_there_are_no_rows():
    assert len(_text({}).splitlines()) == 2
