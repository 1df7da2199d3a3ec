"""The proxy's conversation with the registry: the watch that feeds the catalogue, and the few direct calls.

While the watch stands, the catalogue is in step with the registry. When it breaks, the catalogue stays as it is and is
marked out of step, so that an unknown name is asked for and not refused.
"""

import time
from contextlib import aclosing
from typing import Protocol

import structlog

from helios.mesh.errors import HeliosError, Unavailable
from helios.proxy.catalogue import ModelEntry
from helios.proxy.runtime import Runtime
from helios.registry.client import Model, ModelDeleted, ModelPolicy, ModelSnapshot, ModelUpserted, RegistryClient

log = structlog.get_logger()


class ModelSource(Protocol):
    """Where models come from, asked directly. Idempotent and cancel-safe."""

    async def find(self, name: str) -> ModelEntry:
        """The model of a name or alias. Raises NotFound, or another HeliosError where that can't be told."""
        ...

    async def set_policy(self, name: str, *, min_replicas: int, max_replicas: int) -> ModelEntry:
        """Sets how many replicas a model has. Raises HeliosError."""
        ...


class CatalogueStore(Protocol):
    """Keeps the catalogue over restarts."""

    def mark_changed(self) -> None:
        """Says that the catalogue is to be written soon. Never blocks."""
        ...


class RegistrySession:
    """A ModelSource, and the feed of the catalogue."""

    def __init__(self, client: RegistryClient, quick: RegistryClient, runtime: Runtime, store: CatalogueStore) -> None:
        """Takes two clients: one for the watch and policies, and one with a short timeout for requests that wait."""
        self._client = client
        self._quick = quick
        self._runtime = runtime
        self._store = store

    async def find(self, name: str) -> ModelEntry:
        """Asks the registry."""
        return entry_from_model(await self._quick.get_model(name))

    async def set_policy(self, name: str, *, min_replicas: int, max_replicas: int) -> ModelEntry:
        """Writes through to the registry."""
        return entry_from_model(await self._client.update_policy(name, ModelPolicy(min_replicas, max_replicas)))

    async def watch(self) -> None:
        """Feeds the catalogue until the watch breaks. Raises HeliosError then; call it again."""
        core = self._runtime.core
        try:
            async with aclosing(self._client.watch_models()) as events:
                async for event in events:
                    now = time.monotonic()
                    match event:
                        case ModelSnapshot(models):
                            entries = [entry_from_model(model) for model in models]
                            self._runtime.apply(core.models_replaced(entries, now, is_synced=True))
                            log.info("catalogue in step with the registry", models=len(entries))
                        case ModelUpserted(model):
                            self._runtime.apply(core.model_upserted(entry_from_model(model), now))
                        case ModelDeleted(name):
                            self._runtime.apply(core.model_deleted(name, now))
                    self._store.mark_changed()
        finally:
            core.catalogue.is_synced = False


class NoRegistry:
    """A ModelSource where no registry is set: what is on disk is all there is."""

    async def find(self, name: str) -> ModelEntry:
        """Can't be told."""
        raise self._unavailable()

    async def set_policy(self, name: str, *, min_replicas: int, max_replicas: int) -> ModelEntry:
        """Can't be written."""
        raise self._unavailable()

    def _unavailable(self) -> HeliosError:
        return Unavailable("no registry is configured", reason="REGISTRY_UNAVAILABLE")


def entry_from_model(model: Model) -> ModelEntry:
    """The catalogue's form of a registry's model."""
    profile = model.revision.profile
    return ModelEntry(
        name=model.name,
        revision=model.revision.digest,
        aliases=model.aliases,
        weights_bytes=profile.weights_bytes,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        max_context_tokens=profile.max_context_tokens,
        parameter_count=profile.parameter_count,
        layer_count=profile.layer_count,
        vocabulary_size=profile.vocabulary_size,
        base_model=profile.base_model,
        dtype=profile.dtype,
        architecture=profile.architecture,
        source=model.revision.source,
        created_at=int(model.revision.created_at.timestamp()),
        min_replicas=model.policy.min_replicas,
        max_replicas=model.policy.max_replicas,
        engine_settings=model.engine_settings.document,
    )
