"""The proxy's conversation with the registry: the watch that feeds the catalogue, and the few direct calls.

While the watch stands, the catalogue is in step with the registry. When it breaks, the catalogue stays as it is and is
marked out of step, so that an unknown name is asked for and not refused.
"""

import time
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from helios.mesh.calls import RESTART_SECONDS
from helios.mesh.errors import HeliosError, NotFound, Unavailable
from helios.mesh.tasks import retried
from helios.proxy.catalog.addressed import MAX_SPELLINGS, entries_of
from helios.proxy.catalogue import ModelEntry, is_by_digest
from helios.proxy.runtime import Runtime
from helios.registry.client import (
    Model,
    ModelDeleted,
    ModelSnapshot,
    ModelUpserted,
    RegistryClient,
    Revision,
    VersionClient,
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RegistryClients:
    """How the registry is asked: for the watch and policies, and for requests that wait, with a short timeout."""

    steady: RegistryClient
    quick: RegistryClient
    versions: VersionClient


class ModelSource(Protocol):
    """Where models come from, asked directly. Idempotent and cancel-safe."""

    async def find(self, name: str) -> ModelEntry:
        """The model of a name, alias or reference. Raises NotFound, or another HeliosError where that can't be told."""
        ...

    async def set_count(self, name: str, count: int) -> ModelEntry:
        """Sets how many replicas a model has at least; at most as many as before, or as many where that is less.

        Raises HeliosError.
        """
        ...


class CatalogueStore(Protocol):
    """Keeps the catalogue over restarts."""

    def mark_changed(self) -> None:
        """Says that the catalogue is to be written soon. Never blocks."""
        ...


class RegistrySession:
    """A ModelSource, and the feed of the catalogue."""

    def __init__(self, clients: RegistryClients, runtime: Runtime, store: CatalogueStore) -> None:
        self._clients = clients
        self._runtime = runtime
        self._store = store
        self._entries: dict[str, set[str]] = {}
        self._spelled: dict[str, dict[str, Revision]] = {}
        # Numbers of the last changes that the watch told, by model.
        self._versions: dict[str, int] = {}

    async def find(self, name: str) -> ModelEntry:
        """Asks the registry."""
        if "@" not in name:
            model = await self._clients.quick.get_model(name)
            return entries_of(model, self._spelled.get(model.name, {}))[0]
        resolved = await self._clients.versions.resolve(name)
        if resolved.model.version < self._versions.get(resolved.model.name, 0):
            # The watch was faster than the answer, which would bring back where tags have been.
            resolved = await self._clients.versions.resolve(name)
        spelled = self._spelled.setdefault(resolved.model.name, {})
        if is_by_digest(name):
            spelled.pop(name, None)
            while len(spelled) >= MAX_SPELLINGS:
                del spelled[next(iter(spelled))]
            spelled[name] = resolved.revision
        entries = entries_of(resolved.model, spelled)
        entry = next(entry for entry in entries if entry.revision == resolved.revision.digest)
        self._entries.setdefault(resolved.model.name, set()).add(entry.name)
        return entry

    async def set_count(self, name: str, count: int) -> ModelEntry:
        """Writes through to the registry; what else the policy says stays, also where somebody changes it meanwhile."""

        async def write() -> Model:
            model = await self._clients.steady.get_model(name)
            # 0 is no bound.
            most = model.policy.max_replicas and max(model.policy.max_replicas, count)
            policy = replace(model.policy, min_replicas=count, max_replicas=most)
            return await self._clients.steady.update_policy(name, policy, expected_version=model.version)

        # An operator waits for it: so are a registry that restarts and a connection that is just being made.
        model = await retried(write, within_seconds=RESTART_SECONDS)
        return entries_of(model, self._spelled.get(model.name, {}))[0]

    async def watch(self) -> None:
        """Feeds the catalogue until the watch breaks. Raises HeliosError then; call it again."""
        try:
            async with aclosing(self._clients.steady.watch_models()) as events:
                async for event in events:
                    match event:
                        case ModelSnapshot(models):
                            await self._replace(models)
                        case ModelUpserted(model):
                            await self._upsert(model)
                        case ModelDeleted(name):
                            self._delete(name)
                    self._store.mark_changed()
        finally:
            self._runtime.core.catalogue.is_synced = False

    async def _replace(self, models: Collection[Model]) -> None:
        found = {model.name: entries_of(model, await self._check_spelled(model)) for model in models}
        self._entries = {name: {entry.name for entry in entries} for name, entries in found.items()}
        self._versions = {model.name: model.version for model in models}
        for name in self._spelled.keys() - found.keys():
            del self._spelled[name]
        entries = [entry for entries in found.values() for entry in entries]
        self._runtime.apply(self._runtime.core.models_replaced(entries, time.monotonic(), is_synced=True))
        log.info("catalogue in step with the registry", models=len(found))

    async def _upsert(self, model: Model) -> None:
        self._versions[model.name] = model.version
        entries = entries_of(model, await self._check_spelled(model))
        # What is new comes first: an alias that moves is never without an owner. The model itself comes last: where
        # it leaves a revision that another entry has from now on, that one is there to take its replicas.
        for entry in reversed(entries):
            self._runtime.apply(self._runtime.core.model_upserted(entry, time.monotonic()))
        names = {entry.name for entry in entries}
        for gone in self._entries.get(model.name, set()) - names:
            self._runtime.apply(self._runtime.core.model_deleted(gone, time.monotonic()))
        self._entries[model.name] = names

    def _delete(self, name: str) -> None:
        self._spelled.pop(name, None)
        # Its deletion has a number of its own.
        self._versions[name] = self._versions.get(name, 0) + 1
        for gone in {name} | self._entries.pop(name, set()):
            self._runtime.apply(self._runtime.core.model_deleted(gone, time.monotonic()))

    async def _check_spelled(self, model: Model) -> dict[str, Revision]:
        """Returns the references by digest that requests have used of a model, without those of deleted revisions."""
        spelled = self._spelled.get(model.name, {})
        names = {model.name, *model.aliases}
        for reference in [one for one in spelled if one.partition("@")[0] not in names]:
            del spelled[reference]
        for digest in {revision.digest for revision in spelled.values()}:
            try:
                await self._clients.versions.resolve(f"{model.name}@{digest}")
            except NotFound:
                for reference in [name for name, revision in spelled.items() if revision.digest == digest]:
                    del spelled[reference]
        return spelled


class NoRegistry:
    """A ModelSource where no registry is set: what is on disk is all there is."""

    async def find(self, name: str) -> ModelEntry:
        """Can't be told."""
        raise self._unavailable()

    async def set_count(self, name: str, count: int) -> ModelEntry:
        """Can't be written."""
        raise self._unavailable()

    def _unavailable(self) -> HeliosError:
        return Unavailable("no registry is configured", reason="REGISTRY_UNAVAILABLE")
