"""Simulate two machines on one: network namespaces joined by a veth link that can be slowed, cut and measured.

A process in a namespace has its own network. The file system is shared, as on a cluster. Needs root and iproute2.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_DEVICE = "ft0"
_ETC = Path("/etc/netns")  # `ip netns exec` shows its files as files of /etc


@dataclass(frozen=True)
class Machine:
    """One end of the link."""

    name: str
    address: str

    def prefix(self, core: int) -> list[str]:
        """Return the words before a command that run it on this machine and on one core."""
        return ["ip", "netns", "exec", self.name, "taskset", "-c", str(core)]

    def sent(self) -> int:
        """Return the bytes sent over the link, headers included."""
        shown = _ip("-n", self.name, "-s", "-j", "link", "show", "dev", _DEVICE)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def cut(self) -> None:
        """Cut the link."""
        _ip("-n", self.name, "link", "set", _DEVICE, "down")

    def restore(self) -> None:
        """Restore the link."""
        _ip("-n", self.name, "link", "set", _DEVICE, "up")

    def shape(self, megabits: int | None) -> None:
        """Limit the link to ``megabits`` per second; None removes the limit."""
        qdisc = ["-n", self.name, "qdisc"]
        subprocess.run(["tc", *qdisc, "del", "dev", _DEVICE, "root"], check=False, capture_output=True)
        if megabits is not None:
            limits = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "400ms"]
            subprocess.run(["tc", *qdisc, "add", "dev", _DEVICE, "root", "tbf", *limits], check=True)


@contextmanager
def two_machines(name: str = "fasttrain") -> Iterator[Sequence[Machine]]:
    """Make two machines for a block. At its end, end their processes and remove them."""
    pair = [Machine(f"{name}-{k}", f"10.77.0.{k + 1}") for k in range(2)]
    try:
        for machine in pair:
            _ip("netns", "add", machine.name)
            _write_names(machine, pair)
            _ip("-n", machine.name, "link", "set", "lo", "up")
        ends = [("netns", machine.name) for machine in pair]
        _ip("link", "add", _DEVICE, *ends[0], "type", "veth", "peer", "name", _DEVICE, *ends[1])
        for machine in pair:
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", _DEVICE)
            machine.restore()
        yield pair
    finally:
        for machine in pair:
            alive = subprocess.run(["ip", "netns", "pids", machine.name], capture_output=True, text=True, check=False)
            subprocess.run(["kill", "-9", *alive.stdout.split()], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)
            shutil.rmtree(_ETC / machine.name, ignore_errors=True)


def _write_names(machine: Machine, pair: Sequence[Machine]) -> None:
    """Write the host names of both machines. Without them a name server would be asked, which takes seconds."""
    folder = _ETC / machine.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", f"{machine.address} {socket.gethostname()}"]
    lines += [f"{one.address} {one.name}" for one in pair]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "nsswitch.conf").write_text("hosts: files\n")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
