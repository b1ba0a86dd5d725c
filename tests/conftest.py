"""Threads are set before torch is imported, as the command does it; DeepSpeed stays quiet.

Without a GPU the Triton kernels are interpreted, which Triton decides when it reads them. Workers that test side by
side (``pytest -n 2``) have a thread each: two teams that spin on the same cores are many times slower than one.
"""

import os
import signal

import pytest

from fasttrain.distributed.world import has_nvidia_device, prepare_environment

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_environment()
if not has_nvidia_device():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """32 images to train on and 8 held out, of two classes."""
    from tests.small_runs import write_images

    return write_images(tmp_path_factory.mktemp("shared") / "noise")


@pytest.fixture(scope="session")
def simclr_run(images, tmp_path_factory):
    """conv_small after two steps."""
    from tests.small_runs import train_few_steps

    return train_few_steps(images, tmp_path_factory.mktemp("simclr") / "run")


@pytest.fixture(scope="session")
def dino_run(images, tmp_path_factory):
    """A ViT of 32 pixels after two steps; its teacher lags behind."""
    from tests.small_runs import train_few_steps

    vit = ("--arch", "vit_tiny", "--patch_size", 16, "--local_crops_number", 0, "--momentum_teacher", 0.5, "--lr", 0.1)
    return train_few_steps(images, tmp_path_factory.mktemp("dino") / "run", *vit, method="dino")


@pytest.fixture(scope="module")
def engine():
    """An engine whose checkpoints can be written and read."""
    from tests.checkpoints import small_engine

    with small_engine() as made:
        yield made


@pytest.fixture(autouse=True)
def _hang_up():
    """Handle SIGHUP as in a terminal, also if the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def one_thread():
    """As in the processes that tests start: sums then have one order, and spinning threads cost nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def straight(images, tmp_path_factory):
    """Two epochs of four steps in one go, as a user starts them; flags with dashes, and what a launcher injects."""
    from tests.small_runs import flags, start

    output = tmp_path_factory.mktemp("runs") / "straight"
    arguments = [a.replace("_", "-") if a.startswith("--") else a for a in flags(images, output, "--knn_every", 1)]
    process = start([*arguments, "--local_rank=0"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return output, out
