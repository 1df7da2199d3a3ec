"""Which nodes are best to fetch what before it is asked for. Pure.

A model is wanted on as many nodes as it may soon run on, and no node is asked twice: those that have it count. Which of
the others is asked is the same each time (rendezvous hashing), so that a plan that is made again moves nothing. What is
expected most for its bytes comes first, because bytes are what an hour's budget bounds.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model's served revision, and how many nodes are best to have it; `uses`: expected within a day."""

    revision: str
    size_bytes: int
    uses: float
    copies: int
    reason: str

    def also(self, other: "Wanted") -> "Wanted":
        """Returns the same, wanted for two models that serve one revision."""
        reason = f"{other.reason}; {self.reason}"
        return Wanted(self.revision, self.size_bytes, self.uses + other.uses, max(self.copies, other.copies), reason)


@dataclass(frozen=True, slots=True)
class Order:
    """A revision that a node is to fetch."""

    revision: str
    size_bytes: int
    is_asked: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a node is to fetch, the most useful first, and the uses that are expected of revisions."""

    orders: tuple[Order, ...]
    uses: tuple[tuple[str, float], ...]
    expires_at: datetime


def place(
    wanted: Iterable[Wanted],
    held: Mapping[str, Collection[str]],
    ordered: Mapping[str, Mapping[str, int]],
    *,
    bytes_per_hour: int,
) -> dict[str, list[Order]]:
    """Returns orders by node, the most useful first.

    Args:
        wanted: What is best somewhere, each revision once.
        held: What nodes have, by node: all that are connected.
        ordered: What was ordered in this hour already, with its bytes: those orders stand and are in no budget twice.
        bytes_per_hour: The budget of each node.
    """
    orders: dict[str, list[Order]] = {node: [] for node in held}
    left = {node: bytes_per_hour - sum(ordered.get(node, {}).values()) for node in held}
    for one in most_useful(wanted):
        missing_count = one.copies - sum(one.revision in revisions for revisions in held.values())
        # Who was asked in this hour goes on.
        order = {node: (one.revision not in ordered.get(node, {}), _rank(one, node)) for node in held}
        for node in sorted((node for node in held if one.revision not in held[node]), key=order.__getitem__):
            if missing_count <= 0:
                break
            if one.revision not in ordered.get(node, {}):
                if one.size_bytes > left[node]:
                    continue
                left[node] -= one.size_bytes
            orders[node].append(Order(one.revision, one.size_bytes, is_asked=False, reason=one.reason))
            missing_count -= 1
    return orders


def most_useful(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Returns what is expected most for its bytes, first."""
    return sorted(wanted, key=_usefulness, reverse=True)


def _usefulness(wanted: Wanted) -> tuple[float, str]:
    return wanted.uses / max(1, wanted.size_bytes), wanted.revision


def _rank(wanted: Wanted, node: str) -> bytes:
    return hashlib.blake2b(f"{wanted.revision} {node}".encode(), digest_size=8).digest()
