"""What the tests of the plan share."""

import pytest

from fasttrain.plan import forecast
from fasttrain.plan.trace import trace


@pytest.fixture(scope="session")
def _traces():
    return {}


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch, _traces):
    """Forecasts of the same step share their trace, which is what takes time."""

    def remembered(method, views, batch, **options):
        key = (str(method), method.settings, views, batch, *sorted(options.items()))
        if key not in _traces:
            _traces[key] = trace(method, views, batch, **options)
        return _traces[key]

    monkeypatch.setattr(forecast, "trace", remembered)
