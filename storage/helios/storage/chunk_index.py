"""What every part of a blob should be: chunks with their BLAKE3, as the registry computed them. Pure.

With an index a chunk is worth something before the whole blob is there: it may come from a peer that nobody trusts, or
be copied from another blob of this node. The blob's sha256 stays its identity, and is checked in the end all the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from helios.mesh.errors import InvalidRequest

BLAKE3_BYTES = 32
MAX_CHUNK_BYTES = 16 << 20
"""Chunks are read into memory where they are copied; the registry makes them of 4 MiB."""


@dataclass(frozen=True, slots=True)
class IndexedChunk:
    """A range of a blob, and the BLAKE3 of its bytes."""

    offset: int
    length: int
    blake3: bytes


class ChunkIndex:
    """The chunks of one blob: contiguous, and all of it."""

    def __init__(self, size_bytes: int, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Takes the length and the BLAKE3 of each chunk, in order.

        Raises:
            InvalidRequest: INVALID_CHUNK_INDEX, when they are not those of a blob of this size.
        """
        listed = tuple(chunks)
        ends = list(accumulate((length for length, _ in listed), initial=0))
        is_sound = all(0 < length <= MAX_CHUNK_BYTES and len(hash_) == BLAKE3_BYTES for length, hash_ in listed)
        if not is_sound or ends[-1] != size_bytes:
            raise InvalidRequest(
                "the chunks are not those of this blob",
                reason="INVALID_CHUNK_INDEX",
                metadata={"size_bytes": str(size_bytes), "chunk_bytes": str(ends[-1])},
            )
        self.size_bytes = size_bytes
        self.chunks = tuple(
            IndexedChunk(offset, length, hash_) for offset, (length, hash_) in zip(ends, listed, strict=False)
        )
        self._by_offset = {chunk.offset: index for index, chunk in enumerate(self.chunks)}

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the chunks, in order."""
        return tuple(chunk.length for chunk in self.chunks)

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """The BLAKE3 of the chunks, in order."""
        return tuple(chunk.blake3 for chunk in self.chunks)

    def within(self, offset: int, length: int) -> Iterator[IndexedChunk]:
        """The chunks of a range that begins and ends where chunks do."""
        index = self._by_offset[offset]
        end = offset + length
        while offset < end:
            chunk = self.chunks[index]
            yield chunk
            offset, index = chunk.offset + chunk.length, index + 1
        assert offset == end, "a range holds whole chunks"
