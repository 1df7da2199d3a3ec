"""The one way to change the registry: store, blobs and watchers move together.

Writes of this process are ordered by one lock, those of several registries on one database by the database. After each
write, and whenever another registry may have written (``follow``), the changes that watchers have not been told of are
read from the database by their numbers and told in that order; a watch's snapshot is taken under the same lock. So
every watcher sees a snapshot, or what changed since it was last here, and then the changes after it.

Rows go before files: a crash in between leaves unreferenced files, which the next collection removes.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from helios.mesh.errors import Corrupted, PreconditionFailed, Unavailable
from helios.registry import metrics, offload
from helios.registry.artifact_store import ArtifactStore
from helios.registry.blobs import Blobs
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import PLAIN, Mutation
from helios.registry.policy import ModelPolicy
from helios.registry.records import (
    BlobLocation,
    LocatedManifest,
    Model,
    Revision,
    WatchEvent,
)
from helios.registry.store import NewRevision, Store
from helios.registry.watch import WatchHub

log = structlog.get_logger()

T = TypeVar("T")


class Catalog:
    """Models with their blobs and watchers. ``store`` is for reading; every write goes through a method here."""

    def __init__(self, store: Store, blobs: Blobs, hub: WatchHub, artifacts: ArtifactStore) -> None:
        self.store = store
        self._artifacts = artifacts
        self.blobs = blobs
        self.hub = hub
        self._writing = asyncio.Lock()
        self._told: int | None = None

    async def put_model(
        self, name: str, aliases: Collection[str], revision: NewRevision, mutation: Mutation = PLAIN
    ) -> Model:
        """Gives a model a revision, whose blobs the caller holds. Raises as ``Store.put_model``."""
        return await self.write(lambda: self.store.put_model(name, aliases, revision, datetime.now(UTC), mutation))

    async def delete_model(self, name: str, mutation: Mutation = PLAIN, *, is_forced: bool = False) -> int:
        """Removes a model and what only it used; returns the bytes of blobs that were freed. Raises as the store."""

        async def write() -> tuple[None, Mapping[str, int]]:
            return None, await self.store.delete_model(name, datetime.now(UTC), mutation, is_forced=is_forced)

        _, freed_bytes = await self.write_and_collect(write, is_dry_run=mutation.is_dry_run)
        return freed_bytes

    async def discard(self, hashes: Collection[str]) -> None:
        """Deletes those of the blobs that nothing refers to; what a failed ingest or upload calls."""
        await offload.uninterrupted(self._collect(dict.fromkeys(hashes, 0)))

    async def put_alias(self, alias: str, name: str, mutation: Mutation = PLAIN) -> Model:
        """Points an alias at a model. Raises as ``Store.put_alias``."""
        return await self.write(lambda: self.store.put_alias(alias, name, datetime.now(UTC), mutation))

    async def delete_alias(self, alias: str, mutation: Mutation = PLAIN) -> None:
        """Removes an alias. Raises NotFound."""
        await self.write(lambda: self.store.delete_alias(alias, datetime.now(UTC), mutation))

    async def update_policy(self, name: str, policy: ModelPolicy, mutation: Mutation = PLAIN) -> Model:
        """Sets a model's policy. Raises ModelNotFound, InvalidRequest, Conflict."""
        policy.check()
        return await self.write(lambda: self.store.update_policy(name, policy, datetime.now(UTC), mutation))

    async def update_engine_settings(self, name: str, settings: EngineSettings, mutation: Mutation = PLAIN) -> Model:
        """Sets how a model's engine is set. Raises as ``Store.update_engine_settings``."""
        settings.check()
        return await self.write(lambda: self.store.update_engine_settings(name, settings, datetime.now(UTC), mutation))

    async def locate(self, digest: str) -> LocatedManifest:
        """Returns a revision's manifest, or an artifact's by its digest, and where its blobs are.

        Raises:
            RevisionNotFound: No such revision or artifact.
            Corrupted: BLOB_MISSING, a blob is gone from the disk or has another size.
        """
        revision: Revision | None = None
        artifact = await self._artifacts.find_manifest(digest)
        if artifact is None:
            manifest, revision = await self.store.get_manifest(digest)
        else:
            manifest = artifact
        # A bucket would be asked for each blob, at every start of a replica; the collector looks at all of them.
        digests = [entry.digest for entry in manifest.entries]
        missing = await self.blobs.missing(digests) if self.blobs.is_local else []
        if missing:
            raise Corrupted(
                f"blob {missing[0]} of {digest} is not in the blob store any more; ingest the model again",
                reason="BLOB_MISSING",
                metadata={"blob": str(missing[0]), "revision": digest},
            )
        store = self.blobs.store
        return LocatedManifest(manifest, (BlobLocation(store.url, store.options),), revision)

    async def watch(self, after: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Yields all models, or what changed after a version if that is known, then every change.

        Raises:
            Unavailable: The watcher is too slow, or the registry stops.
        """
        with ExitStack() as stack:
            async with self._writing:
                await self._tell()
                since = await self.store.changes_since(after) if after is not None else None
                first = since if since is not None else [await self.store.snapshot()]
                watcher = stack.enter_context(self.hub.subscribe())
            for event in first:
                yield event
            async with aclosing(watcher.changes()) as changes:
                async for change in changes:
                    yield change

    async def follow(self, poll_seconds: float) -> None:
        """Tells watchers of what other registries change, for ever. Raises what the database raises.

        Asking rather than LISTEN: that takes a connection for good, whose end has to be noticed and made up for, and
        asking for one row costs next to nothing.
        """
        while True:
            await asyncio.sleep(poll_seconds)
            if await self.store.changes.version() != self._told:
                async with self._writing:
                    await self._tell()

    async def write(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a write alone and to its end: one that was committed is told even if its caller went away."""

        async def alone() -> T:
            result = await work()
            await self._tell()
            return result

        async with self._writing:
            await self._begin()
            return await offload.uninterrupted(alone())

    async def write_and_collect(
        self, work: Callable[[], Coroutine[Any, Any, tuple[T, Mapping[str, int]]]], *, is_dry_run: bool = False
    ) -> tuple[T, int]:
        """Runs a write, as ``write`` does, then deletes the blobs that it says nothing refers to since.

        Returns:
            The write's result, and the bytes of the blobs that are gone, or would be.
        """

        async def both() -> tuple[T, int]:
            async with self._writing:
                await self._begin()
                result, gone = await work()
                await self._tell()
            return result, sum(gone.values()) if is_dry_run else await self._collect(gone)

        return await offload.uninterrupted(both())

    async def _begin(self) -> None:
        """Notes up to where watchers know the registry, before the first change."""
        if self._told is None:
            self._told = await self.store.changes.version()

    async def _tell(self) -> None:
        """Tells watchers what changed since they were told last; only under the lock."""
        await self._begin()
        assert self._told is not None
        changes = await self.store.changes_since(self._told)
        if changes is None:
            # Another registry has changed more, while this one was away, than is kept.
            self._told = await self.store.changes.version()
            self.hub.restart()
        elif changes:
            for change in changes:
                self.hub.publish(change)
            self._told = changes[-1].version
            metrics.MODELS.set(await self.store.count_models())
        self.hub.announce()

    async def _collect(self, candidates: Mapping[str, int]) -> int:
        """Deletes those of the blobs (by hash, with their sizes) that no row refers to; returns the bytes.

        The rows are gone already, so a store that fails now fails nobody: the collector finds what is left. Of a store
        that other registries have too it finds all, later: one of them may be ingesting what this one has let go.
        """
        if self.blobs.is_shared:
            return 0
        try:
            # Not to keep others from blobs that stay.
            free = candidates.keys() - await self.store.blobs.referenced(candidates.keys())
            gone = await self.blobs.collect(free, self.store.blobs.referenced)
        except (Unavailable, PreconditionFailed, OSError) as error:
            log.warning("blobs are left for the next collection", count=len(candidates), error=str(error))
            return 0
        return sum(candidates[value] for value in gone)
