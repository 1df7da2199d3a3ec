"""Several sources of one blob, read at once: peers as far as they are good, the object store where they are not.

A read that fails is not repeated here: the transfer engine asks for the chunk again, and gets another source then. A
source that lied is never asked again in this transfer; one that fails rests, and is dropped after some failures.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from helios.mesh.errors import BlobNotFound, HeliosError, Unavailable
from helios.mesh.transfer.source import ChunkMismatch, Interrupted, RangeSource, Sink, SourceFault, SourceState

log = structlog.get_logger()

_MAX_FAILURES: Final = 3
"""In a row, each after a rest; then a source is dropped for the rest of the transfer."""

_REST_SECONDS: Final = 0.5
"""After a first failure; twice as long after each further one."""


@dataclass(slots=True)
class _Standing:
    rank: int
    reads: int = 0
    failures: int = 0
    rests_until: float = 0.0
    is_dropped: bool = False


class SourceBook:
    """Chooses among sources. Pure; not thread-safe."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """Takes a rank for each source: one of a lower rank is preferred as long as it can be asked."""
        self._standings = [_Standing(rank) for rank in ranks]

    def pick(self, now: float) -> int | None:
        """The source to read from: of the best rank, the one with the fewest reads; None when all are dropped.

        When all of them rest, the one that has rested most: waiting is the caller's.
        """
        usable = [(index, s) for index, s in enumerate(self._standings) if not s.is_dropped]
        if not usable:
            return None
        awake = [(index, s) for index, s in usable if s.rests_until <= now]
        if not awake:
            return min(usable, key=lambda item: (item[1].rests_until, item[0]))[0]
        return min(awake, key=lambda item: (item[1].rank, item[1].reads, item[0]))[0]

    def begin(self, index: int) -> None:
        self._standings[index].reads += 1

    def succeeded(self, index: int) -> None:
        standing = self._standings[index]
        standing.reads -= 1
        standing.failures = 0

    def failed(self, index: int, now: float) -> bool:
        """Notes a failure; returns whether the source is dropped for it."""
        standing = self._standings[index]
        standing.reads -= 1
        if now < standing.rests_until:
            # Several reads were under way when it failed, or it is all that is left: that is one failure.
            return False
        standing.failures += 1
        standing.rests_until = now + _REST_SECONDS * 2.0 ** (standing.failures - 1)
        if standing.is_dropped or standing.failures < _MAX_FAILURES:
            return False
        standing.is_dropped = True
        return True

    def lied(self, index: int) -> None:
        """Its bytes were wrong, or it does not have what it said it had: it is dropped."""
        standing = self._standings[index]
        standing.reads -= 1
        standing.is_dropped = True

    def ended(self, index: int) -> None:
        """A read ended for a reason that is not the source's."""
        self._standings[index].reads -= 1


@dataclass(frozen=True, slots=True)
class Member:
    """One source of a swarm."""

    name: str
    source: RangeSource
    rank: int
    """0 for peers, more for what costs more."""


class Swarm:
    """Reads each range from one of several sources. Each of them verifies what it reads, or is trusted."""

    def __init__(self, members: Sequence[Member], size_bytes: int) -> None:
        self._members = members
        self._size_bytes = size_bytes
        self._book = SourceBook([member.rank for member in members])
        self._lock = threading.Lock()
        self._read_bytes = [0] * len(members)

    def describe(self) -> SourceState:
        return SourceState(self._size_bytes)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        with self._lock:
            index = self._book.pick(time.monotonic())
            if index is None:
                raise Unavailable("no source of the blob is left", reason="SOURCE_UNAVAILABLE")
            self._book.begin(index)
        member = self._members[index]
        try:
            member.source.read(state, offset, length, sink)
        except ChunkMismatch:
            with self._lock:
                self._book.lied(index)
            log.warning("a source sent wrong bytes and is dropped", source=member.name, offset=offset)
            raise
        except Interrupted as interrupted:
            # The engine ends reads that stall, or are too long; anything else is not the source's doing.
            if isinstance(interrupted.__cause__, SourceFault):
                self._fail(index, interrupted.__cause__)
            else:
                with self._lock:
                    self._book.ended(index)
            raise
        except BlobNotFound as error:
            with self._lock:
                self._book.lied(index)
            log.info("a source does not have the blob any more", source=member.name)
            raise Unavailable(f"{member.name}: {error.message}", reason="SOURCE_UNAVAILABLE") from error
        except HeliosError as error:
            self._fail(index, error)
            # Another source may have what this one refuses for good.
            raise Unavailable(f"{member.name}: {error.message}", reason="SOURCE_UNAVAILABLE") from error
        with self._lock:
            self._book.succeeded(index)
            self._read_bytes[index] += length

    def close(self) -> None:
        for member in self._members:
            member.source.close()

    def read_bytes(self) -> dict[str, int]:
        """Bytes that came from each source."""
        with self._lock:
            return {member.name: count for member, count in zip(self._members, self._read_bytes, strict=True)}

    def _fail(self, index: int, error: HeliosError) -> None:
        with self._lock:
            is_dropped = self._book.failed(index, time.monotonic())
        if is_dropped:
            log.warning("a source fails and is dropped", source=self._members[index].name, error=error.message)
