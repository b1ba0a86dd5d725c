"""What the tests of bench/ share: its modules, which are no package."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))


@pytest.fixture(scope="session")
def aot():
    """bench/kernels/aot.py, without what it does to the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
            patch.setenv(name, os.environ.get(name, "0"))
        from bench.kernels import aot
    return aot
