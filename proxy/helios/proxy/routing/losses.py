"""What replicas are not believed to have in their caches any more, for gateways that pick by themselves.

They know what they sent where, and of what became of it only what they are told. Each loss has a number, and who knows
all up to one of them is told of those after it; who knows too little forgets all. Nothing is kept before somebody asks.
Pure.
"""

from collections import deque
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Final

# What a busy gateway's replicas lose in seconds; it asks ten times a second. 10 MB.
_KEPT_COUNT: Final = 65_536
# Blocks of an answer, 32 kB; who lacks more is told to forget all.
_TOLD_COUNT: Final = 4096
# Where gateways' own hashes end: what a double holds exactly. Of ours, nearly none is as small and not negative.
HASH_END: Final = 1 << 53


class Losses:
    """The newest losses, numbered from 2 on: 0 is no number, and 1 that of whoever asks first.

    Invariant: who hears of all losses between two numbers hears of each block that a replica lost between them, alone
    or by its having lost everything.

    Attributes:
        is_kept: whether losses are noted.
        sequence: the number of the last one.
    """

    def __init__(self, kept_count: int = _KEPT_COUNT, told_count: int = _TOLD_COUNT) -> None:
        self.is_kept = False
        self.sequence = 1
        self._lost: deque[tuple[str, int | None]] = deque(maxlen=kept_count)
        self._told_count = told_count

    def note(self, replica_id: str, block: int | None) -> None:
        """A replica has not got a block any more; None: nothing at all. Only where losses are kept."""
        if block is None or 0 <= block < HASH_END:
            self._lost.append((replica_id, block))
            self.sequence += 1

    def since(self, sequence: int, replica_ids: AbstractSet[str]) -> dict[str, list[int]] | None:
        """What some replicas lost after a number, with no blocks who lost everything; None: nobody knows, or too much.

        Takes as long as there are losses after it.
        """
        missed_count = self.sequence - sequence
        if not 0 <= missed_count <= len(self._lost):
            return None
        found: dict[str, list[int]] = {}
        emptied: set[str] = set()
        told_count = 0
        for replica_id, block in islice(reversed(self._lost), missed_count):
            if replica_id not in replica_ids:
                continue
            if block is None:
                emptied.add(replica_id)
                continue
            found.setdefault(replica_id, []).append(block)
            told_count += 1
            if told_count > self._told_count:
                return None
        return found | {replica_id: [] for replica_id in emptied}
