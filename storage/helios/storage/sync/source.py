"""One blob of many sources: peers that have it, or some of it by now, and the cloud.

The transfer engine asks it which chunk next (it is a `Guide`) and then to read that (it is a `RangeSource`); `policy`
decides both at once, so that a read knows whom it was meant for. A read that fails is not repeated here: the engine
asks again, and another source is chosen then. All that is read is verified chunk by chunk, the cloud's bytes too.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from helios.mesh.errors import BlobNotFound, HeliosError, Unavailable
from helios.mesh.transfer.machine import Chunk
from helios.mesh.transfer.source import ChunkMismatch, Interrupted, RangeSource, Sink, SourceFault, SourceState
from helios.mesh.transfer.spans import Span
from helios.storage.chunk_index import ChunkIndex
from helios.storage.manifest import Digest
from helios.storage.sync.policy import STORE, Asked, SwarmPolicy
from helios.storage.verified_source import VerifiedSource

log = structlog.get_logger()


class Coordinator(Protocol):
    """The event loop's part of one fetch. Called by threads; returns at once."""

    def begin(self, source: "SwarmSource") -> None:
        """A try begins: others may read what comes, and who has what is found out. Idempotent."""
        ...

    def claim(self, source: "SwarmSource", asked: Asked) -> None:
        """Asks for spans to read from the cloud; `SwarmSource.answered` is called in the end, whatever happens."""
        ...

    def end_claims(self, source: "SwarmSource", *, done: Sequence[Span] = (), given_up: Sequence[Span] = ()) -> None:
        """Tells spans that are here, and spans that somebody else is to read."""
        ...

    def end(self, source: "SwarmSource", *, is_whole: bool) -> None:
        """The fetch has ended. Idempotent."""
        ...


