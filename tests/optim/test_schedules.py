import pytest

from fasttrain.optim.schedules import cosine, linear, warmup_cosine


def test_cosine_starts_halves_and_ends():
    assert cosine(0, 10, 1.0, 0.0) == 1.0
    assert cosine(5, 10, 1.0, 0.0) == pytest.approx(0.5)
    assert cosine(10, 10, 1.0, 0.2) == 0.2
    assert cosine(99, 10, 1.0, 0.2) == 0.2


def test_cosine_rises_too():
    assert cosine(0, 10, 0.996, 1.0) == pytest.approx(0.996)
    assert cosine(10, 10, 0.996, 1.0) == 1.0
    values = [cosine(i, 10, 0.996, 1.0) for i in range(11)]
    assert values == sorted(values)


def test_linear_without_steps_is_its_end():
    assert linear(0, 0, 0.04, 0.07) == 0.07
    assert linear(3, 6, 0.0, 1.0) == pytest.approx(0.5)


def test_warmup_meets_the_peak_and_hands_over_to_the_cosine():
    assert warmup_cosine(0, 100, 10, 2.0, 0.0) == 0
    assert warmup_cosine(5, 100, 10, 2.0, 0.0) == pytest.approx(1.0)
    assert warmup_cosine(10, 100, 10, 2.0, 0.0) == pytest.approx(2.0)
    assert warmup_cosine(55, 100, 10, 2.0, 0.0) == pytest.approx(1.0)
    assert warmup_cosine(100, 100, 10, 2.0, 0.1) == pytest.approx(0.1)


def test_warmup_as_long_as_the_run_never_divides_by_zero():
    assert warmup_cosine(10, 10, 10, 2.0, 0.5) == 0.5
