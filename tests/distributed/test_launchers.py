"""The ranks of srun and mpirun, from their variables."""

import pytest

from fasttrain.distributed.launchers import launched
from fasttrain.errors import ConfigError

_SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[03-05],big1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}
_MPIRUN = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-17@1",
}
_NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]


def test_a_task_of_srun_is_a_rank():
    """A bare ``srun`` of N tasks started N separate runs in one folder."""
    assert list(launched(_SRUN).items()) == list(zip(_NAMES, ["9", "10", "1", "2", "gpu03", "21234"], strict=True))
    assert launched(_SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] == "22234"
    assert launched(_SRUN | {"MASTER_ADDR": "other"})["MASTER_ADDR"] == "other"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("a[1,3]", "a1"), ("a[007-9]-ib,b", "a007-ib"), ("r[1-2]n[3,4]", "r1n3")],
)
def test_the_first_host_of_a_list_is_found(nodes, host):
    assert launched(_SRUN | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == host


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_ID": None, "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": None},
    ],
    ids=["export", "torchrun", "srun --pty bash", "sbatch", "salloc"],
)
def test_a_batch_script_and_other_launchers_are_no_tasks(changes):
    values = {name: value for name, value in (_SRUN | changes).items() if value is not None}
    assert launched(values) == {}


def test_a_rank_of_mpirun_on_one_host_is_a_rank():
    values = launched(_MPIRUN)
    assert [values[name] for name in _NAMES[:-1]] == ["1", "2", "1", "2", "127.0.0.1"]
    assert 20_000 <= int(values["MASTER_PORT"]) < 32_000
    assert launched(_MPIRUN | {"OMPI_COMM_WORLD_RANK": "0"})["MASTER_PORT"] == values["MASTER_PORT"]
    assert launched(_MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}) == {}


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "LOCAL_RANK"),
        ({**_SRUN, "SLURM_JOB_ID": ""}, "MASTER_PORT"),
        ({**_MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "LOCAL_RANK"),
    ],
)
def test_ranks_that_cannot_meet_are_refused(values, missing):
    with pytest.raises(ConfigError, match=f"^{missing}: is missing.*Export RANK="):
        launched(values)
