"""What the host has: itself as a CPU device, and ports that nobody uses.

The device's memory is a share of what this process may use: the cgroup's limit counts where it is lower
than the machine's memory, because the kernel kills by the cgroup.
"""

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.mesh.errors import Unavailable
from helios.worker.supervisor.records import Device, DeviceKind

CPU_DEVICE: Final = "cpu:0"
# The rest is for the page cache that holds the weights (replicas map them), the storage agent and everybody else.
REPLICA_SHARE: Final = 0.6
# Half of that rest: weights that are in use, and everybody else, need the other half.
STAGING_SHARE: Final = 0.2
# Below the ephemeral range, so that no outgoing connection takes the port between the choice and the replica's bind.
_LOWEST_PORT: Final = 20_000
_TRIES: Final = 64


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a cgroup's files, and of the caches in its ``memory.stat``."""

    limit: str
    used: str
    caches: tuple[str, ...]


_VERSION_1: Final = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
_VERSION_2: Final = _Files("memory.max", "memory.current", ("active_file", "inactive_file"))


def cpu_device(
    memory_bytes: int | None, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> Device:
    """Returns the host as a device. ``memory_bytes`` None: 60 % of what this process may use."""
    if memory_bytes is None:
        memory_bytes = int(usable_memory_bytes(proc, cgroups) * REPLICA_SHARE)
    return Device(CPU_DEVICE, DeviceKind.CPU, memory_bytes)


def usable_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the machine's memory, or the lowest limit of the cgroups above this process where that is less."""
    total = _meminfo_bytes(proc / "meminfo", "MemTotal:")
    return min([total, *(limit for _, _, limit in _limited_cgroups(proc, cgroups))])


def staging_memory_bytes(memory_bytes: int | None) -> int:
    """Returns what staged revisions may take. None: a fifth of what this process may use."""
    return int(usable_memory_bytes() * STAGING_SHARE) if memory_bytes is None else memory_bytes


def used_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns what is used of ``usable_memory_bytes`` and can't be had by dropping caches.

    A container is full when its cgroup is, however much the machine has left.
    """
    free = [_meminfo_bytes(proc / "meminfo", "MemAvailable:")]
    for level, files, limit in _limited_cgroups(proc, cgroups):
        used = _read_number(level / files.used)
        if used is not None:
            free.append(limit - used + _cache_bytes(level / "memory.stat", files.caches))
    usable = usable_memory_bytes(proc, cgroups)
    return usable - max(0, min(usable, *free))


def pick_free_port(host: str, taken: frozenset[int], seed: int | None = None) -> int:
    """Returns a TCP port of ``host`` that nobody listens on now.

    Raises:
        Unavailable: NO_FREE_PORT after 64 tries.
    """
    chance = random.Random(seed)  # noqa: S311 (spreads supervisors that start at once; nothing secret)
    highest = _first_ephemeral_port() - 1
    for _ in range(_TRIES):
        port = chance.randint(_LOWEST_PORT, highest)
        if port not in taken and _is_free(host, port):
            return port
    raise Unavailable(f"no free port found on {host} in {_LOWEST_PORT} to {highest}", reason="NO_FREE_PORT")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32_768
    return first if first > _LOWEST_PORT + 1000 else 61_000


def _meminfo_bytes(meminfo: Path, name: str) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"{meminfo} does not say how much memory there is", reason="NO_MEMTOTAL")


def _limited_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Files, int]]:
    """Gives the process's cgroup and those above it, of version 1 and 2, that have a limit. Source: cgroups(7)."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _VERSION_1
        else:
            continue
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            limit = _read_number(level / files.limit)
            if limit is not None:
                yield level, files, limit
            if level == root:
                break


def _read_number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cache_bytes(statistics: Path, names: tuple[str, ...]) -> int:
    """Returns what a cgroup holds of files and can drop: what is locked, and shared memory, is on other lists."""
    try:
        lines = [line.split() for line in statistics.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(count) for name, count in lines if name in names)
