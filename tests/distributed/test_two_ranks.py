"""Two ranks on half the batch each do what one rank does on all of it: every reduction, loss, method and ZeRO stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint.state import read, whole_tensors
from fasttrain.checkpoint.store import restore
from fasttrain.distributed.world import World, initialise
from tests.checkpoint.resume_on_ranks import RESUMED, STEP, card_of, engine_of, folder_of, other
from tests.checkpoints import publish, train
from tests.distributed.two_ranks import CASES, LAYERWISE, OPTIONS, full_state

pytestmark = pytest.mark.slow
_SCRIPT = Path(__file__).with_name("two_ranks.py")
_ROOT = Path(__file__).parents[2]
_RANK_LOCAL = ("running_", "num_batches")
"""MoCo's BatchNorm statistics are of the first rank's batches alone, as under DDP."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder):
    """The results of one rank and of two."""
    results = []
    for ranks in (1, 2):
        path = folder / f"{ranks}.pt"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, str(_SCRIPT), str(path)], check=True, env=environment, cwd=_ROOT, timeout=500)
        results.append(torch.load(path, weights_only=True))
    return results


def _close(one, other, *, rtol, atol, skip=()):
    """Compare tensors by name."""
    assert one.keys() == other.keys()
    for name in one:
        if not any(part in name for part in skip):
            torch.testing.assert_close(other[name], one[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def _different(one, two):
    """Return the names of the tensors that are not equal to the last bit."""
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def _case_name(case):
    return "-".join(str(part) for part in case)


@pytest.mark.parametrize("kind", ["kernels", "losses"])
def test_reductions_and_losses_equal_one_rank(results, kind):
    """Their values, their gradients, and the losses' memory banks."""
    one, two = (r[kind] for r in results)
    assert one.keys() == two.keys()
    assert len(one) > 13
    for name, tensors in one.items():
        exact = kind == "kernels"
        assert exact or any(x.abs().sum() > 0 for x in tensors[1:]), name
        for a, b in zip(tensors, two[name], strict=True):
            if exact:
                tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
            else:
                tolerance = 1e-5 if name.startswith("swav") else 1e-10  # SwAV's codes are fp32
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_training_equals_one_rank(results, case):
    one, two = (r[case] for r in results)
    _close(one, two, rtol=1e-4, atol=2e-5, skip=_RANK_LOCAL if case[0] == "moco" else ())


@pytest.mark.parametrize("case", OPTIONS, ids=_case_name)
def test_offload_and_overlap_change_no_bit(results, case):
    assert _different(results[1][("dino", True, case[0])], results[1][case]) == []


@pytest.mark.parametrize("case", LAYERWISE, ids=_case_name)
def test_norms_of_sharded_parameters_are_those_of_whole_ones(results, case):
    """Compare every parameter's path over a few steps, relative to the path's length.

    LARS moves a weight by 0.5 % of its norm. fp32 rounds that to 1e-5 of the path (7e-6 measured). LAMB divides the
    rounding of gradients by their size (1e-4 measured). With the norms of shards instead, the parameters that are cut
    differ by 1e-3 to 2e-2.
    """
    one, two = (r[case] for r in results)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-6, atol=1e-5)
    assert one["after"].keys() == two["after"].keys()
    tolerance = {"lars": 3e-5, "lamb": 3e-4}[case[0]]
    for name, start in one["before"].items():
        assert torch.equal(two["before"][name], start), name
        end = one["after"][name].double()
        distance, path = (two["after"][name] - end).norm(), (end - start).norm()
        assert path > 0 or not name.endswith((".weight", ".bias")), name
        assert distance <= tolerance * path, f"{name}: {distance / path:.1e} of its path"


def _resumed_close(case, one, other):
    """Compare without moments, whose shards have other lengths.

    Adam and LAMB are left out: they turn the rounding error of a zero gradient into a step of full length.
    """
    if case[2] not in ("adamw", "lamb"):
        skip = _RANK_LOCAL if case[0] == "moco" else ()
        one, other = ({n: t for n, t in tensors.items() if "moment " not in n} for tensors in (one, other))
        _close(one, other, rtol=1e-4, atol=2e-5, skip=skip)


@pytest.mark.parametrize("case", RESUMED, ids=_case_name)
def test_two_ranks_resume_from_any_checkpoint(results, case):
    one, two = (r[("resumed", *case)] for r in results)
    for run in (one, two):
        assert len([name for name in run["straight"] if name.startswith("moment ")]) > 1
        assert _different(run["straight"], run["resumed"]) == []
    straight = {name: tensor for name, tensor in two["straight"].items() if "moment " not in name}
    _close(straight, two["other stage"], rtol=1e-4, atol=2e-5)
    _resumed_close(case, one["straight"], two["of one rank"])


@pytest.mark.parametrize("case", RESUMED, ids=_case_name)
def test_one_rank_resumes_from_the_checkpoint_of_two(results, folder, case):
    """In this process. The restored state is equal to the last bit, and the next step up to rounding."""
    checkpoints, world = folder / "checkpoints", World(0, 1, 0, 1)
    initialise(world)
    engine = engine_of(case, 0, world)
    source = checkpoints / "2" / folder_of(case) / STEP
    assert restore(engine, source, card_of(case, engine)) == 2
    publish(engine, checkpoints / "here", card_of(case, engine), keep=False)
    state = {"losses": torch.tensor(train(engine, range(2, 3))), **full_state(engine)}
    engine.close()
    here = read(checkpoints / "here" / STEP, 0, 1).whole()
    assert _different(here, read(source, case[1], 2).whole()) == []
    assert _different(here, read(checkpoints / "resharded" / folder_of(case) / STEP, other(case[1]), 2).whole()) == []
    _resumed_close(case, results[0][("resumed", *case)]["straight"], state)


def test_one_ranks_full_disk_is_every_ranks_error(results):
    for ranks, (messages, folders, chosen) in zip((1, 2), (r["full disk"] for r in results), strict=True):
        assert len(messages) == ranks
        assert len(set(messages)) == 1
        assert "File too large" in messages[0]
        assert folders == [chosen] == [STEP]


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_tensors_join_the_parts_to_the_last_bit(results, folder, ranks):
    """Two ranks are at stage 3, where no file has a whole parameter, and the teacher's parts are in other files."""
    state, path = results[ranks - 1]["consolidated"], folder / f"{ranks}.consolidated" / STEP
    assert len(state) > 20
    assert _different(whole_tensors(path), state) == []
    prefix = "teacher.backbone."
    teacher = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    assert _different(whole_tensors(path, prefix), teacher) == []


def test_features_are_the_same_on_two_ranks(results):
    one, two = (r["evaluation"] for r in results)
    torch.testing.assert_close(one["features"][:, 0] * 255, torch.arange(11.0) * 20)
    assert _different(one, two) == []
