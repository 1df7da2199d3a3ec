"""What a replica's KV cache lost of the prompts that it was sent, numbered, so that who misses some knows it.

A proxy sends requests where it believes their beginnings cached. The engine knows what it dropped; it tells it by the
request whose prompt it was, because block hashes are each side's own. Losses go from the engine to the replica, to the
supervisor, to each proxy; at each stage they are folded by request, the oldest are dropped where there are too many,
and a number that is skipped says so. Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

# Some tens of KiB in a message. A proxy that was away for a moment missed fewer; one that missed more begins anew.
_LOG_CAPACITY: Final = 1024


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a request's prompt of ``prompt_tokens`` tokens only the first ``kept_tokens`` are still cached."""

    request_id: str
    kept_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Losses:
    """All losses with numbers above ``after``, up to ``sequence``, the last of each request.

    Who has not heard of all up to ``after`` knows nothing of what the cache held then.
    """

    sequence: int
    after: int
    losses: tuple[Loss, ...] = ()


class LossLog:
    """The last losses of one replica.

    Invariant: what is not in the log has a number up to its ``floor``, or a later loss of the same request is.
    """

    def __init__(self, capacity: int = _LOG_CAPACITY) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, tuple[int, Loss]] = OrderedDict()
        self._sequence = 0
        self._floor = 0
        self.is_told = False
        """Whether the engine tells its losses."""

    def note(self, losses: Sequence[Loss]) -> None:
        """Takes losses, in the order in which they happened."""
        self.is_told = True
        for loss in losses:
            self._sequence += 1
            self._put(self._sequence, loss)

    def emptied(self) -> None:
        """The cache was emptied, or nobody knows what it lost: nothing is left of what was there."""
        self.is_told = True
        self._sequence += 1
        self._entries.clear()
        self._floor = self._sequence

    def take(self, news: Losses) -> None:
        """Takes what another log told of the same replica."""
        self.is_told = True
        if news.after > self._sequence:
            self._entries.clear()
            self._floor = news.after
        if news.sequence > self._sequence:
            self._sequence = news.sequence
            for loss in news.losses:
                self._put(news.sequence, loss)

    def since(self, sequence: int) -> Losses:
        """Returns what is told to whoever has heard of all up to ``sequence``."""
        new = [loss for _, loss in takewhile(lambda entry: entry[0] > sequence, reversed(self._entries.values()))]
        return Losses(self._sequence, max(sequence, self._floor), tuple(reversed(new)))

    def _put(self, number: int, loss: Loss) -> None:
        self._entries[loss.request_id] = (number, loss)
        self._entries.move_to_end(loss.request_id)
        if len(self._entries) > self._capacity:
            self._floor = self._entries.popitem(last=False)[1][0]


def joined(earlier: Losses | None, later: Losses | None) -> Losses | None:
    """Returns two reports, of which the later one follows the other without a gap, as one."""
    if earlier is None or later is None:
        return later or earlier
    if later.after > earlier.sequence or len(earlier.losses) + len(later.losses) > _LOG_CAPACITY:
        # What the earlier one said is moot, or too much: who hears this without it knows that it missed something.
        return later
    last = {loss.request_id: loss for loss in (*earlier.losses, *later.losses)}
    return Losses(later.sequence, earlier.after, tuple(last.values()))
