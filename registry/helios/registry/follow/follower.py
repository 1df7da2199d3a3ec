"""Looks at followed sources when they are due, and ingests those that have changed.

    due → look (metadata) → the same: wait
                          → another: ingest → a revision: keep, serve, or roll out → wait
                          → failed: wait longer, as long as the place asks for at least

Looks are the event loop's (aiohttp) or run in threads (object stores), a bounded number at a time; ingests are the
ingester's, which has bounds of its own: where it is busy, the look comes again soon and nothing is the source's fault.
"""

import asyncio
import random
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from helios.mesh.errors import DeadlineExceeded, Draining, HeliosError, InvalidRequest, ModelNotFound
from helios.mesh.interceptors import as_helios_error
from helios.mesh.tasks import outcome_of, task_scope
from helios.registry.catalog import Catalog
from helios.registry.follow.following import NEXT_TAG, Following, Policy, next_pause
from helios.registry.follow.settings import FollowSettings
from helios.registry.follow.store import FOLLOWED_OTHERWISE, FollowStore, StillFollows
from helios.registry.ingest import Ingester
from helios.registry.names import Reference
from helios.registry.records import IngestDone, IngestSpec, Model
from helios.registry.rollout.store import RolloutStore
from helios.registry.sources.remote_sources import Sources

log = structlog.get_logger()

# What keeps an ingest from starting now, and is over in minutes: nothing of the source's.
_BUSY: Final = frozenset({"INGEST_RUNNING", "TOO_MANY_INGESTS"})
_BUSY_PAUSE: Final = timedelta(seconds=30)
# A registry that dies over a look leaves it to others, or to itself, after this long.
_HOLD: Final = timedelta(minutes=1)
_KEEP_SECONDS: Final = 20.0


