"""Run every example in a process of its own, against the library that it is for. Its loss must fall."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

pytestmark = pytest.mark.slow

_EXAMPLES = Path(__file__).parents[2] / "examples"
_ONE_PROCESS = [
    "accelerate_moco",
    "compiled",
    "dinov2_losses",
    "huggingface_trainer",
    "lightly_simclr",
    "open_clip_loss",
    "stable_pretraining_simclr",
]
_LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
_WITHOUT_COMPILER = """
import sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.path.insert(0, "")
import bare_deepspeed
bare_deepspeed.main(40)
"""
"""Without this, both ranks compile DeepSpeed's shared-memory all-reduce on the CPU.

It takes 40 seconds, and sometimes a rank ends with SIGABRT (see distributed/world.py).
"""


def _check_losses(*command):
    """Run Python in the folder of the examples, and check the list of 40 losses that it prints last.

    In the root of the clone, transformers would import the folder kernels/ as PyPI's package of this name. Tests in
    this process may have set variables for DeepSpeed, which are removed.
    """
    removed = {"PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in removed} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *command], cwd=_EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    losses = ast.literal_eval([line for line in process.stdout.splitlines() if line.startswith("[")][-1])
    assert len(losses) == 40
    assert mean(losses[-10:]) < mean(losses[5:15]) - 0.1


def test_every_example_is_tested():
    """``tests/test_own_method.py`` tests own_method.py."""
    scripts = {path.stem for path in _EXAMPLES.glob("*.py")}
    assert scripts == {"digits", "own_method", "bare_deepspeed", "fsdp2", *_ONE_PROCESS}


@pytest.mark.parametrize("name", _ONE_PROCESS)
def test_example_on_one_process_learns(name):
    # importorskip would also skip an installed package that cannot be imported.
    if name == "stable_pretraining_simclr" and importlib.util.find_spec("stable_pretraining") is None:
        pytest.skip("needs stable-pretraining, which CI installs in a separate stage")
    _check_losses("-c", f"import {name}; print({name}.main(40))")


def test_fsdp2_on_two_ranks_learns():
    _check_losses(*_LAUNCH, "fsdp2.py", "--steps", "40")


def test_deepspeed_on_two_ranks_learns(tmp_path):
    script = tmp_path / "without_compiler.py"
    script.write_text(_WITHOUT_COMPILER)
    _check_losses(*_LAUNCH, str(script))
