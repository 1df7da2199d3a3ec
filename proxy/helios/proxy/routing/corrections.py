"""What replicas say that their KV caches lost, taken into the index of who has which prompts.

A replica follows its engine's own events, numbers what was lost of the prompts that it was sent, and tells it with its
load. A number that was not heard of means that something was missed, or that the cache was emptied: either way nothing
is left to be believed of what was there before. So a session that begins anew needs no history, no stage on the way
has to keep everything, and what is believed errs on the side of a replica that has less. Pure.
"""

from dataclasses import dataclass
from typing import Final

from helios.proxy.routing.prefix import PrefixIndex

# What a cache has room for is a guess from bytes; one that tells its losses may have twice as much, and say when not.
_ROOM_OF_THOSE_THAT_TELL: Final = 2


@dataclass(frozen=True, slots=True)
class KvNews:
    """What a KV cache lost: all that is numbered above ``after``, up to ``sequence``.

    ``losses`` are requests, each with the share of its prompt that is left.
    """

    sequence: int
    after: int
    losses: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class Tally:
    """How often what was believed was corrected.

    Attributes:
        losses: Prompts that a replica lost in part or whole; those of other proxies are not counted.
        blocks: Blocks that were forgotten for it.
        emptied: Replicas of which everything was forgotten.
    """

    losses: int = 0
    blocks: int = 0
    emptied: int = 0


class Corrections:
    """Keeps an index in step with what replicas say.

    Invariant: the index has nothing that was noted before a number that was missed.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._heard: dict[str, int] = {}
        self._tally = Tally()

    def take(self, replica_id: str, news: KvNews) -> None:
        """Takes in what a replica says; what was heard before changes nothing."""
        heard = self._heard.get(replica_id, 0)
        if news.after > heard:
            self._index.forget(replica_id)
            self._tally.emptied += 1
        self._heard[replica_id] = max(heard, news.sequence)
        if news.sequence <= heard:
            return
        for request_id, ratio in news.losses:
            if lost_count := self._index.keep(replica_id, request_id, ratio):
                self._tally.losses += 1
                self._tally.blocks += lost_count

    def take_tally(self) -> Tally:
        """Returns the counts since the last call."""
        taken, self._tally = self._tally, Tally()
        return taken

    def room(self, replica_id: str, guessed_blocks: int) -> int:
        """How many blocks may be believed to be in a replica's cache."""
        return guessed_blocks * _ROOM_OF_THOSE_THAT_TELL if replica_id in self._heard else guessed_blocks

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        self._heard.pop(replica_id, None)
