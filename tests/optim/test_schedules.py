import pytest

from fasttrain.optim.schedules import cosine, linear, warmup_cosine


@pytest.mark.parametrize(
    ("schedule", "arguments", "value"),
    [
        (cosine, (0, 10, 1.0, 0.0), 1.0),
        (cosine, (5, 10, 1.0, 0.0), 0.5),
        (cosine, (10, 10, 0.996, 1.0), 1.0),
        (cosine, (99, 10, 1.0, 0.2), 0.2),
        (linear, (0, 0, 0.04, 0.07), 0.07),
        (linear, (3, 6, 0.0, 1.0), 0.5),
        (warmup_cosine, (0, 100, 10, 2.0, 0.0), 0.0),
        (warmup_cosine, (5, 100, 10, 2.0, 0.0), 1.0),
        (warmup_cosine, (10, 100, 10, 2.0, 0.0), 2.0),
        (warmup_cosine, (55, 100, 10, 2.0, 0.0), 1.0),
        (warmup_cosine, (100, 100, 10, 2.0, 0.1), 0.1),
        (warmup_cosine, (10, 10, 10, 2.0, 0.5), 0.5),
    ],
)
def test_schedule_at_a_step_has_its_value(schedule, arguments, value):
    assert schedule(*arguments) == pytest.approx(value, abs=1e-12)
