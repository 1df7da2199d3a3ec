"""The cordons of a registry: changes, each with a line in the audit log, and those who watch."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime

from helios.mesh.audit import audit
from helios.mesh.errors import Draining
from helios.registry.cordons.records import Cordon
from helios.registry.cordons.store import CordonStore


class Cordons:
    """Sets and tells. ``poll_seconds`` is how often another registry's changes are looked for; None: there is none."""

    def __init__(
        self,
        store: CordonStore,
        *,
        poll_seconds: float | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._poll_seconds = poll_seconds
        self._now = now
        self._changed = asyncio.Event()
        self._is_closed = False

    async def set(self, worker_id: str, actor: str, *, is_cordoned: bool) -> tuple[bool, tuple[Cordon, ...]]:
        """Cordons a worker, or lifts its cordon; returns whether that changed anything, and all cordons.

        Raises InvalidRequest, QuotaExceeded.
        """
        is_change = await self._store.set(worker_id, self._now(), is_cordoned=is_cordoned)
        if is_change:
            audit("cordon worker" if is_cordoned else "uncordon worker", actor=actor, worker=worker_id)
            self._announce()
        return is_change, await self._store.all()

    async def watch(self) -> AsyncGenerator[tuple[Cordon, ...], None]:
        """Yields all cordons, whenever they are others than before. Raises Draining when the process stops."""
        told: tuple[Cordon, ...] | None = None
        while not self._is_closed:
            # Before it is looked: a change that comes meanwhile has it looked at again.
            changed = self._changed
            cordons = await self._store.all()
            if cordons != told:
                told = cordons
                yield cordons
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await changed.wait()
            except TimeoutError:
                pass
        raise Draining("the registry stops; watch again")

    def close(self) -> None:
        """Ends all watches, now and later."""
        self._is_closed = True
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
