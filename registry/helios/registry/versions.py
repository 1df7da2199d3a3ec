"""Tags, pins, rollbacks and events of models, over the catalog: its writes and its watchers are these' too."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Final

from helios.registry.catalog import Catalog
from helios.registry.events import PLAIN, Event, EventsMissed, Mutation
from helios.registry.names import Reference
from helios.registry.records import Model
from helios.registry.tag_store import TagStore

# A watcher that comes back after hours reads its events in portions, so that none of them is large.
_EVENT_BATCH: Final = 500


class Versions:
    """What points at the revisions of models. ``store`` is for reading; every write goes through a method here."""

    def __init__(self, catalog: Catalog, store: TagStore) -> None:
        self.store = store
        self._catalog = catalog

    async def put_tag(self, target: Reference, tag: str, mutation: Mutation = PLAIN) -> Model:
        """Points a tag, or the served revision where it is empty, at a revision. Raises as ``TagStore.put_tag``."""
        return await self._catalog.write(lambda: self.store.put_tag(target, tag, datetime.now(UTC), mutation))

    async def delete_tag(self, name: str, tag: str, mutation: Mutation = PLAIN) -> Model:
        """Removes a tag. Raises as ``TagStore.delete_tag``."""
        return await self._catalog.write(lambda: self.store.delete_tag(name, tag, datetime.now(UTC), mutation))

    async def roll_back(
        self, name: str, tag: str = "", mutation: Mutation = PLAIN, *, to: Reference | None = None
    ) -> Model:
        """Points a tag, or the served revision, where it pointed before. Raises as ``TagStore.roll_back``."""
        return await self._catalog.write(lambda: self.store.roll_back(name, tag, datetime.now(UTC), mutation, to=to))

    async def put_pin(self, target: Reference, reason: str, mutation: Mutation = PLAIN) -> Model:
        """Keeps a revision from being deleted. Raises as ``TagStore.put_pin``."""
        return await self._catalog.write(lambda: self.store.put_pin(target, reason, datetime.now(UTC), mutation))

    async def delete_pin(self, target: Reference, mutation: Mutation = PLAIN) -> Model:
        """Takes a pin back. Raises as ``TagStore.delete_pin``."""
        return await self._catalog.write(lambda: self.store.delete_pin(target, datetime.now(UTC), mutation))

    async def delete_revision(self, target: Reference, mutation: Mutation = PLAIN) -> tuple[Model, int]:
        """Removes a revision and what only it used; returns the model and the freed bytes. Raises as the store."""
        return await self._catalog.write_and_collect(
            lambda: self.store.delete_revision(target, datetime.now(UTC), mutation), is_dry_run=mutation.is_dry_run
        )

    async def watch_events(self, after: int | None = None) -> AsyncGenerator[Event | EventsMissed, None]:
        """Yields the changes after a version (None: from now on), the oldest first, for ever.

        Where some of them are not known any more, EventsMissed comes first, and then what follows on its version.
        Nothing is queued for a slow reader: it reads on from where it is.

        Raises:
            Draining: The registry stops.
        """
        changes = self._catalog.store.changes
        version = await changes.version() if after is None else after
        while True:
            # Taken before the look, so that what comes meanwhile is not slept through.
            news = self._catalog.hub.next_news()
            found = await changes.list_events(after=version, limit=_EVENT_BATCH)
            if found is None:
                version = await changes.version()
                yield EventsMissed(version)
                continue
            for event in found:
                yield event
                version = event.version
            if not found:
                await news()
