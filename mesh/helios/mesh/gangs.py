"""Which devices of a node a replica gets: those that reach each other fastest, and no more room than it needs. Pure.

Tensor-parallel ranks exchange activations twice a layer, so the slowest way between two of them is what the gang runs
at. MIG slices are no gang: there is no way from slice to slice but through the host, and NCCL refuses two slices of one
device.

The proxy chooses by it among nodes, and the worker where it is not told, so that both mean the same.
"""

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

# Beyond this, devices are tried in their own order: 16 devices have 12,870 gangs of eight, a few milliseconds each
# thousand.
_MOST_GANGS: Final = 20_000


class Way(enum.IntEnum):
    """How a device reaches another one, the fastest first."""

    NVLINK = 0
    PCIE_SWITCH = 1
    PCIE_HOST = 2
    SYSTEM = 3
    UNKNOWN = 4


@dataclass(frozen=True, slots=True)
class GangDevice:
    """A device that can be used, and what nobody books of it; below 0 where more is booked than there is."""

    device_id: str
    kind: str
    free_bytes: int
    is_slice: bool = False
    ways: Mapping[str, Way] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gang:
    """The devices of one replica. `left_bytes` is what stays free on them; `slowest` is None for a single device."""

    device_ids: tuple[str, ...]
    left_bytes: int
    slowest: Way | None = None


def choose_devices(devices: Sequence[GangDevice], share_bytes: int, count: int) -> Gang | None:
    """Returns the devices for a replica; None where there are too few.

    One device is the fullest that has room (best fit). Several are of one kind; of those with the same slowest way the
    ones with the shortest ways in all are taken, then the fullest.

    Args:
        devices: In the order of preference.
        share_bytes: What the replica books on each.
        count: At least 1.
    """
    fitting = [device for device in devices if device.free_bytes >= share_bytes]
    if count == 1:
        tightest = min(fitting, key=lambda device: device.free_bytes, default=None)
        return None if tightest is None else Gang((tightest.device_id,), tightest.free_bytes - share_bytes)
    best: tuple[tuple[int, int, int], list[GangDevice]] | None = None
    for kind in dict.fromkeys(device.kind for device in fitting):
        able = [device for device in fitting if device.kind == kind and not device.is_slice]
        if len(able) < count:
            continue
        ways = tuple(tuple(_way(one, other) for other in able) for one in able)
        price, members = _fastest(ways, tuple(device.free_bytes for device in able), count)
        if best is None or price < best[0]:
            best = price, [able[member] for member in members]
    if best is None:
        return None
    (slowest, _, free_bytes), gang = best
    return Gang(tuple(device.device_id for device in gang), free_bytes - share_bytes * count, Way(slowest))


# Nodes of a cluster are alike, and most of them empty or full.
@functools.lru_cache(maxsize=1024)
def _fastest(
    ways: tuple[tuple[int, ...], ...], free: tuple[int, ...], count: int
) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    best: tuple[tuple[int, int, int], tuple[int, ...]] | None = None
    for number, gang in enumerate(combinations(range(len(free)), count)):
        if number == _MOST_GANGS:
            break
        between = [ways[one][other] for one, other in combinations(gang, 2)]
        price = (max(between), sum(between), sum(free[member] for member in gang))
        if best is None or price < best[0]:
            best = price, gang
    assert best is not None
    return best


def _way(one: GangDevice, other: GangDevice) -> Way:
    return one.ways.get(other.device_id, Way.UNKNOWN)
