"""What the database says of blobs: a row is there as long as a revision or an artifact refers to its blob.

There may be millions, so nobody reads them all at once: who deletes looks only at what the deleted referred to, garbage
collection reads them by the beginning of their hashes, and an ingest asks for those of its files' sizes.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from sqlalchemy import delete, exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.registry.database import Database
from helios.registry.tables import artifact_entries, artifacts, blobs, entries, identity, model_revisions, revisions

T = TypeVar("T")

# SQLite takes 32,766 variables in a statement; several columns share one statement. As rows, 1 ms of the event loop.
BATCH: Final = 1_000


class BlobRows:
    """The rows of blobs, for reading."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def owner(self) -> str:
        """Returns the name of the database, by which blob stores know it."""
        async with self._database.snapshot() as connection:
            name: str = (await connection.execute(select(identity.c.database_id))).scalar_one()
            return name

    async def count(self) -> int:
        """Returns how many blobs something refers to."""
        async with self._database.snapshot() as connection:
            return (await connection.execute(select(func.count()).select_from(blobs))).scalar_one()

    async def read(self, prefix: str = "") -> dict[str, int]:
        """Returns hash and size of every blob that something refers to and whose hash begins so."""
        found: dict[str, int] = {}
        # "g" sorts after every hexadecimal digit.
        query = select(blobs.c.hash, blobs.c.size_bytes).where(blobs.c.hash < prefix + "g").order_by(blobs.c.hash)
        after, is_more = prefix, True
        async with self._database.snapshot() as connection:
            while is_more:
                rows = (await connection.execute(query.where(blobs.c.hash > after).limit(BATCH))).all()
                found.update((row.hash, row.size_bytes) for row in rows)
                is_more = len(rows) == BATCH
                after = rows[-1].hash if rows else after
        return found

    async def referenced(self, hashes: Collection[str]) -> frozenset[str]:
        """Returns those of the blobs that something refers to."""
        found: set[str] = set()
        async with self._database.snapshot() as connection:
            for batch in batches(hashes):
                rows = await connection.execute(select(blobs.c.hash).where(blobs.c.hash.in_(batch)))
                found.update(rows.scalars())
        return frozenset(found)

    async def of_size(self, size_bytes: int, limit: int) -> Sequence[str]:
        """Returns the hashes of some blobs of a size."""
        query = select(blobs.c.hash).where(blobs.c.size_bytes == size_bytes).limit(limit)
        async with self._database.snapshot() as connection:
            return (await connection.execute(query)).scalars().all()

    async def sizes_among(self, sizes: Collection[int]) -> frozenset[int]:
        """Returns those of the sizes that some blob has."""
        found: set[int] = set()
        async with self._database.snapshot() as connection:
            for batch in batches(set(sizes)):
                query = select(blobs.c.size_bytes).where(blobs.c.size_bytes.in_(batch)).distinct()
                found.update((await connection.execute(query)).scalars())
        return frozenset(found)


async def delete_unused_revisions(connection: AsyncConnection, candidates: Collection[str]) -> dict[str, int]:
    """Removes those of the revisions that no model has, with their artifacts.

    Returns:
        Hash and size of the blobs whose rows went, since nothing else refers to them.
    """
    used: set[str] = set()
    for batch in batches(candidates):
        query = select(model_revisions.c.revision).where(model_revisions.c.revision.in_(batch))
        used.update((await connection.execute(query)).scalars())
    suspects: set[str] = set()
    for batch in batches(set(candidates) - used):
        theirs = select(entries.c.blob).where(entries.c.revision.in_(batch))
        suspects.update((await connection.execute(theirs)).scalars())
        is_part = (artifact_entries.c.kind == artifacts.c.kind) & (artifact_entries.c.key == artifacts.c.key)
        made = select(artifact_entries.c.blob).join(artifacts, is_part).where(artifacts.c.revision.in_(batch))
        suspects.update((await connection.execute(made)).scalars())
        await connection.execute(delete(revisions).where(revisions.c.digest.in_(batch)))
    return await delete_unused_blobs(connection, suspects)


async def delete_unused_blobs(connection: AsyncConnection, candidates: Collection[str]) -> dict[str, int]:
    """Removes the rows of those of the blobs that nothing refers to any more; returns their hashes and sizes."""
    gone: dict[str, int] = {}
    is_used = exists().where(entries.c.blob == blobs.c.hash) | exists().where(artifact_entries.c.blob == blobs.c.hash)
    for batch in batches(candidates):
        statement = delete(blobs).where(blobs.c.hash.in_(batch), ~is_used).returning(blobs.c.hash, blobs.c.size_bytes)
        gone.update((row.hash, row.size_bytes) for row in await connection.execute(statement))
    return gone


def batches(values: Iterable[T]) -> Iterator[list[T]]:
    """Returns values in portions that one statement takes."""
    all_of_them = list(values)
    return (all_of_them[start : start + BATCH] for start in range(0, len(all_of_them), BATCH))
