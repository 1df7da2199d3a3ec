"""Carries out what `Ahead` decides: one fetch at a time, while nobody waits for bytes.

A fetch is the same as any other, so that it is verified, leaves nothing half done, and serves whoever comes to want the
revision meanwhile. As soon as another revision is wanted it is broken off; what came is kept and gone on from.
"""

import asyncio
from typing import Final

import structlog

from helios.mesh.errors import DiskFull, HeliosError, PreconditionFailed, Unavailable
from helios.mesh.tasks import task_scope
from helios.storage.clock import Clock
from helios.storage.materializer import Materializer
from helios.storage.prefetch.state import Account, Ahead, Fetch, GiveUp, Order, Plan, Report

log = structlog.get_logger()

_LOOK_SECONDS: Final = 2.0
"""How often room and budget are looked at: a hundred microseconds each time."""


class Prefetcher:
    """Fetches ahead. ``run`` must be running; used on one event loop."""

    def __init__(self, ahead: Ahead, clock: Clock) -> None:
        self._ahead = ahead
        self._clock = clock
        self._changed = asyncio.Event()
        self._order: Order | None = None
        self._task: asyncio.Task[None] | None = None
        self._kept = Account()

    def recall(self, account: Account) -> None:
        """Goes on from what an earlier run of the agent has kept; to be called before anything else."""
        self._ahead.recall(account)
        self._kept = account

    def take(self, plan: Plan) -> None:
        """Replaces the plan: what is in it no longer is broken off."""
        self._ahead.take(plan)
        self._changed.set()
        if self._order is not None and not self._ahead.is_wanted(self._order.revision, self._clock()):
            self._break_off("it is in the plan no longer")

    def report(self) -> Report:
        """What became of the plan."""
        return self._ahead.report(self._clock())

    def expected_uses(self, revision: str) -> float:
        """How many uses of a revision are expected: what eviction and promotion count."""
        return self._ahead.expected_uses(revision, self._clock())

    def make_way(self, revision: str) -> None:
        """Somebody waits for a revision: a fetch of another one is broken off."""
        if self._order is not None and self._order.revision != revision:
            self._break_off("somebody waits for another revision")

    async def run(self, materializer: Materializer) -> None:
        """Fetches ahead, for ever."""
        async with task_scope() as group:
            while True:
                decision = await self._decide(materializer)
                await self._keep(materializer)
                match decision:
                    case Fetch(order):
                        self._order = order
                        self._task = group.create_task(self._fetch(materializer, order), name="fetch ahead")
                        await asyncio.wait([self._task])
                        # Not in the task: one that is cancelled before its first step runs nothing.
                        self._order = None
                    case GiveUp(revision):
                        await self._give_up(materializer, revision)
                    case None:
                        await self._wait()

    async def _decide(self, materializer: Materializer) -> Fetch | GiveUp | None:
        if self._ahead.is_at_rest(self._clock()):
            return None
        used = materializer.use_counts()
        self._ahead.look(here=used, is_used=lambda revision: used[revision] > 0)
        spare_bytes = await materializer.spare_bytes()
        # Looked at last: somebody may have come while the disks were asked.
        if materializer.is_fetching:
            return None
        return self._ahead.next(self._clock(), here=used, spare_bytes=spare_bytes)

    async def _fetch(self, materializer: Materializer, order: Order) -> None:
        self._ahead.began(order, self._clock())
        log.info("fetching ahead", revision=order.revision, size_bytes=order.size_bytes, reason=order.reason)
        fetched_bytes, failure = None, ""
        try:
            # Before the first byte: an agent that is killed again and again must not spend the hour's budget each time.
            await self._keep(materializer)
            fetched_bytes = await materializer.fetch_ahead(order.revision, may_evict=order.is_asked)
        except HeliosError as error:
            failure = f"{error.reason}: {error.message}"
            log.warning("not fetched ahead", revision=order.revision, reason=error.reason, error=error.message)
        finally:
            self._ahead.ended(order, self._clock(), fetched_bytes=fetched_bytes, failure=failure)

    async def _keep(self, materializer: Materializer) -> None:
        account = self._ahead.account()
        if account == self._kept:
            return
        try:
            await materializer.keep_account(account)
        except (DiskFull, Unavailable) as error:
            log.warning("what was fetched ahead is not noted", reason=error.reason, error=error.message)
            return
        self._kept = account

    def _break_off(self, why: str) -> None:
        if self._task is not None and self._order is not None:
            log.info("fetching ahead ends", revision=self._order.revision, why=why)
            self._task.cancel()

    async def _give_up(self, materializer: Materializer, revision: str) -> None:
        try:
            freed_bytes = await materializer.evict(revision)
        except PreconditionFailed:
            # Pinned, or wanted a moment ago.
            self._ahead.stays(revision)
            return
        log.info("fetched ahead for nothing", revision=revision, freed_bytes=freed_bytes)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()
