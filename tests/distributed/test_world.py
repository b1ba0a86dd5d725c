"""The environment that launchers set, and the environment that torch and DeepSpeed read."""

import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed as dist

from fasttrain.distributed import cpus
from fasttrain.distributed import world as world_module
from fasttrain.distributed.world import World, all_gather_object, initialise, keep_freed_memory, prepare_environment
from fasttrain.errors import ConfigError
from tests.small_runs import flags

_ROOT = Path(__file__).parents[2]
_NAMES = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE OMP_NUM_THREADS OMP_WAIT_POLICY DS_ACCELERATOR
TRITON_DEFAULT_FP_FUSION DEEPSPEED_LOG_LEVEL TORCH_CPP_LOG_LEVEL MALLOC_TRIM_THRESHOLD_ MASTER_ADDR MASTER_PORT
SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_NODELIST SLURM_STEP_TASKS_PER_NODE
"""


@pytest.fixture
def launch(monkeypatch):
    """A function that sets variables in a shell without any, on a machine of 8 cores without a GPU."""
    for name in _NAMES.split():
        monkeypatch.setenv(name, "")  # makes monkeypatch restore the variable, even if it is not set now
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cpus, "control_groups", lambda _: iter(()))
    monkeypatch.setattr(world_module, "has_nvidia_device", lambda: False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize("local_size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"], ids=["torchrun", "deepspeed"])
def test_world_is_read_from_the_environment(launch, local_size):
    assert World.from_environment() == World(rank=0, size=1, local_rank=0, local_size=1)
    launch(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", **{local_size: "4"})
    world = World.from_environment()
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert world.threads == 2
    assert not world.is_main


@pytest.mark.parametrize(("name", "value"), [("RANK", "one"), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "0")])
@pytest.mark.parametrize("read", [World.from_environment, prepare_environment])
def test_variable_that_is_no_number_is_one_line(launch, name, value, read):
    launch(**{name: value})
    with pytest.raises(ConfigError, match=f"{name}: .*{value!r}") as error:
        read()
    assert "\n" not in str(error.value)


def test_a_rank_beyond_the_world_is_one_line(launch):
    """Such a rank waited for ever, because the watchdog of a start is for several ranks."""
    launch(RANK="5", WORLD_SIZE="1")
    with pytest.raises(ConfigError, match="RANK: must be below WORLD_SIZE"):
        World.from_environment()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"RANK": "0"}, "MASTER_PORT"),
        ({"MASTER_PORT": "29500"}, "RANK"),
        ({"RANK": "0", "MASTER_PORT": "port"}, "MASTER_PORT"),
        ({"RANK": "0", "MASTER_PORT": "0"}, "MASTER_PORT"),
    ],
)
def test_ranks_without_a_meeting_point_are_refused(launch, monkeypatch, values, name):
    """Each rank waited at a random port of its own until the watchdog ended it."""
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    launch(**values)
    with pytest.raises(ConfigError, match=f"{name}: "):
        initialise(World(0, 2, 0, 2))


def test_prepare_environment_adopts_the_ranks_of_srun(launch):
    launch(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_JOB_ID="7")
    launch(SLURM_STEP_NODELIST="a", SLURM_STEP_TASKS_PER_NODE="2")
    prepare_environment()
    assert World.from_environment() == World(1, 2, 1, 2)
    assert os.environ["MASTER_ADDR"] == "a"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_ranks_share_the_cores(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(cpus, "control_groups", lambda _: iter(()))
    assert World(0, ranks, 0, ranks).threads == threads


@pytest.mark.parametrize(
    ("values", "gpu", "expected"),
    [
        ({}, False, {"OMP_NUM_THREADS": "8", "DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning"}),
        ({}, True, {"DS_ACCELERATOR": "cuda"}),
        ({"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "xpu"}, False, {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "xpu"}),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"},  # torchrun sets 1
            False,
            {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        ),
    ],
)
def test_prepare_environment_sets_only_missing_variables(launch, monkeypatch, values, gpu, expected):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("changed the process's memory"))
    monkeypatch.setattr(cpus, "control_groups", lambda _: iter(()))
    monkeypatch.setattr(world_module, "has_nvidia_device", lambda: gpu)
    launch(**values)
    prepare_environment()
    assert {name: os.environ[name] for name in expected} == expected


def test_keep_freed_memory_leaves_settings_of_the_environment(launch, monkeypatch):
    options = []
    glibc = SimpleNamespace(mallopt=lambda *option: options.append(option))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    launch(MALLOC_TRIM_THRESHOLD_="1000")
    keep_freed_memory()
    assert options == [(-3, 1 << 30), (-2, 64 << 20)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # another C library
    keep_freed_memory()


@pytest.mark.parametrize("device", ["/dev/nvidiactl", "/dev/dxg", None])
def test_a_gpu_is_known_by_its_drivers_device(monkeypatch, device):
    monkeypatch.setattr(os.path, "exists", lambda path: path == device)
    assert world_module.has_nvidia_device() is (device is not None)


def test_initialise_makes_a_group_of_one_and_may_be_repeated():
    world = World(0, 1, 0, 1)
    for _ in range(2):
        initialise(world)
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert "MASTER_PORT" not in os.environ  # a command started from this process would listen on the same port
    assert all_gather_object(world, "value") == ["value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["deepspeed", "--num_accelerators", "2"], [sys.executable]], ids=["deepspeed", "python"]
)
def test_taken_port_of_the_launcher_is_replaced(images, tmp_path, launcher):
    """A second run on a machine ended with EADDRINUSE, because both had deepspeed's default port."""
    with socket.socket() as taken:
        taken.bind(("", 29500))
        taken.listen()
        command = [*launcher, "fasttrain/run.py", *flags(images, tmp_path, "--limit_steps", 1, "--knn_every", 0)]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        environment |= {"MASTER_PORT": "29500", "PYTHONPATH": "."}
        done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["world_size"] == (2 if "deepspeed" in launcher else 1)
