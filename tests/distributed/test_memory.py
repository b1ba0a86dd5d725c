"""The memory that a container leaves to a process, in both versions of control groups."""

from types import SimpleNamespace

import psutil
import pytest

from fasttrain.distributed import cpus
from fasttrain.distributed.memory import available_memory


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "7", "memory.stat": "inactive_file 3"}, 1000),
        ("0::/", {"memory.max": "100", "memory.current": "70", "memory.stat": "anon 1\ninactive_file 30"}, 60),
        ("0::/", {"memory.max": "100", "memory.current": "170", "memory.stat": "inactive_file 3"}, 0),
        (
            "4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "100",
                "memory/a/memory.usage_in_bytes": "70",
                "memory/a/memory.stat": "total_inactive_file 5",
            },
            35,
        ),
        ("3:cpu:/\n0::/", {}, 1000),
    ],
)
def test_memory_is_limited_by_the_container(tmp_path, monkeypatch, own, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(cpus, "_CGROUP", tmp_path)
    monkeypatch.setattr(cpus, "_OWN", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_memory() == expected
