"""Every loader against malicious files: none runs code, writes elsewhere, waits for ever or controls the terminal."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image

from fasttrain.checkpoint.card import newest
from fasttrain.checkpoint.state import whole_tensors
from fasttrain.config.resolve import read_yaml, resolve
from fasttrain.errors import ConfigError, DataError
from fasttrain.files import fingerprint
from fasttrain.models.weights import read_weights
from fasttrain.pipelines import FolderSource, open_source, source_from_dataset
from fasttrain.pipelines.sources.decode import decode
from fasttrain.pipelines.sources.headers import BadImageError
from fasttrain.pretrained import from_file, from_run
from fasttrain.report import page
from fasttrain.report.runs import read_run, read_runs
from fasttrain.run import main
from tests.checkpoints import RunsCode
from tests.pipelines.sources.shard_files import jpeg, write_tar
from tests.small_runs import flags

_MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture
def code(tmp_path):
    """An object whose unpickling makes a folder, which must not exist after the test."""
    marker = tmp_path / "marker"
    yield RunsCode(marker)
    assert not marker.exists()


@pytest.fixture
def poisoned(simclr_run, tmp_path, code):
    """A run whose newest checkpoint holds code. Its card fits the file."""
    run = shutil.copytree(simclr_run, tmp_path / "run")
    folder = newest(run)
    torch.save(torch.load(folder / _MODEL, weights_only=True) | {"lr_scheduler": code}, folder / _MODEL)
    card = json.loads((folder / "fasttrain.json").read_text())
    card["files"][_MODEL] = fingerprint(folder / _MODEL)._asdict()
    del card["crc32"]  # as an earlier version's
    (folder / "fasttrain.json").write_text(json.dumps(card))
    return run


def test_the_marker_would_be_made(tmp_path):
    torch.save(RunsCode(tmp_path / "marker"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("read", [read_weights, from_file], ids=["init_from", "eval"])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
def test_code_in_weights_is_not_run(tmp_path, code, read, name):
    torch.save({"state_dict": {"weight": torch.ones(2), "other": code}}, tmp_path / name)
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("shard", ["index.json", "../../../etc/passwd", "/etc/passwd"])
def test_an_index_of_weights_names_no_other_files(tmp_path, shard):
    """One names itself, the others name files outside of the folder."""
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ConfigError) as error:
        read_weights(tmp_path / "index.json")
    assert "root:" not in str(error.value)


@pytest.mark.parametrize("read", [from_run, lambda run: whole_tensors(newest(run))], ids=["eval", "export"])
def test_code_in_a_checkpoint_is_not_run(poisoned, read):
    with pytest.raises(ConfigError, match="holds more than tensors"):
        read(poisoned)


def test_code_in_a_resumed_checkpoint_is_not_run(poisoned, images, capsys):
    assert main(flags(images, poisoned, "--epochs", 3)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mkdir) and is not loaded: opening it could run code." in line


def _bomb(levels):
    """Return YAML in which a list holds 10^levels elements through aliases."""
    lists = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lists += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lists)


_CONFIGS = {
    "tag": "!!python/object/apply:os.mkdir [marker]",
    "tag of a value": "method: simclr\nlr: !!python/object/apply:os.mkdir [marker]",
    "module": "method: !!python/module:os",
    "bomb": f"method: simclr\n{_bomb(6)}",
    "bomb in a setting": f"{_bomb(5)}\nmethod: simclr\ndata_path: *a4",
}


def _resolved(path):
    values = read_yaml(path)
    return resolve(str(values.pop("method")), {}, values)


@pytest.mark.parametrize("content", _CONFIGS.values(), ids=_CONFIGS)
def test_a_configuration_runs_no_code_and_ends_with_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        _resolved(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    run = read_run(tmp_path, "run")  # a report shows the rest
    assert run.config is None
    assert any("config.yaml is invalid" in note for note in run.notes)


def _tar(path):
    write_tar(path, [("../../evil.jpg", jpeg(0)), (f"{path.parent}/absolute.jpg", jpeg(1)), ("good.jpg", jpeg(2))])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.jpg", tarfile.LNKTYPE, "../../etc/passwd"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("device.jpg", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def test_names_and_links_in_a_tar_reach_no_other_file(tmp_path):
    path = _tar(tmp_path / "in" / "a.tar")
    before = sorted(tmp_path.parent.rglob("*"))
    source = open_source(str(path)).train
    contents = {source.read(i).tobytes() for i in range(len(source))}
    assert contents == {jpeg(0), jpeg(1), jpeg(2)}
    assert sorted(tmp_path.parent.rglob("*")) == before


def _pickled(code):
    array = np.empty(1, object)
    array[0] = code
    return array


def test_code_in_a_numpy_image_is_not_run(tmp_path, code):
    np.save(tmp_path / "a.npy", _pickled(code), allow_pickle=True)
    source = FolderSource(tmp_path)
    with pytest.raises(BadImageError):
        decode(source.read(0).tobytes())


def test_code_in_a_cached_index_is_not_run(tmp_path, code):
    """Somebody else may write to the folder of the run. The index is made again."""
    path, cache = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0))]), tmp_path / "index"
    open_source(str(path), cache=cache)
    (index,) = cache.glob("*.npz")
    np.savez(index, offsets=_pickled(code), rest=np.array("{}"))
    assert len(open_source(str(path), cache=cache).train) == 1


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_a_path_in_a_parquet_file_is_not_opened_unless_regular(tmp_path, kind):
    path = tmp_path / "x.jpg"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    path = "/dev/zero" if kind == "device" else str(path)
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": path}]}, features=Features(image=Image(decode=False)))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(f"hf:{tmp_path / 'a.parquet'}").train
    with pytest.raises(OSError, match=r"regular|directory"):
        source.read(0)


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_an_image_that_is_replaced_after_the_listing_is_not_opened(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    source = FolderSource(tmp_path)
    (tmp_path / "a.jpg").unlink()
    os.mkfifo(tmp_path / "a.jpg") if kind == "FIFO" else (tmp_path / "a.jpg").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="regular"):
        source.read(0)


class _Targets:
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return np.zeros((4, 4, 3), np.uint8), self.targets[i]


@pytest.mark.parametrize("target", ["<script>", "\x1b[31m", "../../x", 10**400, float("nan"), b"\xff"])
def test_targets_are_names_or_are_left_out(target):
    try:
        source = source_from_dataset(_Targets([target, target, "b" if isinstance(target, str) else target]))
    except DataError:
        return
    assert source.labels is None or len(source.labels) == 3


_NAMES = [
    "<svg onload=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b[0m",
    "\x9b1m",
    "\u202egnp",
]


@pytest.mark.parametrize("name", _NAMES)
def test_names_control_no_terminal_and_no_page(tmp_path, capsys, name):
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, name: 1.0}) + "\n")
    text = page.render(read_runs([folder])).encode(errors="backslashreplace").decode()
    assert "<svg onload" not in text
    assert "<img src=x" not in text
    data = tmp_path / "data"
    for split in ("train", "val"):
        for label in (name, f"{name}\nfasttrain: all is well"):
            (data / split / label).mkdir(parents=True)
            for k in range(8):
                (data / split / label / f"{k}{name}\n.jpg").write_bytes(jpeg(k) if k else b"broken")
    assert main(flags(data, tmp_path / "run", "--limit_steps", 1, "--knn_every", 0, "--max_bad_fraction", 0.5)) == 0
    printed = "".join(capsys.readouterr())
    assert name.isprintable() or name not in text + printed
    assert "\x1b" not in text + printed
    assert not any(line.startswith("fasttrain: all is well") for line in printed.splitlines())
