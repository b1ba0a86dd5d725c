"""Share traces between tests."""

import pytest

from fasttrain.plan import forecast
from fasttrain.plan.trace import trace

_TRACES = {}


@pytest.fixture(autouse=True)
def _cached_trace(monkeypatch):
    """Trace each step once: this takes nearly all of a forecast's time."""

    def cached(method, views, batch, **options):
        key = (str(method), method.settings, views, batch, *sorted(options.items()))
        if key not in _TRACES:
            _TRACES[key] = trace(method, views, batch, **options)
        return _TRACES[key]

    monkeypatch.setattr(forecast, "trace", cached)
