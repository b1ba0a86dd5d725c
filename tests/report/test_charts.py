"""Charts show all points in their places, keep extremes, and escape names."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fasttrain.report.charts import HEIGHT, WIDTH, Level, Line, line_chart, number, thin, ticks

_NUMBERS = st.floats(-1e9, 1e9)
_POINTS = st.lists(st.tuples(st.floats(0, 1e4), _NUMBERS), min_size=1, max_size=900)


def _parse(svg):
    return ElementTree.fromstring(str(svg))


def _path(element):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", element.get("d")) if pair]


@given(_POINTS, st.integers(4, 100))
def test_thin_keeps_ends_extremes_and_order(points, most):
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    remaining = iter(points)
    assert all(point in remaining for point in kept)
    values = [y for _, y in points]
    assert {min(values), max(values)} <= {y for _, y in kept}


@given(_NUMBERS, st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside_the_axis(low, width):
    high = low + width
    if high - low < 1e-6 * max(1, abs(low)):
        return
    values = ticks(low, high)
    assert 1 <= len(values) <= 7
    step = (high - low) * 1e-6
    assert all(low - step <= value <= high + step for value in values)


def test_line_goes_through_its_points():
    svg = _parse(line_chart("Loss", [Line("a", [(0, 0.0), (5, 1.0), (10, 0.5)], "c0 d0")]))
    (line,) = (e for e in svg.iter("path") if "line" in e.get("class"))
    (u0, v0), (u1, v1), (u2, v2) = _path(line)
    assert u1 - u0 == pytest.approx(u2 - u1, abs=0.2)
    assert v0 - v1 == pytest.approx(2 * (v2 - v1), abs=0.3)  # y grows downwards
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "Loss. a from 0 to 0.5."


@given(_POINTS, _NUMBERS)
@example([(0.0, 5e-324)], 0.0)  # its logarithm is not finite
def test_line_chart_is_inside_its_picture(points, level):
    svg = line_chart("x", [Line("a", sorted(points), "c0"), Line("b", points[:1], "c1")], [Level("l", level, "c2")])
    for element in _parse(svg).iter():
        if element.tag == "circle":
            u, v = float(element.get("cx")), float(element.get("cy"))
            assert 0 <= u <= WIDTH
            assert 0 <= v <= HEIGHT
    assert "nan" not in svg
    assert "inf" not in svg


def test_line_chart_shows_values_on_hover():
    svg = _parse(line_chart("Loss", [Line("run", [(0.5, 2.0), (1, 1234.5)], "c0")], unit=" nats"))
    titles = [element.text for element in svg.iter("title")]
    assert titles == ["run, epoch 0.5: 2 nats", "run, epoch 1: 1,234 nats"]


def test_line_chart_escapes_names():
    svg = line_chart("<b>", [Line('"><script>', [(0, 1.0)], "c0")], [Level("&", 1.0, "c1")])
    assert "<script" not in svg
    _parse(svg)


def test_line_chart_of_a_constant_and_of_no_points():
    assert "NaN" not in line_chart("x", [Line("a", [(0, 3.0), (1, 3.0)], "c0")])
    assert line_chart("x", [Line("a", [], "c0")]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.6, "1,235"), (0.123456, "0.1235"), (1.23e-6, "1.23e-6"), (-45.3281, "-45.33"), (math.nan, "–")],  # noqa: RUF001
)
def test_number_has_at_most_four_digits(value, text):
    assert number(value) == text


def test_band_is_where_the_first_line_is_above():
    lines = [Line("a", [(0, 1.0), (1, 1.0), (2, 1.0)], "c0"), Line("b", [(0, 3.0), (1, 1.0), (2, 0.0)], "c1")]
    svg = _parse(line_chart("x", lines, band=True))
    band, *_ = (e for e in svg.iter("path") if e.get("class") == "band")
    above, below = (_path(e) for e in svg.iter("path") if "line" in e.get("class"))
    outline = [tuple(map(float, pair.split())) for pair in re.split("[MLZ]", band.get("d")) if pair]
    assert outline == [*above, below[2], *reversed(above[:2])]
