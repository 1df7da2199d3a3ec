"""What bytes come from: the port between the engine and its sources.

A source hands over pieces as they come in rather than filling a buffer of a whole chunk: what is hashed and written at
once needs no memory of its own, whatever the size of a chunk, and a source that drips is noticed between pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from helios.mesh.errors import DigestMismatch, Unavailable

Sink = Callable[[memoryview], None]
"""Takes the next piece. It may block for as long as a disk does; it raises `Interrupted` when no more is wanted."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """What a source says of its bytes; all reads of one transfer are of this state."""

    size_bytes: int
    etag: str = ""
    """Changes when the bytes do; empty where the source has none, which leaves noticing to the sha256."""
    is_ranged: bool = True
    """False: only the whole can be read, from its beginning."""


class RangeSource(Protocol):
    """One blob somewhere. Blocking; used by several threads at a time; never trusted."""

    def describe(self) -> SourceState:
        """Says what is there now.

        Raises:
            HeliosError: Unavailable (SOURCE_UNAVAILABLE; try again), or anything else: trying again is of no use.
        """
        ...

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        """Hands `length` bytes from `offset` on to the sink, in order, in pieces of at most a few MiB.

        A piece is the source's again when the sink returns. What the sink raises passes through untouched. An answer of
        another length need not be noticed here: the engine counts.

        Raises:
            SourceChanged: The bytes are no longer those of the state.
            HeliosError: As `describe`.
        """
        ...

    def close(self) -> None:
        """Lets go of connections, and ends reads that run as far as that is possible. A later call begins anew."""
        ...


class SourceChanged(Unavailable):
    """The source has other bytes than at the beginning; what was read must not be mixed with what would come."""

    default_reason = "SOURCE_CHANGED"


class SourceFault(Unavailable):
    """The source answered wrongly or too slowly: too few bytes, too many, or none for too long. Worth another try."""

    default_reason = "SOURCE_FAULT"


class ChunkMismatch(DigestMismatch):
    """A part of the blob is not what an index says. Worth another try: there may be other copies to read from."""

    default_reason = "CHUNK_MISMATCH"


class Interrupted(Exception):
    """Raised by a sink to end a read; `__cause__` says why. Not a HeliosError nor an OSError, so that no adapter takes
    it for one of its own.
    """


def source_unavailable(message: str, *, retry_after_seconds: float | None = None) -> Unavailable:
    """The error of a source that can't be read now."""
    return Unavailable(message, reason="SOURCE_UNAVAILABLE", retry_after_seconds=retry_after_seconds)
