"""What is read from the environment and put into it."""

import os

import pytest

from fasttrain.distributed import world as distributed
from fasttrain.distributed.world import World, initialise, prepare_environment

_READ = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_SET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_DEFAULT_FP_FUSION", "DEEPSPEED_LOG_LEVEL", "DS_ACCELERATOR")
_SET += ("TORCH_CPP_LOG_LEVEL",)


@pytest.fixture
def environment(monkeypatch):
    """A shell without any of the variables, on a machine of 8 cores without a GPU; all is put back afterwards."""
    for name in (*_READ, *_SET):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts it back, even if it was not there
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(distributed, "has_nvidia_device", lambda: False)
    return monkeypatch


def _launched(environment, **values):
    for name, value in values.items():
        environment.setenv(name, value)


def test_a_plain_process_is_a_world_of_one(environment):
    assert World.from_environment() == World(rank=0, size=1, local_rank=0, local_size=1)


@pytest.mark.parametrize("local_size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"], ids=["torchrun", "deepspeed"])
def test_launchers_say_who_this_is(environment, local_size):
    _launched(environment, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", **{local_size: "4"})
    world = World.from_environment()
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not world.is_main
    assert world.threads == 2


def test_only_rank_0_writes():
    assert [World(rank, 4, rank % 2, 2).is_main for rank in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_cores_are_shared_and_nobody_gets_none(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert World(0, ranks, 0, ranks).threads == threads


def test_one_process_takes_all_cores_unless_told(environment):
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["DEEPSPEED_LOG_LEVEL"] == "warning"
    _launched(environment, OMP_NUM_THREADS="3", OMP_WAIT_POLICY="PASSIVE", DS_ACCELERATOR="cuda")
    prepare_environment()
    assert [os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "DS_ACCELERATOR")] == [
        "3",
        "PASSIVE",
        "cuda",
    ]


def test_ranks_that_share_a_machine_get_their_part_and_do_not_spin(environment):
    _launched(environment, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", OMP_NUM_THREADS="1")  # torchrun's own guess
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_gpu_is_used_where_there_is_one(environment):
    environment.setattr(distributed, "has_nvidia_device", lambda: True)
    prepare_environment()
    assert os.environ["DS_ACCELERATOR"] == "cuda"


@pytest.mark.parametrize("device", ["/dev/nvidiactl", "/dev/dxg", None])
def test_a_gpu_is_known_by_its_driver_s_device(monkeypatch, device):
    monkeypatch.setattr(os.path, "exists", lambda path: path == device)
    assert distributed.has_nvidia_device() is (device is not None)


def test_initialise_makes_a_group_of_one_and_may_be_called_again():
    from torch import distributed as dist

    world = World(0, 1, 0, 1)
    for _ in range(2):
        initialise(world)
        assert dist.is_initialized()
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert "MASTER_PORT" not in os.environ  # or a command started from this process would listen where it does


def test_free_ports_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", distributed._free_port()))
