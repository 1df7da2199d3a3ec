"""Sources that are checked chunk by chunk, and those that are on this node already."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import structlog
from blake3 import blake3

from helios.mesh.transfer.source import (
    ChunkMismatch,
    Interrupted,
    RangeSource,
    Sink,
    SourceChanged,
    SourceFault,
    SourceState,
)
from helios.storage.chunk_index import ChunkIndex, IndexedChunk
from helios.storage.reflink import Copy

log = structlog.get_logger()


class VerifiedSource:
    """A source whose every chunk is compared with an index; the bytes of one that is wrong are never believed.

    The sink gets them as they come; what counts is whether the read ends without an error. Ranges hold whole chunks.
    """

    def __init__(self, inner: RangeSource, index: ChunkIndex) -> None:
        self._inner = inner
        self._index = index
        self._lock = threading.Lock()
        self._inner_state: SourceState | None = None

    def describe(self) -> SourceState:
        """Asks nobody: the index knows the size, and needs no ETag."""
        return SourceState(self._index.size_bytes)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        """Reads and compares.

        Raises:
            ChunkMismatch: The source has other bytes.
            HeliosError: As the source.
        """
        verifier = _Verifier(self._index, offset, length, sink)
        inner_state = self._describe_inner()
        if inner_state.size_bytes != state.size_bytes:
            raise mismatch(offset)
        try:
            self._inner.read(inner_state, offset, length, verifier.take)
        except Interrupted as interrupted:
            if isinstance(interrupted.__cause__, ChunkMismatch):
                raise interrupted.__cause__ from None
            raise
        except SourceChanged:
            # Which of its states the bytes are of is no matter: the index says what they should be.
            with self._lock:
                self._inner_state = None
            raise mismatch(offset) from None
        if not verifier.is_complete:
            raise SourceFault("a source sent fewer bytes than were asked for", metadata={"offset": str(offset)})

    def close(self) -> None:
        self._inner.close()

    def _describe_inner(self) -> SourceState:
        with self._lock:
            if self._inner_state is None:
                self._inner_state = self._inner.describe()
            return self._inner_state


class LocalFirst:
    """Copies chunks that other blobs of this node hold, and reads the rest from another source.

    Attributes:
        copied_bytes: What was copied.
    """

    def __init__(self, inner: RangeSource, index: ChunkIndex, copies: Mapping[bytes, tuple[Path, int]]) -> None:
        """Takes where chunks may be found, by BLAKE3. A copy that is gone or wrong is read from the source."""
        self._inner = inner
        self._index = index
        self._copies = copies
        self._lock = threading.Lock()
        self.copied_bytes = 0
        self._copied: list[Copy] = []

    def describe(self) -> SourceState:
        return SourceState(self._index.size_bytes)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        start = end = offset
        for chunk in self._index.within(offset, length):
            content = self._copy(chunk)
            if content is not None:
                # Sinks take bytes in order: what lies before comes first.
                self._read_inner(state, start, end, sink)
                sink(memoryview(content))
                start = chunk.offset + chunk.length
                with self._lock:
                    self.copied_bytes += chunk.length
                    self._copied.append(Copy(chunk.offset, chunk.length, *self._copies[chunk.blake3]))
            end = chunk.offset + chunk.length
        self._read_inner(state, start, end, sink)

    def close(self) -> None:
        self._inner.close()
        if self.copied_bytes:
            log.info("chunks copied from blobs of this node", copied_bytes=self.copied_bytes)

    def copied(self) -> list[Copy]:
        """What was copied, and from where."""
        with self._lock:
            return list(self._copied)

    def _read_inner(self, state: SourceState, start: int, end: int, sink: Sink) -> None:
        if end > start:
            self._inner.read(state, start, end - start, sink)

    def _copy(self, chunk: IndexedChunk) -> bytes | None:
        where = self._copies.get(chunk.blake3)
        if where is None:
            return None
        path, offset = where
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # It was evicted meanwhile.
            return None
        try:
            content = os.pread(descriptor, chunk.length, offset)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return content if blake3(content).digest() == chunk.blake3 else None


class _Verifier:
    """Hashes what passes through it, chunk by chunk."""

    def __init__(self, index: ChunkIndex, offset: int, length: int, sink: Sink) -> None:
        self._chunks = index.within(offset, length)
        self._sink = sink
        self._hasher = blake3()
        self._chunk = next(self._chunks)
        self._left = self._chunk.length

    @property
    def is_complete(self) -> bool:
        """Whether all of the range came."""
        return self._left == 0 and next(self._chunks, None) is None

    def take(self, piece: memoryview) -> None:
        """A `Sink`. What goes beyond the range is passed on: counting is the engine's."""
        rest = piece
        while rest:
            if self._left == 0:
                self._begin_next()
                if self._left == 0:
                    break
            part = rest[: self._left]
            self._hasher.update(part)
            self._left -= len(part)
            rest = rest[len(part) :]
            if self._left == 0 and self._hasher.digest() != self._chunk.blake3:
                raise Interrupted from mismatch(self._chunk.offset)
        self._sink(piece)

    def _begin_next(self) -> None:
        chunk = next(self._chunks, None)
        if chunk is not None:
            self._chunk, self._left, self._hasher = chunk, chunk.length, blake3()


def mismatch(offset: int) -> ChunkMismatch:
    """The error of a source that has other bytes than it should."""
    return ChunkMismatch("a source has other bytes than the blob's chunks", metadata={"offset": str(offset)})
