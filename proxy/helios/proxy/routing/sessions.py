"""Where requests that belong together go: the same key means the same replica, on every proxy, while it is there.

A hash ring: each replica has some points on it, a key's home is the replica of the next point. A replica that comes
takes some keys of the others, one that goes leaves its own to them, and no other key moves. How much a home weighs
against load is the score's to say (`pick.Affinity`), which bounds what one key can do to a replica. The gateway has the
same ring (`helios/mesh/envoy/lane.lua`), so the hash is one that a few lines of any language make. Pure.
"""

import zlib
from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Final

# Of two replicas the larger share of the keys is some 60 % with it; a point takes a microsecond to come or go.
_POINTS: Final = 16


class Ring:
    """The replicas that keys are told apart by. Invariant: where a key is at home depends on the replicas alone."""

    def __init__(self, replica_ids: Iterable[str] = ()) -> None:
        self._points: list[tuple[int, str]] = sorted(
            point for replica_id in replica_ids for point in _points_of(replica_id)
        )

    def add(self, replica_id: str) -> None:
        """A replica comes; it must not be there."""
        for point in _points_of(replica_id):
            insort(self._points, point)

    def remove(self, replica_id: str) -> None:
        """A replica goes; it must be there."""
        gone = set(_points_of(replica_id))
        self._points = [point for point in self._points if point not in gone]

    def home(self, key: str) -> str:
        """The replica of a key; empty where there is none."""
        if not self._points:
            return ""
        place = bisect_right(self._points, (_hash(key), ""))
        return self._points[place % len(self._points)][1]


def _points_of(replica_id: str) -> list[tuple[int, str]]:
    return [(_hash(f"{replica_id} {number}"), replica_id) for number in range(_POINTS)]


def _hash(text: str) -> int:
    """The same on every proxy, unlike Python's own: CRC-32, and the finalizer of MurmurHash3, since CRC-32 alone puts
    names that differ in a digit side by side.
    """
    value = zlib.crc32(text.encode(errors="replace"))
    value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16
