"""Batches that differ between two ranks are an error of both, in every public function and class across ranks."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain import kernels, losses
from fasttrain.losses.base import CrossRank
from tests.losses.unequal_batches import FAULTS, KERNELS, LOSSES

_SCRIPT = Path(__file__).with_name("unequal_batches.py")
_ROOT = Path(__file__).parents[2]
_OF_RANK_1 = {
    "rows": r"\b(6|12), 16\) float32 on rank 1",  # 12: two views as one tensor
    "no rows": r"\b0, 16\) float32 on rank 1",
    "dimension": r"\b12\) float32 on rank 1",
    "type": r"float64 on rank 1",
}
_every = pytest.mark.parametrize("name", [*KERNELS, *LOSSES])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both ranks' observations."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(_SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(folder)], check=True, env=environment, cwd=_ROOT, timeout=300)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_table_has_every_name_that_crosses_ranks():
    functions = {name for name in kernels.__all__ if "group" in inspect.signature(getattr(kernels, name)).parameters}
    public = [getattr(losses, name) for name in losses.__all__]
    classes = {cls.__name__ for cls in public if issubclass(cls, CrossRank)} | {"ClipLoss", "SigLipLoss"}
    unequal = {"sinkhorn", "sinkhorn_center", "prototype_sinkhorn_center"}  # they balance batches of different sizes
    assert functions - unequal == {name.split()[0] for name in KERNELS}
    assert classes - {"iBOTPatchLoss"} == {
        name.split()[0] for name in LOSSES
    }  # ranks mask different numbers of patches


@pytest.mark.slow
@_every
def test_unequal_batches_are_an_error_of_all_ranks(ranks, name):
    one, two = (rank["unequal"][name] for rank in ranks)
    assert one == two
    for fault in FAULTS:
        assert one[fault].startswith(f"{name.split()[0]}: ")
        assert re.search(_OF_RANK_1[fault], one[fault])
        assert "drop_last=True" in one[fault]


@pytest.mark.slow
@_every
def test_equal_batches_are_compared_once_or_not_at_all(ranks, name):
    for rank in ranks:
        assert rank["equal"][name] == {"same": True, "comparisons": [0, 1]}


@pytest.mark.slow
def test_a_compiled_loss_refuses_unequal_batches(ranks):
    for rank in ranks:
        assert rank["compiled"]["close"]
        assert rank["compiled"]["message"].startswith("NTXentLoss: ")


@pytest.mark.slow
def test_batches_on_a_device_are_compared_on_the_cpu(ranks):
    for rank in ranks:
        assert "(6, 16) float32 on rank 1" in rank["device"]


@pytest.mark.slow
def test_unequal_batches_pass_where_no_row_crosses(ranks):
    for rank in ranks:
        assert rank["queries"]
        assert rank["without gradient"] == [None, None]


@pytest.mark.slow
def test_sinkhorn_balances_unequal_batches_like_one_process(ranks):
    for rank in ranks:
        assert rank["sinkhorn"] == pytest.approx({"cpu": 0, "eager": 0}, abs=1e-6)


@pytest.mark.slow
def test_methods_in_the_trainer_compare_no_batches(ranks):
    assert [rank["methods"] for rank in ranks] == [[], []]
