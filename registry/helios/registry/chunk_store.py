"""Chunk indexes in SQL: one row a blob, packed, because an index is read whole and never searched."""

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select

from helios.mesh.errors import NotFound
from helios.registry import offload
from helios.registry.database import Database, upsert
from helios.registry.tables import blobs, chunk_indexes

BLAKE3_BYTES: Final = 32
# Indexes in memory at once: of large blobs some hundred kilobytes each.
_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """The chunks of a blob in order: their lengths, and the BLAKE3 of each."""

    lengths: tuple[int, ...]
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ChunkCopy:
    """A chunk (by its place in an index) that another blob has at an offset."""

    index: int
    blob: str
    offset: int


class ChunkStore:
    """The registry's chunk indexes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, blob: str) -> ChunkIndex:
        """Returns the index of a blob. Raises NotFound (CHUNK_INDEX_NOT_FOUND)."""
        found = await self._load([blob])
        if blob not in found:
            raise NotFound(
                "the blob has no chunk index, or none yet", reason="CHUNK_INDEX_NOT_FOUND", metadata={"blob": blob}
            )
        return found[blob]

    async def find_copies(self, index: ChunkIndex, among: Sequence[str]) -> list[ChunkCopy]:
        """Returns where chunks of an index are in other blobs, one place for each that is found."""
        wanted: dict[tuple[bytes, int], list[int]] = {}
        for number, key in enumerate(zip(index.hashes, index.lengths, strict=True)):
            wanted.setdefault(key, []).append(number)
        copies: list[ChunkCopy] = []
        for start in range(0, len(among), _BATCH):
            others = await self._load(among[start : start + _BATCH])
            copies += await offload.run(lambda _, others=others: _take_copies(wanted, others))  # type: ignore[misc]
        return sorted(copies, key=lambda copy: copy.index)

    async def put(self, blob: str, index: ChunkIndex) -> None:
        """Stores an index. Raises Conflict: the blob is gone."""
        row = {
            "lengths": struct.pack(f">{len(index.lengths)}I", *index.lengths),
            "blake3": b"".join(index.hashes),
        }
        async with self._database.transaction() as connection:
            statement = upsert(connection, chunk_indexes).values(blob=blob, **row)
            await connection.execute(statement.on_conflict_do_update(index_elements=["blob"], set_=row))

    async def missing(self, min_bytes: int, limit: int) -> list[tuple[str, int]]:
        """Returns blobs without an index that are at least so large: hash and size, by hash."""
        query = (
            select(blobs.c.hash, blobs.c.size_bytes)
            .outerjoin(chunk_indexes, chunk_indexes.c.blob == blobs.c.hash)
            .where(chunk_indexes.c.blob.is_(None), blobs.c.size_bytes >= min_bytes)
            .order_by(blobs.c.hash)
            .limit(limit)
        )
        async with self._database.snapshot() as connection:
            return [(row.hash, row.size_bytes) for row in await connection.execute(query)]

    async def _load(self, hashes: Collection[str]) -> dict[str, ChunkIndex]:
        query = select(chunk_indexes).where(chunk_indexes.c.blob.in_(hashes))
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(query)).all()
        return await offload.run(lambda _: {row.blob: _unpack(row.lengths, row.blake3) for row in rows})


def _take_copies(wanted: dict[tuple[bytes, int], list[int]], others: Mapping[str, ChunkIndex]) -> list[ChunkCopy]:
    """Returns where wanted chunks are in other blobs, and takes those out that were found."""
    copies: list[ChunkCopy] = []
    for blob, other in others.items():
        offset = 0
        for key in zip(other.hashes, other.lengths, strict=True):
            copies += [ChunkCopy(number, blob, offset) for number in wanted.pop(key, ())]
            offset += key[1]
    return copies


def _unpack(lengths: bytes, hashes: bytes) -> ChunkIndex:
    starts = range(0, len(hashes), BLAKE3_BYTES)
    return ChunkIndex(
        struct.unpack(f">{len(lengths) // 4}I", lengths), tuple(hashes[at : at + BLAKE3_BYTES] for at in starts)
    )
