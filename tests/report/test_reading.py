"""Every method has its family's sentences."""

import pytest

from fasttrain.config.resolve import resolve
from fasttrain.methods import names
from fasttrain.report.reading import FAMILIES, reading
from fasttrain.report.runs import Run

_LINE = {"step": 1, "epoch": 1.0, "entropy": 3.0, "entropy_max": 5.0, "reconstruction": 1.0, "information": 2.0}


def test_every_method_is_of_one_family():
    listed = [method for methods in FAMILIES.values() for method in methods]
    assert sorted(listed) == names()


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("entropy", [False, True])
def test_the_sentences(tmp_path, method, entropy):
    run = Run(tmp_path, "it", (_LINE,), None, resolve(method, {"entropy": entropy}), "", None)
    family, end = reading(run)
    (expected,) = (name for name, methods in FAMILIES.items() if method in methods)
    assert family.startswith(f"{method} is a {expected} method")
    assert ("minus the information" in family) == entropy
    assert "At the last step: entropy 3 of at most 5 nats, reconstruction 1, so at least 2 nats" in end


def test_a_run_of_which_nothing_is_known_has_none(tmp_path):
    assert reading(Run(tmp_path, "it", (), None, None, "", None)) == []
