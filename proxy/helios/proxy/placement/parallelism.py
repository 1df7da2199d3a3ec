"""How a model is split over devices, where its settings leave that to whoever places it. Pure.

The smallest gang that fits: ranks cost memory of their own, and what they tell each other costs time. Tensor-parallel
ranks talk twice a layer, so they stay within an island of devices that NVLink joins; on a node without NVLink all
devices of a kind are one. Stages of a pipeline pass on one array a step, from island to island if need be. All ranks of
a replica are on one node: workers start no gang across nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from helios.mesh.gangs import Gang, GangDevice, Way, choose_devices

# More ranks than one node has devices.
_MOST_RANKS: Final = 16


@dataclass(frozen=True, slots=True)
class Split:
    """Into how many ranks each layer is split, and into how many stages the layers are cut."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def rank_count(self) -> int:
        """Devices that it takes."""
        return self.tensor * self.pipeline


WHOLE: Final = Split()


@lru_cache(maxsize=1024)
def splits_of(tensor: tuple[int, ...], pipeline: tuple[int, ...]) -> tuple[Split, ...]:
    """Ways to split a model, the smallest gang first; of gangs of one size the one with fewer stages.

    Args:
        tensor: Into how many ranks its layers can be split; empty: nobody knows, so they are not.
        pipeline: Into how many stages they can be cut; empty: the same.
    """
    found = (Split(ranks, stages) for ranks in tensor or (1,) for stages in pipeline or (1,))
    return tuple(
        sorted(
            (split for split in found if split.rank_count <= _MOST_RANKS),
            key=lambda split: (split.rank_count, split.pipeline),
        )
    )


def choose_groups(devices: Sequence[GangDevice], share_bytes: int, split: Split) -> Gang | None:
    """Returns the devices of all ranks, those of one stage together; None where there are too few.

    A stage is within one island. Islands that have the fewest devices left over are used first, and of an island the
    devices with the least memory to spare: what needs many, or much, finds them elsewhere. Ranks of one stage get those
    that reach each other fastest.
    """
    count = split.rank_count
    if count == 1:
        tightest = min((d for d in devices if d.free_bytes >= share_bytes), key=lambda d: d.free_bytes, default=None)
        return None if tightest is None else Gang((tightest.device_id,), tightest.free_bytes - share_bytes)
    best: tuple[tuple[int, int], list[GangDevice], Way] | None = None
    for kind in dict.fromkeys(device.kind for device in devices):
        # Slices of a device don't reach each other.
        alike = [device for device in devices if device.kind == kind and not device.is_slice]
        members = _of_kind(alike, share_bytes, split)
        if members is None:
            continue
        slowest = max(_way(one, other) for one in members for other in members if one is not other)
        price = int(slowest), sum(member.free_bytes for member in members)
        if best is None or price < best[0]:
            best = price, members, slowest
    if best is None:
        return None
    (_, free_bytes), members, slowest = best
    return Gang(tuple(member.device_id for member in members), free_bytes - share_bytes * count, slowest)


def islands_of(devices: Sequence[GangDevice]) -> list[list[GangDevice]]:
    """Devices that reach each other by NVLink, if need be through others; all are one where there is no NVLink."""
    if not any(way is Way.NVLINK for device in devices for way in device.ways.values()):
        return [list(devices)] if devices else []
    left = {device.device_id: device for device in devices}
    islands: list[list[GangDevice]] = []
    while left:
        reached = [left.pop(next(iter(left)))]
        for device in reached:
            near = [key for key, way in device.ways.items() if way is Way.NVLINK and key in left]
            near += [key for key, other in left.items() if other.ways.get(device.device_id) is Way.NVLINK]
            reached += [left.pop(key) for key in dict.fromkeys(near)]
        islands.append(reached)
    return islands


def _of_kind(devices: Sequence[GangDevice], share_bytes: int, split: Split) -> list[GangDevice] | None:
    # Stages alone may be anywhere, and are best near each other.
    able = [
        sorted((d for d in island if d.free_bytes >= share_bytes), key=lambda d: (d.free_bytes, d.device_id))
        for island in islands_of(devices)
    ]
    able = [island for island in able if len(island) >= split.tensor]
    if sum(len(island) // split.tensor for island in able) < split.pipeline:
        return None
    # One island that has room for all, the smallest; else the largest first, so that few are cut.
    whole = [island for island in able if len(island) >= split.rank_count]
    order = sorted(whole, key=len)[:1] or sorted(able, key=len, reverse=True)
    if split.pipeline == 1:
        # Without NVLink, some devices of a node are nearer each other than others.
        nearest = choose_devices(order[0], share_bytes, split.tensor)
        assert nearest is not None, "they are of one kind, no slices, and enough of them have the room"
        return [device for device in order[0] if device.device_id in nearest.device_ids]
    members: list[GangDevice] = []
    for island in order:
        stages = min(len(island) // split.tensor, split.pipeline - len(members) // split.tensor)
        members += island[: stages * split.tensor]
    return members


def _way(one: GangDevice, other: GangDevice) -> Way:
    return one.ways.get(other.device_id, Way.UNKNOWN)
