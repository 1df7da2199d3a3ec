"""The one way to change the registry: store, blobs and watchers move together.

Writes are ordered by one lock (SQLite has one writer anyway); a change is published before the next write begins, and a
watch's snapshot is taken under the same lock, so every watcher sees a snapshot and then exactly the changes after it.
Rows go before files: a crash in between leaves unreferenced files, which the next start removes.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from typing import Any, TypeVar

from helios.mesh.errors import Corrupted
from helios.registry import metrics, offload
from helios.registry.artifact_store import ArtifactStore
from helios.registry.blobs import BlobStore
from helios.registry.engine_settings import EngineSettings
from helios.registry.records import (
    LocatedManifest,
    Model,
    ModelDeleted,
    ModelPolicy,
    ModelSnapshot,
    ModelUpserted,
    Revision,
    WatchEvent,
)
from helios.registry.store import NewRevision, Store
from helios.registry.watch import WatchHub

T = TypeVar("T")


class Catalog:
    """Models with their blobs and watchers. ``store`` is for reading; every write goes through a method here."""

    def __init__(self, store: Store, blobs: BlobStore, hub: WatchHub, artifacts: ArtifactStore) -> None:
        self.store = store
        self._artifacts = artifacts
        self.blobs = blobs
        self._hub = hub
        self._writing = asyncio.Lock()

    async def put_model(self, name: str, aliases: Collection[str], revision: NewRevision) -> Model:
        """Makes a revision, whose blobs the caller holds, the served one of a model. Raises as ``Store.put_model``."""

        async def write() -> Model:
            model = await self.store.put_model(name, aliases, revision, datetime.now(UTC))
            self._hub.publish(ModelUpserted(model))
            metrics.MODELS.set(await self.store.count_models())
            return model

        return await self.write(write)

    async def delete_model(self, name: str) -> int:
        """Removes a model and what only it used; returns the bytes of blobs that were freed. Raises ModelNotFound."""

        async def write() -> int:
            before = await self.store.referenced_blobs()
            await self.store.delete_model(name)
            self._hub.publish(ModelDeleted(name))
            metrics.MODELS.set(await self.store.count_models())
            return await self.collect(before)

        return await self.write(write)

    async def discard(self, hashes: Collection[str]) -> int:
        """Deletes those of the blobs that nothing refers to; what a failed ingest or upload calls."""
        return await self.write(lambda: self.collect(hashes))

    async def put_alias(self, alias: str, name: str) -> Model:
        """Points an alias at a model. Raises as ``Store.put_alias``."""

        async def write() -> Model:
            model, before = await self.store.put_alias(alias, name)
            if before is not None and before != name:
                self._hub.publish(ModelUpserted(await self.store.get_model(before)))
            if before != name:
                self._hub.publish(ModelUpserted(model))
            return model

        return await self.write(write)

    async def delete_alias(self, alias: str) -> None:
        """Removes an alias. Raises NotFound."""

        async def write() -> None:
            self._hub.publish(ModelUpserted(await self.store.delete_alias(alias)))

        await self.write(write)

    async def update_policy(self, name: str, policy: ModelPolicy) -> Model:
        """Sets a model's policy. Raises ModelNotFound, InvalidRequest."""
        policy.check()

        async def write() -> Model:
            model = await self.store.update_policy(name, policy)
            self._hub.publish(ModelUpserted(model))
            return model

        return await self.write(write)

    async def update_engine_settings(self, name: str, settings: EngineSettings) -> Model:
        """Sets how a model's engine is set. Raises ModelNotFound, InvalidRequest (INVALID_ENGINE_SETTINGS)."""
        settings.check()

        async def write() -> Model:
            model = await self.store.update_engine_settings(name, settings)
            self._hub.publish(ModelUpserted(model))
            return model

        return await self.write(write)

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
        missing = self.blobs.missing([entry.digest for entry in manifest.entries])
        if missing:
            raise Corrupted(
                f"blob {missing[0]} of {digest} is not in the blob store any more; ingest the model again",
                reason="BLOB_MISSING",
                metadata={"blob": str(missing[0]), "revision": digest},
            )
        return LocatedManifest(manifest, self.blobs.url, revision)

    async def watch(self) -> AsyncGenerator[WatchEvent, None]:
        """Yields all models, then every change. Raises Unavailable when the watcher is too slow, or at the end."""
        with ExitStack() as stack:
            async with self._writing:
                snapshot = ModelSnapshot(tuple(await self.store.list_models()))
                watcher = stack.enter_context(self._hub.subscribe())
            yield snapshot
            async with aclosing(watcher.changes()) as changes:
                async for change in changes:
                    yield change

    async def write(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a write alone and to its end: one that was committed is published even if its caller went away."""
        async with self._writing:
            return await offload.uninterrupted(work())

    async def collect(self, candidates: Collection[str]) -> int:
        """Deletes those of the blobs that no row refers to; only within ``write``. Returns the bytes."""
        async with self.blobs.collecting() as delete:
            referenced = await self.store.referenced_blobs()
            return await delete([value for value in candidates if value not in referenced])
