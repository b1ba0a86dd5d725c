"""The sentences fit the method's family and the run's figures."""

import pytest

from fasttrain import methods
from fasttrain.config.resolve import resolve
from fasttrain.report.reading import reading
from fasttrain.report.runs import Run
from tests.methods.small import CASES, TWINS

_LINE = {"step": 1, "epoch": 1.0, "entropy": 3.0, "entropy_max": 5.0, "reconstruction": 1.0, "information": 2.0}


@pytest.mark.parametrize(("method", "entropy"), [case for case in CASES if case[0] in TWINS])
def test_reading_names_method_family_and_figures(tmp_path, method, entropy):
    run = Run(tmp_path, "it", (_LINE,), None, resolve(method, {"entropy": entropy}), "", None)
    family, figures = reading(run)
    assert family.startswith(f"{method} is a {methods.load(method).family} method")
    assert ("--entropy" in family) == entropy
    assert [figure in figures for figure in (" 3 ", " 5 nats", " 1 nats", " 2 nats")] == [True] * 4
    assert reading(Run(tmp_path, "it", (), None, None, "", None)) == []
