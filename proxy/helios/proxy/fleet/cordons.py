"""Cordons: workers that operators want nothing more started on.

The registry is the truth, so that all proxies have the same: a change is written there before it counts here, and each
proxy watches. What it said last is on disk, for a start while it is away. Without a registry the disk is the truth; so
it was before there were several proxies, and what such a proxy knows is handed to the registry at the first chance.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import structlog

from helios.mesh.calls import RESTART_SECONDS
from helios.mesh.tasks import retried
from helios.proxy.actions import Action
from helios.proxy.core import Core
from helios.proxy.registry_away import REGISTRY_AWAY, registry_away

log = structlog.get_logger()

# The watch tells of a change some milliseconds after it is answered.
_SETTLE_SECONDS: Final = 1.0


class Cordoned(Protocol):
    """What the registry says of one cordon."""

    @property
    def worker_id(self) -> str:
        """Which worker."""
        ...


class CordonSource(Protocol):
    """The registry's cordons."""

    async def set(self, worker_id: str, *, is_cordoned: bool) -> Sequence[Cordoned]:
        """Cordons a worker, or lifts its cordon; returns all cordons. Idempotent. Raises HeliosError."""
        ...

    def watch(self) -> AsyncIterator[Sequence[Cordoned]]:
        """Yields all cordons, now and after each change. Raises HeliosError when it breaks."""
        ...


class CordonMemory(Protocol):
    """Keeps cordons over restarts."""

    async def save_cordons(self, own: Iterable[str], shared: Iterable[str]) -> None:
        """Replaces what is kept: what only this proxy knows, and what the registry said. Raises OSError."""
        ...


class Cordons:
    """What is cordoned, in the core and on disk. Changes are written in the order in which they come."""

    def __init__(self, core: Core, apply: Callable[[list[Action]], None], memory: CordonMemory) -> None:
        self._core = core
        self._apply = apply
        self._memory = memory
        self._source: CordonSource | None = None
        self._own: frozenset[str] = frozenset()
        self._writing = asyncio.Lock()
        self._is_watching = False
        self._taken_count = 0
        self._taken = asyncio.Event()

    def restore(self, own: Iterable[str], shared: Iterable[str]) -> None:
        """Begins with what an earlier run kept."""
        self._own = frozenset(own)
        self._core.fleet.cordoned.update(self._own, shared)

    def use(self, source: CordonSource) -> None:
        """Has the registry's cordons be the truth; ``watch`` is to run."""
        self._source = source

    async def change(self, worker_id: str, *, is_cordoned: bool) -> None:
        """Cordons a worker, or lifts its cordon, for all proxies.

        Raises:
            Unavailable: REGISTRY_UNAVAILABLE; nothing has changed here.
        """
        if self._source is None:
            cordoned = self._core.fleet.cordoned
            self._own = frozenset(cordoned | {worker_id} if is_cordoned else cordoned - {worker_id})
            await self._take(self._own)
            return
        taken_count = self._taken_count
        write = partial(self._source.set, worker_id, is_cordoned=is_cordoned)
        try:
            # An operator waits for it: so is a registry that restarts.
            cordons = await retried(write, within_seconds=RESTART_SECONDS)
        except REGISTRY_AWAY as error:
            raise registry_away("cordons can't be changed", error, worker_id=worker_id) from error
        self._own -= {worker_id}
        if self._taken_count == taken_count:
            await self._take(cordon.worker_id for cordon in cordons)
        else:
            await self._settle(worker_id, is_cordoned=is_cordoned)

    async def _settle(self, worker_id: str, *, is_cordoned: bool) -> None:
        """Waits until what is known here has a change in it. What came while it was asked for may be newer than the
        answer, or older; the watch, which tells all changes in their order, is yet to say what holds, or has said so.
        """
        cordoned = self._core.fleet.cordoned
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                while (worker_id in cordoned) is not is_cordoned:
                    await self._taken.wait()
        if not self._is_watching:
            await self._take((cordoned | {worker_id} if is_cordoned else cordoned - {worker_id}) - self._own)

    async def watch(self) -> None:
        """Follows the registry's cordons until the watch breaks. Raises HeliosError then; call it again."""
        assert self._source is not None, "there is a registry"
        for worker_id in sorted(self._own):
            await self._source.set(worker_id, is_cordoned=True)
            log.info("cordon handed to the registry", worker=worker_id)
            self._own -= {worker_id}
        try:
            async for cordons in self._source.watch():
                self._is_watching = True
                await self._take(cordon.worker_id for cordon in cordons)
        finally:
            self._is_watching = False

    async def _take(self, worker_ids: Iterable[str]) -> None:
        wanted, now = frozenset(worker_ids) | self._own, time.monotonic()
        self._taken_count += 1
        self._taken.set()
        self._taken = asyncio.Event()
        for worker_id in sorted(wanted ^ self._core.fleet.cordoned):
            self._apply(self._core.cordon(worker_id, now, is_cordoned=worker_id in wanted))
        # Two writes at once might end in another order than they began.
        async with self._writing:
            await self._memory.save_cordons(self._own, self._core.fleet.cordoned - self._own)
