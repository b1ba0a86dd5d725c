"""The lock on a run's folder."""

import os
import signal

import pytest

from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from fasttrain.run import main
from fasttrain.training.lock import LOCK, FolderLock
from tests.small_runs import flags

_ONE = World(0, 1, 0, 1)


def test_second_run_in_a_folder_is_refused(images, tmp_path, capsys):
    """It killed the first one, whose checkpoint folder it removed."""
    with FolderLock(tmp_path, _ONE):
        assert main(flags(images, tmp_path, "--limit_steps", 1)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--output_dir {tmp_path}" in line
        assert f"process {os.getpid()} on " in line
        assert {path.name for path in tmp_path.iterdir()} == {LOCK}
    assert main(flags(images, tmp_path, "--limit_steps", 1, "--knn_every", 0)) == 0
    assert not (tmp_path / LOCK).exists()


def test_lock_of_a_killed_process_is_free(tmp_path):
    child = os.fork()
    if not child:
        FolderLock(tmp_path, _ONE).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with FolderLock(tmp_path, _ONE), pytest.raises(ConfigError, match="is in use"), FolderLock(tmp_path, _ONE):
        pass
