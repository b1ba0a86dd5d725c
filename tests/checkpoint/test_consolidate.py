"""A checkpoint's weights, whole, or a line that says what is wrong. Parts of two ranks: tests/distributed/test_two_ranks.py."""

import json
import shutil

import pytest
import torch

from fasttrain.checkpoint.consolidate import newest, whole_tensors
from fasttrain.checkpoint.store import read_card
from fasttrain.errors import ConfigError
from tests.small_runs import train_few_steps


@pytest.fixture(scope="module")
def sharded(images, tmp_path_factory):
    """The same two steps at stage 3."""
    return train_few_steps(images, tmp_path_factory.mktemp("sharded") / "run", "--zero_stage", 3)


@pytest.fixture
def copy(simclr_run, tmp_path):
    return shutil.copytree(simclr_run, tmp_path / "run")


def test_stage_3_has_what_stage_0_has(simclr_run, sharded):
    whole, joined = (whole_tensors(newest(run)) for run in (simclr_run, sharded))
    assert read_card(newest(sharded)).zero_stage == 3
    assert whole.keys() == joined.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(joined[name], tensor, rtol=1e-5, atol=1e-6)
        assert joined[name].dtype == tensor.dtype


def test_a_prefix_chooses_and_is_taken_off(simclr_run, sharded):
    for run in (simclr_run, sharded):
        everything, some = whole_tensors(newest(run)), whole_tensors(newest(run), "student.backbone.")
        assert {f"student.backbone.{name}" for name in some} == {
            n for n in everything if n.startswith("student.backbone")
        }
        assert len(some) == 30


def _forget_sums(folder):
    """As in a checkpoint of another writer: what is wrong shows only when it is opened."""
    card = json.loads((folder / "fasttrain.json").read_text())
    (folder / "fasttrain.json").write_text(json.dumps({k: v for k, v in card.items() if k not in ("files", "crc32")}))


def test_the_newest_complete_checkpoint_is_found(copy):
    folder = copy / "checkpoints"
    assert newest(copy) == newest(newest(copy)) == folder / "step-00000002"
    shutil.copytree(folder / "step-00000002", folder / "step-00000001")
    assert newest(copy).name == "step-00000002"
    (folder / "latest").unlink()
    assert newest(copy).name == "step-00000002"
    for named in (b"step-00000009", b"\xff\xfe"):  # one that was half removed; what a disk made of it
        (folder / "latest").write_bytes(named)
        assert newest(copy).name == "step-00000002"


def test_a_run_without_a_complete_checkpoint_is_an_error(copy, tmp_path):
    (copy / "checkpoints" / "step-00000002").rename(copy / "checkpoints" / ".step-00000002.part")
    for run in (copy, tmp_path):
        with pytest.raises(ConfigError, match=r"has no complete checkpoint; let it train on \(--saveckp_freq_steps"):
            newest(run)


def test_what_is_missing_damaged_or_code_is_named(copy, sharded, tmp_path):
    folder = newest(copy)
    file = folder / "mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(ConfigError, match=r"step-00000002 is broken: .*mp_rank_00_model_states.pt"):
        whole_tensors(folder)
    _forget_sums(folder)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"step-00000002 is damaged \(.+\); choose another"):
        whole_tensors(folder)
    torch.save({"module": _Touches(tmp_path / "marker")}, file)
    with pytest.raises(ConfigError, match=r"holds more than tensors \(.*open\)"):
        whole_tensors(folder)
    assert not (tmp_path / "marker").exists()
    torch.save({"other": 1}, file)
    with pytest.raises(ConfigError, match=r"is damaged \(no 'module'\)"):
        whole_tensors(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"is incomplete: mp_rank_00_model_states.pt is missing"):
        whole_tensors(folder)
    parts = shutil.copytree(newest(sharded), tmp_path / "parts")
    (parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConfigError, match=r"is incomplete: zero_pp_rank_0_mp_rank_00_optim_states.pt is missing"):
        whole_tensors(parts)


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
