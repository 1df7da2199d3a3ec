"""Leases of a replica's LoRA adapters: one for each revision that it needs, for as long as it needs it.

They are apart from the model's lease: an adapter that can't be had holds up no start and ends no replica, and comes and
goes while the replica runs.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import structlog

from helios.mesh.errors import HeliosError
from helios.worker.supervisor.records import Failure

log = structlog.get_logger()

_RETRY_SECONDS: Final = 2.0
_LONGEST_RETRY_SECONDS: Final = 60.0


class Lent(Protocol):
    """A revision that is lent. ``keep`` True: leaving the block does not end the lease."""

    path: str
    keep: bool

    async def wait_lost(self) -> None:
        """Waits until the lease is lost and raises a HeliosError then."""


class AdapterLeases:
    """Borrows what ``follow`` names and gives back what it does not name any more.

    A lease outlives this process: its successor borrows anew before the lease ends. ``on_lent``, ``on_refused`` and
    ``on_returned`` are called from tasks of ``group``, which belongs to the caller.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        borrow: Callable[[str], AbstractAsyncContextManager[Lent]],
        *,
        on_lent: Callable[[str, str], None],
        on_refused: Callable[[str, Failure], None],
        on_returned: Callable[[str], None],
    ) -> None:
        self._group = group
        self._borrow = borrow
        self._on_lent = on_lent
        self._on_refused = on_refused
        self._on_returned = on_returned
        self._wanted: frozenset[str] = frozenset()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._given_up: set[str] = set()

    def follow(self, revisions: frozenset[str]) -> None:
        """Says which revisions must be here."""
        self._wanted = revisions
        for revision in self._tasks.keys() - revisions - self._given_up:
            self._given_up.add(revision)
            self._tasks[revision].cancel()
        for revision in revisions - self._tasks.keys():
            self._start(revision)

    async def wait_returned(self, timeout_seconds: float) -> None:
        """Waits until what was given up is given back."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks.values()), timeout=timeout_seconds)

    def _start(self, revision: str) -> None:
        task = self._group.create_task(self._hold(revision), name=f"adapter {revision}")
        self._tasks[revision] = task
        # Not in the task itself: one that is cancelled before it ran does nothing at all.
        task.add_done_callback(lambda _: self._ended(revision))

    def _ended(self, revision: str) -> None:
        del self._tasks[revision]
        if revision not in self._given_up:
            # This process ends.
            return
        self._given_up.discard(revision)
        self._on_returned(revision)
        if revision in self._wanted:
            # Wanted again while it was given back.
            self._start(revision)

    async def _hold(self, revision: str) -> None:
        """Holds a lease until it is cancelled; one that can't be had, or is lost, is asked for again."""
        pause = _RETRY_SECONDS
        while True:
            try:
                async with self._borrow(revision) as lent:
                    pause = _RETRY_SECONDS
                    self._on_lent(revision, lent.path)
                    try:
                        await lent.wait_lost()
                    finally:
                        lent.keep = revision not in self._given_up
            except HeliosError as error:
                log.warning("adapter can't be borrowed", revision=revision, reason=error.reason, error=error.message)
                self._on_refused(revision, Failure(error.reason, error.message))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
