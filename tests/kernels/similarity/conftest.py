import pytest

from tests.kernels.similarity import stress


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, so that a read before the first write shows."""
    with stress.poisoned_memory():
        yield
