"""The origin that a checkpoint's card names."""

import subprocess
from dataclasses import replace

import torch

from fasttrain.checkpoint.provenance import config_hash, git_commit, provenance
from fasttrain.config.resolve import resolve


def _config(**values):
    return resolve("simclr", {"recipe": "cifar", **values})


def test_hash_covers_the_settings_that_change_values():
    expected = config_hash(_config())
    assert len(expected) == 16
    for same in ({"output_dir": "/tmp/x"}, {"resume": "never"}, {"limit_steps": 3}, {"num_workers": 7}):
        assert config_hash(_config(**same)) == expected
    for other in ({"lr": 0.123}, {"seed": 1}, {"temperature": 0.3}, {"batch_size_per_gpu": 7}, {"entropy": True}):
        assert config_hash(_config(**other)) != expected
    config = _config()
    views = replace(config.views, views=config.views.views[:1] * 2 + config.views.views[1:])
    assert config_hash(replace(config, views=views)) != expected


def test_commit_is_of_the_repository_that_tracks_the_folder(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("1")
    assert git_commit(package) is None
    for command in (["init"], ["add", "package"], ["commit", "-m", "first"]):
        git(*command)
    commit = git_commit(package)
    assert len(commit) == 40
    assert git_commit(installed) is git_commit(tmp_path / "missing") is None
    (package / "code.py").write_text("2")
    assert git_commit(package) == f"{commit}-dirty"


def test_provenance_has_the_versions_of_the_libraries():
    origin = provenance(_config())
    assert list(origin) == ["config", "commit", "torch", "deepspeed"]
    assert origin["torch"] == torch.__version__
