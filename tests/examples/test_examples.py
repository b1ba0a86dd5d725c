"""Every example runs against the library that it is for, in a process of its own, and its loss falls."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

_EXAMPLES = Path(__file__).parents[2] / "examples"
_HERE = ["accelerate_moco", "compiled", "huggingface_trainer", "lightly_simclr", "open_clip_loss"]
_APART = {"stable_pretraining_simclr": "stable_pretraining"}  # installed by .ci/run in a stage of its own

_NOT_THEIRS = {"PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


def _losses(*command):
    # Not in the root of the clone, where transformers would take the folder kernels/ for a package of that name; and
    # without what tests of this process have told DeepSpeed of ranks.
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_THEIRS}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *command], cwd=_EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return ast.literal_eval([line for line in done.stdout.splitlines() if line.startswith("[")][-1])


def _falls(losses, steps):
    assert len(losses) == steps
    assert mean(losses[-10:]) < mean(losses[5:15]) - 0.1


def test_all_are_here():
    scripts = {path.stem for path in _EXAMPLES.glob("*.py")}
    assert scripts == {"digits", "bare_deepspeed", "fsdp2", *_HERE, *_APART}


@pytest.mark.parametrize("name", [*_HERE, *_APART])
def test_on_one_process(name):
    # Not importorskip: where it is there and cannot be imported, that is an error.
    if name in _APART and importlib.util.find_spec(_APART[name]) is None:
        pytest.skip(f"needs {_APART[name]}")
    _falls(_losses("-c", f"import {name}; print({name}.main(40))"), 40)


_LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_fsdp2_on_two_ranks():
    _falls(_losses(*_LAUNCH, "fsdp2.py", "--steps", "40"), 40)


# On the CPU, both ranks would first compile DeepSpeed's shared-memory all-reduce (see distributed/world.py). It takes 40
# seconds, and sometimes a rank ends with SIGABRT.
_WITHOUT_COMPILER = """
import sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.path.insert(0, "")
import bare_deepspeed
bare_deepspeed.main(40)
"""


def test_deepspeed_on_two_ranks(tmp_path):
    script = tmp_path / "without_compiler.py"
    script.write_text(_WITHOUT_COMPILER)
    _falls(_losses(*_LAUNCH, str(script)), 40)