class SwarmSource:
    """One fetch of a blob; a `RangeSource` and the `Guide` of its transfer. Thread-safe."""

    def __init__(
        self,
        digest: Digest,
        index: ChunkIndex,
        store: RangeSource,
        coordinator: Coordinator,
        *,
        open_peer: Callable[[str, Digest], RangeSource],
        parallel: int,
        is_local: Callable[[Span], bool] = lambda _: False,
    ) -> None:
        """Takes the blob with its chunks, where the cloud has it, and what opens a peer's blob.

        Args:
            digest: The blob.
            index: Its chunks.
            store: The blob in the cloud.
            coordinator: Who knows the others.
            open_peer: Opens the blob at a peer's address.
            parallel: Reads at a time.
            is_local: Whether all of a span is copied from this node, and needs nobody.
        """
        self.digest = digest
        self.target: Path | None = None
        self._index = index
        self._coordinator = coordinator
        self._open_peer = open_peer
        self._is_local = is_local
        self._lock = threading.Lock()
        self._store = VerifiedSource(store, index)
        self._peers: dict[str, VerifiedSource] = {}
        self._read_bytes: Counter[str] = Counter()
        self._wake: Callable[[], None] = _nobody
        salt = random.getrandbits(32)  # not for secrets
        self._policy = SwarmPolicy(parallel=parallel, salt=salt, now=time.monotonic())

    def describe(self) -> SourceState:
        """Asks nobody: the index knows the size, and needs no ETag."""
        return SourceState(self._index.size_bytes)

    def begin(self, target: Path, wake: Callable[[], None]) -> None:
        """A try begins; see `Guide`."""
        self.target, self._wake = target, wake
        self._coordinator.begin(self)

    def choose(self, chunks: Sequence[Chunk]) -> int | None:
        """Which chunk next; see `Guide`."""
        spans = [_span(chunk) for chunk in chunks]
        if (local := next((place for place, span in enumerate(spans) if self._is_local(span)), None)) is not None:
            return local
        now = time.monotonic()
        with self._lock:
            old = self._policy.take_old_claims(now)
            choice = self._policy.choose(spans, now)
            asked = self._policy.take_asked()
        if old:
            self._coordinator.end_claims(self, given_up=old)
        if asked is not None:
            self._coordinator.claim(self, asked)
        return choice[0] if choice is not None else None

    def written(self, chunk: Chunk) -> None:
        """A chunk is here, verified; see `Guide`."""
        with self._lock:
            self._policy.succeeded(chunk.offset, time.monotonic())
        self._coordinator.end_claims(self, done=[_span(chunk)])

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        """Reads from the source that was chosen for the chunk with this offset."""
        with self._lock:
            choice = self._policy.source_of(offset)
        # A chunk that was to be copied from this node and could not be, was chosen for nobody: the cloud has it.
        address = choice[1] if choice is not None else STORE
        try:
            self._source(address).read(state, offset, length, sink)
        except Interrupted as interrupted:
            cause = interrupted.__cause__
            # The engine ends reads that stall, or are too long; anything else is not the source's doing.
            self._failed(choice, cause if isinstance(cause, SourceFault) else None)
            raise
        except HeliosError as error:
            self._failed(choice, error)
            if isinstance(error, ChunkMismatch | Unavailable) and (address == STORE or not error.retry_after_seconds):
                raise
            with self._lock:
                is_alone = address == STORE and self._policy.is_alone()
            if is_alone:
                raise
            # Another source may have what this one refuses, for good or for a time. A peer that asks for patience rests
            # alone: the engine would have all sources rest.
            message = f"{address or 'store'}: {error.message}"
            raise Unavailable(message, reason="SOURCE_UNAVAILABLE") from error
        with self._lock:
            self._read_bytes[address] += length

    def close(self) -> None:
        """Ends reads; what comes from here goes on being served until `ended`."""
        with self._lock:
            sources = [self._store, *self._peers.values()]
            self._peers.clear()
        for source in sources:
            source.close()

    def ended(self, *, is_whole: bool) -> None:
        """The fetch has ended, and the blob has its name, or is not here."""
        self._coordinator.end(self, is_whole=is_whole)

    def peer_bytes(self) -> int:
        """Bytes that came from peers."""
        with self._lock:
            return sum(count for address, count in self._read_bytes.items() if address != STORE)

    def meet(self, peers: Sequence[tuple[str, str, bool]], *, is_all: bool) -> list[str]:
        """Takes who holds the blob, all of them or some more; returns the addresses that are new."""
        now = time.monotonic()
        with self._lock:
            new = self._policy.meet(peers, now) if is_all else self._policy.meet_more(peers, now)
        self._wake()
        return new

    def has(self, address: str, spans: Sequence[Span], *, is_whole: bool) -> None:
        """A peer says what it has."""
        with self._lock:
            self._policy.has(address, spans, is_whole=is_whole)
        self._wake()

    def unreached(self, address: str) -> None:
        """A peer did not say what it has."""
        with self._lock:
            self._policy.unreached(address, time.monotonic())
        self._wake()

    def answered(self, granted: Sequence[Span]) -> None:
        """The answer to a claim."""
        with self._lock:
            self._policy.answered(granted, time.monotonic())
        if granted:
            self._wake()

    def _source(self, address: str) -> VerifiedSource:
        if address == STORE:
            return self._store
        with self._lock:
            if address not in self._peers:
                self._peers[address] = VerifiedSource(self._open_peer(address, self.digest), self._index)
            return self._peers[address]

    def _failed(self, choice: tuple[Span, str] | None, error: HeliosError | None) -> None:
        if choice is None:
            return
        (start, _), address = choice
        is_dropped = isinstance(error, ChunkMismatch | SourceFault)
        with self._lock:
            if error is None:
                self._policy.ended(start)
                return
            claimed = self._policy.failed(
                start,
                time.monotonic(),
                is_dropped=is_dropped,
                has_nothing=isinstance(error, BlobNotFound),
                rest_seconds=error.retry_after_seconds or 0.0,
            )
        if claimed is not None:
            self._coordinator.end_claims(self, given_up=[claimed])
        elif is_dropped:
            log.warning("a peer sent wrong bytes, or none, and is dropped", peer=address, reason=error.reason)
        else:
            log.info("a peer can't be read from", peer=address, reason=error.reason, error=error.message)


def _span(chunk: Chunk) -> Span:
    return chunk.offset, chunk.offset + chunk.length


def _nobody() -> None:
    """Nobody waits yet."""
