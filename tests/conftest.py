"""Threads are set before torch is imported, as the command does it; DeepSpeed stays quiet.

Without a GPU the Triton kernels are interpreted, which Triton decides when it reads them.
"""

import os

import pytest

from fasttrain.distributed import has_nvidia_device, prepare_environment

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