class Follower:
    """Keeps models in step with their sources. Several registries on one database share the work."""

    def __init__(
        self,
        store: FollowStore,
        catalog: Catalog,
        rollouts: RolloutStore,
        sources: Sources,
        ingester: Ingester,
        *,
        settings: FollowSettings,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._rollouts = rollouts
        self._sources = sources
        self._ingester = ingester
        self._settings = settings
        self._asked = asyncio.Event()

    def wake(self) -> None:
        """Has what is due looked at now."""
        self._asked.set()

    async def run(self) -> None:
        """Looks for ever. Sources' errors are noted with their models; while the database fails it is asked again."""
        free = asyncio.Semaphore(self._settings.max_concurrent)
        async with task_scope() as group:
            while True:
                self._asked.clear()
                await free.acquire()
                due = await self._claim()
                if due is not None:
                    group.create_task(self._follow(due, free), name=f"follow {due.model}")
                    continue
                free.release()
                try:
                    async with asyncio.timeout(self._settings.poll_seconds):
                        await self._asked.wait()
                except TimeoutError:
                    pass

    async def _claim(self) -> Following | None:
        try:
            return await self._store.claim_due(datetime.now(UTC), _HOLD)
        except (HeliosError, OSError) as error:
            # The looks and ingests that run do without the database for now, and must not end with this.
            log.warning("followed sources not asked for", error=str(error))
            return None

    async def _follow(self, seen: Following, free: asyncio.Semaphore) -> None:
        try:
            async with task_scope() as group:
                looking = group.create_task(self._look(seen), name=f"look at {seen.model}")
                keeping = group.create_task(self._keep(seen), name=f"keep {seen.model}")
                # The one that ends first ends the other: a look that is over, or one that nobody wants any more.
                await asyncio.wait((looking, keeping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            free.release()

    async def _look(self, seen: Following) -> None:
        try:
            await self.look(seen)
        except (HeliosError, OSError) as error:
            # The database; another look follows when this one's hold is over.
            log.warning("followed source not noted", model=seen.model, error=str(error))

    async def _keep(self, seen: Following) -> None:
        """Holds a look's row while the model follows that."""
        is_followed = True
        while is_followed:
            await asyncio.sleep(_KEEP_SECONDS)
            try:
                is_followed = await self._store.keep(seen, datetime.now(UTC) + _HOLD)
            except (HeliosError, OSError) as error:
                # The hold outlasts one that failed; at the worst another registry looks, too.
                log.warning("followed source not held", model=seen.model, error=str(error))

    async def look(self, seen: Following) -> None:
        """Looks at one source and does what follows; its errors are noted."""
        match await outcome_of(self._follow_change(seen)):
            case None | ModelNotFound() | Draining():
                # All is done. Or it was deleted, and with it what it follows; or this process stops.
                return
            case TimeoutError():
                took = f"{seen.wish.source} was not looked at, or not ingested, in time"
                await self._failed(seen, DeadlineExceeded(took, reason="SOURCE_TIMEOUT"))
            case HeliosError(reason=reason) if reason == FOLLOWED_OTHERWISE:
                return
            case HeliosError(reason=reason) as busy if reason in _BUSY:
                asked = timedelta(seconds=busy.retry_after_seconds or 0.0)
                pause = max(asked, min(_BUSY_PAUSE, seen.wish.interval))
                await self._store.postponed(seen, datetime.now(UTC), pause)
            case error:
                # One that nobody foresaw is logged, and ends no other look.
                await self._failed(seen, as_helios_error(error, f"follow {seen.model}"))

    async def _follow_change(self, seen: Following) -> None:
        fingerprint, known = await self._identify(seen)
        if fingerprint == seen.fingerprint or known:
            await self._store.looked(seen, fingerprint, datetime.now(UTC), self._pause(seen))
            return
        before = await self._catalog.store.get_model(seen.model)
        digest = await self._ingest(seen)
        after = await self._apply(seen, before, digest)
        await self._catalog.write(
            lambda: self._store.changed(seen, fingerprint, digest, datetime.now(UTC), self._pause(seen))
        )
        log.info("followed source changed", model=after.name, source=seen.wish.source, revision=digest)

    async def _identify(self, seen: Following) -> tuple[str, bool]:
        """Returns what stands for what the place has, and whether the model has that already at the first look."""
        model = await self._catalog.store.get_model(seen.model)
        async with asyncio.timeout(self._settings.look_seconds):
            wish = seen.wish
            spec = IngestSpec(seen.model, wish.source, include=wish.include, exclude=wish.exclude)
            fingerprint, choice = await self._sources.identify(spec, model.engine_settings)
        if not fingerprint:
            raise InvalidRequest(
                f"{wish.source} names neither hashes nor ETags of its files, by which a change would be seen; a web"
                " server needs a file SHA256SUMS, or ETags",
                reason="SOURCE_NOT_FOLLOWABLE",
            )
        if seen.fingerprint:
            return fingerprint, False
        digest = await self._catalog.store.find_conversion(fingerprint, choice)
        revisions = await self._catalog.store.list_revisions(seen.model, before=None, limit=1000)
        return fingerprint, digest in {revision.digest for _, revision in revisions}

    async def _ingest(self, seen: Following) -> str:
        """Ingests the source; returns the revision that it is."""
        wish = seen.wish
        is_served = wish.policy is Policy.MOVE
        spec = IngestSpec(
            seen.model,
            wish.source,
            include=wish.include,
            exclude=wish.exclude,
            tags=() if is_served else (NEXT_TAG,),
            keep_served=not is_served,
        )
        async with (
            asyncio.timeout(self._settings.ingest_seconds),
            aclosing(self._ingester.ingest(spec, StillFollows(seen.model, wish))) as events,
        ):
            model = next(iter([event.model async for event in events if isinstance(event, IngestDone)]))
        if is_served:
            return model.revision.digest
        return next(tag.revision.digest for tag in model.tags if tag.name == NEXT_TAG)

    async def _apply(self, seen: Following, before: Model, digest: str) -> Model:
        """Lets the policy have its way with a revision that was ingested."""
        after = await self._catalog.store.get_model(seen.model)
        running = {after.revision.digest, before.rollout.revision.digest if before.rollout is not None else ""}
        if seen.wish.policy is not Policy.ROLLOUT or digest in running:
            return after
        target = Reference(seen.model, digest=digest)
        weight, guard = seen.wish.weight_percent, StillFollows(seen.model, seen.wish)
        return await self._catalog.write(lambda: self._rollouts.put(target, weight, datetime.now(UTC), guard=guard))

    async def _failed(self, seen: Following, error: HeliosError) -> None:
        pause = next_pause(
            seen.wish.interval,
            failure_count=seen.failure_count + 1,
            retry_after_seconds=error.retry_after_seconds,
            chance=random.random(),  # noqa: S311 - no secret
        )
        log.warning("followed source failed", model=seen.model, reason=error.reason, error=error.message)
        await self._catalog.write(lambda: self._store.failed(seen, error, datetime.now(UTC), pause))

    def _pause(self, seen: Following) -> timedelta:
        chance = random.random()  # noqa: S311 - no secret
        return next_pause(seen.wish.interval, failure_count=0, retry_after_seconds=None, chance=chance)
