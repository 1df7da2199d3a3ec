"""Which devices a replica on several of them gets: those that reach each other fastest. Pure.

Tensor-parallel ranks exchange activations twice a layer, so the slowest way between two of them is what the gang runs
at. MIG slices are no gang: there is no way from slice to slice but through the host, and NCCL refuses two slices of one
device.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

from helios.worker.supervisor.records import Device, LinkKind

_RANKS: Final = {LinkKind.NVLINK: 0, LinkKind.PCIE_SWITCH: 1, LinkKind.PCIE_HOST: 2, LinkKind.SYSTEM: 3}
_UNKNOWN: Final = 4
# Beyond this, devices are tried in their own order: 16 devices have 12,870 gangs of eight, a few milliseconds each
# thousand.
_MOST_GANGS: Final = 20_000


def choose_gang(fitting: Sequence[Device], free: Mapping[str, int], count: int) -> tuple[str, ...]:
    """Returns ``count`` devices of one kind, in their order; empty where there are too few.

    Among gangs with the same slowest way, the one with the shortest ways in all is taken, then the fullest.

    Args:
        fitting: Devices with room, in the order of preference.
        free: Free bytes by device id.
        count: At least 2.
    """
    best: tuple[tuple[int, int, int], tuple[str, ...]] | None = None
    for kind in dict.fromkeys(device.kind for device in fitting):
        able = [device for device in fitting if device.kind is kind and not device.facts.parent_device_id]
        for number, gang in enumerate(combinations(able, count)):
            if number == _MOST_GANGS:
                break
            ways = [_rank(one, other) for one, other in combinations(gang, 2)]
            names = tuple(device.device_id for device in gang)
            price = (max(ways), sum(ways), sum(free[name] for name in names))
            if best is None or price < best[0]:
                best = (price, names)
    return best[1] if best is not None else ()


def _rank(one: Device, other: Device) -> int:
    kinds = [link.kind for link in one.facts.links if link.device_id == other.device_id]
    return min((_RANKS[kind] for kind in kinds), default=_UNKNOWN)
