"""The state of one transfer: which chunk next, what is tried again when, how far the bytes are contiguous.

    CLAIMED ──verified──▶ WRITTEN          a journal says that it is on the disk; read back before it counts
       │ refuted             ▲
       ▼                     │ written
    MISSING ──next_job──▶ BUSY ──failed──▶ MISSING, not before a delay; or the transfer fails

Chunks are begun in order and never further than a window ahead of the first one that is missing: what is hashed in
order behind them is then still in memory. Nothing here knows threads, clocks or files.
"""

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of the blob that is fetched in one request."""

    index: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a chunk, and the BLAKE3 that its bytes are known to have."""

    offset: int
    length: int
    blake3: bytes


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read this chunk from the source."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Verify:
    """Read this chunk from the disk; it should have this BLAKE3."""

    chunk: Chunk
    blake3: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something ends, or for so many seconds; None: until something ends."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Finished:
    """Every chunk is written."""


Job = Fetch | Verify | Wait | Finished

Choose = Callable[[Sequence[Chunk]], int | None]
"""Which of some missing chunks, which are in order, to begin with, by its place among them; None: none of them now."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how late a chunk is tried again.

    Full jitter: many that fail at once must not come back at once.
    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    max_attempts: int = 8
    """Tries of one chunk. With the delays below the last is some 40 s after the first, on the average."""
    base_seconds: float = 0.25
    cap_seconds: float = 20.0
    max_retry_after_seconds: float = 120.0
    """A source that asks for more patience than this is one that is not there."""

    def delay_seconds(self, attempt: int, jitter: float, retry_after_seconds: float | None) -> float | None:
        """The pause after the failed attempt (from 1), or None to give up; `jitter` is uniform in [0, 1)."""
        if attempt >= self.max_attempts or (retry_after_seconds or 0) > self.max_retry_after_seconds:
            return None
        # A source that names a time is not asked before it; jitter spreads those that were told the same.
        ceiling = min(self.cap_seconds, self.base_seconds * 2.0 ** min(attempt, 32))
        return (retry_after_seconds or 0.0) + jitter * ceiling


class ChunkState(Enum):
    """Where a chunk stands."""

    CLAIMED = auto()
    MISSING = auto()
    BUSY = auto()
    WRITTEN = auto()


def uniform_chunks(size_bytes: int, chunk_bytes: int) -> list[Chunk]:
    """Cuts a blob into chunks of one size, the last one shorter."""
    offsets = range(0, size_bytes, chunk_bytes)
    return [Chunk(index, at, min(chunk_bytes, size_bytes - at)) for index, at in enumerate(offsets)]


def aligned_chunks(lengths: Sequence[int], chunk_bytes: int) -> list[Chunk]:
    """Joins neighbouring parts of a blob to chunks of at most `chunk_bytes`, or of one part where that is larger.

    A chunk that is fetched in one request then holds whole parts, so that each part can be verified by its own hash.
    """
    chunks: list[Chunk] = []
    offset = joined_bytes = 0
    for length in lengths:
        if joined_bytes and joined_bytes + length > chunk_bytes:
            chunks.append(Chunk(len(chunks), offset, joined_bytes))
            offset, joined_bytes = offset + joined_bytes, 0
        joined_bytes += length
    return [*chunks, Chunk(len(chunks), offset, joined_bytes)] if joined_bytes else chunks


def parts_of_chunks(chunks: Sequence[Chunk], lengths: Sequence[int], hashes: Sequence[bytes]) -> list[tuple[Part, ...]]:
    """The parts of each chunk; every chunk begins and ends where parts do."""
    ends = accumulate(lengths)
    parts = deque(Part(end - length, length, hash_) for end, length, hash_ in zip(ends, lengths, hashes, strict=True))
    found: list[tuple[Part, ...]] = []
    for chunk in chunks:
        own: list[Part] = []
        while parts and parts[0].offset < chunk.offset + chunk.length:
            own.append(parts.popleft())
        found.append(tuple(own))
    return found


class TransferMachine:
    """The chunks of one blob. Pure; not thread-safe."""

    def __init__(
        self, chunks: list[Chunk], claims: Mapping[int, bytes], *, policy: RetryPolicy, window_count: int
    ) -> None:
        """Takes contiguous chunks from offset 0 on, and the BLAKE3 of those that a journal claims."""
        self._chunks = chunks
        self._claims = {index: claim for index, claim in claims.items() if 0 <= index < len(chunks)}
        self._policy = policy
        self._window_count = window_count
        self._states = [
            ChunkState.CLAIMED if index in self._claims else ChunkState.MISSING for index in range(len(chunks))
        ]
        self._attempts: dict[int, int] = {}
        self._unseen_claims = deque(sorted(self._claims))
        # A sorted list is a heap.
        self._ready = list(range(len(chunks)))
        self._delayed: list[tuple[float, int]] = []
        self._not_before = 0.0
        self._first_unwritten = 0
        self.written_bytes = 0

    @property
    def chunk_count(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    @property
    def frontier_bytes(self) -> int:
        """Every byte before this one is written; it never goes back."""
        first = self._first_unwritten
        return self._chunks[first].offset if first < len(self._chunks) else self._size_bytes

    @property
    def is_finished(self) -> bool:
        """Whether every chunk is written."""
        return self._first_unwritten == len(self._chunks)

    def state(self, index: int) -> ChunkState:
        """Where a chunk stands."""
        return self._states[index]

    def next_job(self, now: float, choose: Choose | None = None) -> Job:
        """Returns what to do next; a Fetch or Verify makes its chunk busy until its end is told.

        With `choose` chunks are begun in the order that it says, within the window, and what a journal claims is looked
        at before anything is fetched: others may wait for it. One transfer has it always, or never.
        """
        if self.is_finished:
            return Finished()
        while self._delayed and self._delayed[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._delayed)[1])
        if choose is not None:
            return self._chosen_job(now, choose)
        if self._ready and self._ready[0] < self._first_unwritten + self._window_count:
            if self._states[self._ready[0]] is ChunkState.CLAIMED:
                return self._begin_verify()
            if now >= self._not_before:
                return self._begin_fetch()
            return Wait(self._not_before - now)
        return Wait(self._delayed[0][0] - now if self._delayed else None)

    def written(self, index: int) -> None:
        """A busy chunk is on its place in the file."""
        assert self._states[index] is ChunkState.BUSY, "only what was begun can end"
        self._states[index] = ChunkState.WRITTEN
        self._attempts.pop(index, None)
        self.written_bytes += self._chunks[index].length
        while not self.is_finished and self._states[self._first_unwritten] is ChunkState.WRITTEN:
            self._first_unwritten += 1

    def refuted(self, index: int) -> None:
        """A claimed chunk is not what the journal says; it is fetched anew, which is no fault of the source."""
        assert self._states[index] is ChunkState.BUSY, "only what was begun can end"
        self._states[index] = ChunkState.MISSING
        heapq.heappush(self._ready, index)

    def failed(self, index: int, now: float, *, jitter: float, retry_after_seconds: float | None = None) -> bool:
        """A fetch failed in a way that may pass; returns False when it was the last try.

        A source that asked for a pause gets it for all chunks, not for this one only.
        """
        assert self._states[index] is ChunkState.BUSY, "only what was begun can end"
        self._states[index] = ChunkState.MISSING
        attempt = self._attempts[index] = self._attempts.get(index, 0) + 1
        delay_seconds = self._policy.delay_seconds(attempt, jitter, retry_after_seconds)
        if delay_seconds is None:
            return False
        heapq.heappush(self._delayed, (now + delay_seconds, index))
        if retry_after_seconds:
            self._not_before = max(self._not_before, now + retry_after_seconds)
        return True

    def _chosen_job(self, now: float, choose: Choose) -> Job:
        if self._unseen_claims:
            index = self._unseen_claims.popleft()
            self._states[index] = ChunkState.BUSY
            return Verify(self._chunks[index], self._claims[index])
        if now < self._not_before:
            return Wait(self._not_before - now)
        delayed = {index for _, index in self._delayed}
        window = range(self._first_unwritten, min(self._first_unwritten + self._window_count, len(self._chunks)))
        missing = [i for i in window if self._states[i] is ChunkState.MISSING and i not in delayed]
        place = choose([self._chunks[index] for index in missing]) if missing else None
        if place is None:
            return Wait(self._delayed[0][0] - now if self._delayed else None)
        self._states[missing[place]] = ChunkState.BUSY
        return Fetch(self._chunks[missing[place]])

    @property
    def _size_bytes(self) -> int:
        return self._chunks[-1].offset + self._chunks[-1].length if self._chunks else 0

    def _begin_verify(self) -> Verify:
        index = heapq.heappop(self._ready)
        self._states[index] = ChunkState.BUSY
        return Verify(self._chunks[index], self._claims[index])

    def _begin_fetch(self) -> Fetch:
        index = heapq.heappop(self._ready)
        self._states[index] = ChunkState.BUSY
        return Fetch(self._chunks[index])
