"""Where a checkpoint comes from."""

import subprocess
from dataclasses import replace

import torch

from fasttrain.checkpoint.provenance import config_hash, git_commit, provenance
from fasttrain.config.resolve import resolve


def _config(**values):
    return resolve("simclr", {"recipe": "cifar", **values})


def test_the_hash_is_of_what_decides_the_run():
    expected = config_hash(_config())
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    for same in ({"output_dir": "/tmp/x"}, {"resume": "never"}, {"limit_steps": 3}, {"num_workers": 7}):
        assert config_hash(_config(**same)) == expected
    for other in ({"lr": 0.123}, {"seed": 1}, {"temperature": 0.3}, {"batch_size_per_gpu": 7}, {"entropy": True}):
        assert config_hash(_config(**other)) != expected
    config = _config()
    views = replace(config.views, views=config.views.views[:1] * 2 + config.views.views[1:])
    assert config_hash(replace(config, views=views)) != expected


def test_the_commit_is_the_folder_s_own(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("1")
    assert git_commit(package) is None
    git("init")
    git("add", "package")
    git("commit", "-m", "first")
    commit = git_commit(package)
    assert commit is not None
    assert len(commit) == 40
    assert git_commit(installed) is None
    (package / "code.py").write_text("2")
    assert git_commit(package) == f"{commit}-dirty"
    assert git_commit(tmp_path / "missing") is None


def test_versions_of_the_libraries():
    found = provenance(_config())
    assert list(found) == ["config", "commit", "torch", "deepspeed"]
    assert found["torch"] == torch.__version__
    assert found["deepspeed"][0].isdigit()
