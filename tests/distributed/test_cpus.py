"""The cores of a container: the quota of its control group, in both versions, and of the groups above it."""

import os

import pytest

from fasttrain.distributed import cpus


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/pod/box", {"cpu.max": "max 100000", "pod/cpu.max": "350000 100000", "pod/box/cpu.max": "max 1"}, 3),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("3:memory:/\n0::/", {"cpu.max": "no number"}, 8),
        (None, {}, 8),
    ],
)
def test_usable_cores_follow_the_quota(tmp_path, monkeypatch, own, files, cores):
    """Docker's --cpus 2 on a machine of 64 cores started 64 threads."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(cpus, "_CGROUP", tmp_path)
    monkeypatch.setattr(cpus, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.usable_cores() == cores
