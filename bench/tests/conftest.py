"""Fixtures of the tests of bench/. bench/conftest.py sets the environment."""

import os

import pytest


@pytest.fixture(scope="session")
def aot():
    """Return bench/kernels/aot.py without its changes to the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
            patch.setenv(name, os.environ.get(name, "0"))
        from bench.kernels import aot
    return aot


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder of 32 training images and 8 held-out images in two classes."""
    from tests.small_runs import write_images

    return write_images(tmp_path_factory.mktemp("shared") / "noise")
