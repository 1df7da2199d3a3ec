"""Artifacts in SQL, beside the models. Each method is one transaction. Time is passed in."""

from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import NotFound, RevisionNotFound
from helios.registry.artifacts import MAX_COUNT, Artifact, NewArtifact, Use, plan_eviction
from helios.registry.blob_rows import batches, delete_unused_blobs
from helios.registry.database import Database, upsert
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.moments import from_us, to_us
from helios.registry.tables import artifact_entries, artifacts, blobs, revisions


class ArtifactStore:
    """The tables of artifacts as operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, kind: str, key: str) -> Artifact | None:
        """Returns an artifact, None where there is none."""
        async with self._database.snapshot() as connection:
            return await _find(connection, kind, key)

    async def get(self, kind: str, key: str) -> Artifact:
        """Returns an artifact. Raises NotFound (ARTIFACT_NOT_FOUND)."""
        found = await self.find(kind, key)
        if found is None:
            raise NotFound(f"there is no {kind} {key}", reason="ARTIFACT_NOT_FOUND", metadata={"key": key})
        return found

    async def note_use(self, kind: str, key: str, *, used_at: datetime, unless_since: datetime) -> None:
        """Notes when an artifact was used, unless it was since then; one that is gone has no use."""
        is_old = artifacts.c.used_at_us < to_us(unless_since)
        async with self._database.transaction() as connection:
            await connection.execute(
                update(artifacts).where(_is_named(kind, key) & is_old).values(used_at_us=to_us(used_at))
            )

    async def list_page(self, *, revision: str, after: tuple[str, str], limit: int) -> list[Artifact]:
        """Returns artifacts by kind and key, from the first after ``after``; empty ``revision``: of all revisions."""
        query = (
            select(artifacts)
            .where(tuple_(artifacts.c.kind, artifacts.c.key) > after)
            .order_by(artifacts.c.kind, artifacts.c.key)
            .limit(limit)
        )
        if revision:
            query = query.where(artifacts.c.revision == revision)
        async with self._database.snapshot() as connection:
            return [_artifact(row) for row in await connection.execute(query)]

    async def put(
        self, new: NewArtifact, now: datetime, *, quota_bytes: int
    ) -> tuple[tuple[Artifact, bool], dict[str, int]]:
        """Stores an artifact whose blobs are on disk; the first of a name stays. Others go where the quota is full.

        Returns:
            The one that has the name now, and whether it is this one; hash and size of the blobs that nothing refers to
            since.

        Raises:
            RevisionNotFound: The revision that it was made of is not there, or not any more.
        """
        async with self._database.transaction() as connection:
            found = await _find(connection, new.kind, new.key)
            if found is not None:
                return (found, False), {}
            is_known = select(func.count()).select_from(revisions).where(revisions.c.digest == new.revision)
            if not (await connection.execute(is_known)).scalar_one():
                raise RevisionNotFound(f"there is no revision {new.revision}", metadata={"revision": new.revision})
            suspects = await _make_room(connection, new.manifest.size_bytes, quota_bytes)
            await _insert(connection, new, now)
            # After the new rows, which may share blobs with those that went.
            gone = await delete_unused_blobs(connection, suspects)
            stored = await _find(connection, new.kind, new.key)
            assert stored is not None
            return (stored, True), gone

    async def delete(self, kind: str, key: str, *, digest: str = "") -> dict[str, int]:
        """Removes an artifact, where it has this digest if one is given. Idempotent.

        Returns:
            Hash and size of the blobs that nothing refers to since.
        """
        condition = _is_named(kind, key)
        if digest:
            condition &= artifacts.c.digest == digest
        async with self._database.transaction() as connection:
            suspects = await _blobs_of(connection, kind, key)
            await connection.execute(delete(artifacts).where(condition))
            return await delete_unused_blobs(connection, suspects)

    async def find_manifest(self, digest: str) -> Manifest | None:
        """Returns the manifest of an artifact with this digest, None where there is none."""
        async with self._database.snapshot() as connection:
            named = select(artifacts.c.kind, artifacts.c.key).where(artifacts.c.digest == digest).limit(1)
            row = (await connection.execute(named)).one_or_none()
            if row is None:
                return None
            query = (
                select(artifact_entries.c.path, artifact_entries.c.media_type, blobs.c.hash, blobs.c.size_bytes)
                .join(blobs, blobs.c.hash == artifact_entries.c.blob)
                .where(artifact_entries.c.kind == row.kind, artifact_entries.c.key == row.key)
            )
            return Manifest.of(
                Entry(entry.path, Digest(entry.hash, entry.size_bytes), entry.media_type)
                for entry in await connection.execute(query)
            )

    async def used_bytes(self) -> int:
        """Returns what all artifacts take."""
        async with self._database.snapshot() as connection:
            query = select(func.coalesce(func.sum(artifacts.c.size_bytes), 0))
            return int((await connection.execute(query)).scalar_one())


async def _find(connection: AsyncConnection, kind: str, key: str) -> Artifact | None:
    row = (await connection.execute(select(artifacts).where(_is_named(kind, key)))).one_or_none()
    return None if row is None else _artifact(row)


async def _blobs_of(connection: AsyncConnection, kind: str, key: str) -> list[str]:
    query = select(artifact_entries.c.blob).where(artifact_entries.c.kind == kind, artifact_entries.c.key == key)
    return list((await connection.execute(query)).scalars())


async def _make_room(connection: AsyncConnection, needed_bytes: int, quota_bytes: int) -> set[str]:
    """Removes artifacts until there is room; returns the blobs that they had."""
    suspects: set[str] = set()
    rows = await connection.execute(
        select(artifacts.c.kind, artifacts.c.key, artifacts.c.size_bytes, artifacts.c.used_at_us)
    )
    uses = [Use(row.kind, row.key, row.size_bytes, from_us(row.used_at_us)) for row in rows]
    for kind, key in plan_eviction(uses, needed_bytes=needed_bytes, quota_bytes=quota_bytes, max_count=MAX_COUNT):
        suspects.update(await _blobs_of(connection, kind, key))
        await connection.execute(delete(artifacts).where(_is_named(kind, key)))
    return suspects


async def _insert(connection: AsyncConnection, new: NewArtifact, now: datetime) -> None:
    unique = {entry.digest.hash: entry.digest.size_bytes for entry in new.manifest.entries}
    for batch in batches([{"hash": value, "size_bytes": size} for value, size in unique.items()]):
        await connection.execute(
            upsert(connection, blobs).values(batch).on_conflict_do_nothing(index_elements=["hash"])
        )
    row = {
        "kind": new.kind,
        "key": new.key,
        "inputs": new.inputs,
        "revision": new.revision,
        "digest": new.manifest.digest(),
        "size_bytes": new.manifest.size_bytes,
        "producer": new.producer,
        "created_at_us": to_us(now),
        "used_at_us": to_us(now),
    }
    await connection.execute(insert(artifacts).values(row))
    files: list[dict[str, object]] = [
        {
            "kind": new.kind,
            "key": new.key,
            "path": entry.path,
            "blob": entry.digest.hash,
            "media_type": entry.media_type,
        }
        for entry in new.manifest.entries
    ]
    for batch in batches(files):
        await connection.execute(insert(artifact_entries).values(batch))


def _is_named(kind: str, key: str) -> Any:
    return (artifacts.c.kind == kind) & (artifacts.c.key == key)


def _artifact(row: Any) -> Artifact:
    return Artifact(
        kind=row.kind,
        key=row.key,
        inputs=row.inputs,
        revision=row.revision,
        digest=row.digest,
        size_bytes=row.size_bytes,
        producer=row.producer,
        created_at=from_us(row.created_at_us),
        used_at=from_us(row.used_at_us),
    )
