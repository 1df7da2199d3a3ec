"""Staged revisions: weights in host memory and no process, the rung between the disk and a sleeping replica.

A start from here reads no disk. Each revision holds a lease at the storage agent and a mapping of the files that a
start reads (``start_files``); replicas that map the same files share the pages. Memory is booked before anything is
read, and given back when the mapping is gone.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from helios.mesh.errors import HeliosError, Overloaded
from helios.worker.supervisor import commands
from helios.worker.supervisor.host_ledger import HostLedger, check_room
from helios.worker.supervisor.records import Failure, HostUse, StagedState, StagedView
from helios.worker.supervisor.start_files import StartFiles

log = structlog.get_logger()

# How often it is looked whether the kernel dropped what is not locked, and whether starts read other files by now;
# counting pages takes 0.3 ms a GiB.
_LOOK_SECONDS: Final = 10.0
# A kernel that drops pages again and again needs the memory: reading them back each time would only wear the disk, and
# drop somebody else's.
_LONGEST_LOOK_SECONDS: Final = 640.0


class Lent(Protocol):
    """A revision that is lent."""

    path: str

    async def wait_lost(self) -> None:
        """Waits until the lease is lost and raises a HeliosError then."""


class Weights(Protocol):
    """Where weights come from: the storage agent's client."""

    def materialize(
        self, revision: str, *, holder: str, ttl_seconds: float, lease_id: str | None, keep: bool
    ) -> AbstractAsyncContextManager[Lent]:
        """Lends a revision for the block; raises HeliosError where that can't be."""
        ...


@dataclass(slots=True, eq=False)
class _Staged:
    """Attributes:
    is_booked: Its memory is booked; False while it waits for what others give back.
    failure: Why it could not be held; None: it was given back as asked.
    held: Its files; None before they are there.
    """

    view: StagedView
    is_booked: bool
    failure: Failure | None = None
    held: StartFiles | None = None


class Staging:
    """All staged revisions of a node; ``group`` runs one task for each and belongs to the caller.

    Giving back takes time (pages are unmapped, a lease is returned), so what is staged right after something else was
    given up waits for its room instead of being refused.

    Invariants: what is in ``views`` is booked, or waits for room that is being given back; a revision is published as
    GONE when its memory is given back, and before it is published again.
    """

    def __init__(
        self,
        *,
        group: asyncio.TaskGroup,
        weights: Weights,
        ledger: HostLedger,
        holder: str,
        lease_ttl_seconds: float,
        publish: Callable[[StagedView], None],
        packed_weights_directory: Path | None = None,
    ) -> None:
        self._group = group
        self._weights = weights
        self._ledger = ledger
        self._holder = holder
        self._lease_ttl_seconds = lease_ttl_seconds
        self._publish = publish
        self._packed_root = packed_weights_directory
        self._staged: dict[str, _Staged] = {}
        self._ending: set[_Staged] = set()
        self._tasks: dict[_Staged, asyncio.Task[None]] = {}

    @property
    def views(self) -> Mapping[str, StagedView]:
        """What is staged or on its way, by revision."""
        return {revision: staged.view for revision, staged in self._staged.items()}

    @property
    def yielding_bytes(self) -> int:
        """What is booked still and being given back."""
        return sum(staged.view.memory_bytes for staged in self._ending if staged.is_booked)

    def use(self) -> HostUse:
        """Returns what there is for staging, and what is booked."""
        return self._ledger.use()

    def stage(self, command: commands.Stage) -> None:
        """Begins to bring a revision to memory; nothing happens to one that is there or on its way.

        Raises:
            Overloaded: NO_CAPACITY.
        """
        if command.revision in self._staged:
            return
        view = StagedView(command.revision, command.model, StagedState.STAGING, command.memory_bytes)
        staged = _Staged(view, is_booked=not self._ending)
        if staged.is_booked:
            self._ledger.book(command.revision, command.memory_bytes)
            self._publish(view)
        else:
            kept_bytes = sum(other.view.memory_bytes for other in self._staged.values())
            check_room(command.memory_bytes, self._ledger.use().memory_bytes - kept_bytes)
        self._staged[command.revision] = staged
        task = self._group.create_task(self._hold(staged), name=f"stage {command.revision}")
        self._tasks[staged] = task
        # Not in the task itself: one that is cancelled before it ran does nothing at all.
        task.add_done_callback(lambda _: self._ended(staged))

    def unstage(self, revision: str) -> None:
        """Gives a revision's memory back; nothing happens where it is not staged."""
        staged = self._staged.pop(revision, None)
        if staged is not None:
            self._ending.add(staged)
            self._tasks[staged].cancel()

    async def wait_unstaged(self, revision: str) -> None:
        """Waits until what was given up of a revision is given back; returns at once where nothing was."""
        tasks = [self._tasks[staged] for staged in self._ending if staged.view.revision == revision]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Gives everything back and waits until it is."""
        tasks = tuple(self._tasks.values())
        for revision in tuple(self._staged):
            self.unstage(revision)
        if tasks:
            await asyncio.wait(tasks)

    async def _hold(self, staged: _Staged) -> None:
        """Holds one revision until it is cancelled or can't be held."""
        try:
            await self._wait_room(staged)
            async with self._weights.materialize(
                staged.view.revision,
                holder=f"{self._holder}/staged",
                ttl_seconds=self._lease_ttl_seconds,
                lease_id=None,
                keep=False,
            ) as lent:
                await self._keep_resident(staged, lent)
        except HeliosError as error:
            staged.failure = Failure(error.reason, error.message)
        except OSError as error:
            staged.failure = Failure("STAGING_FAILED", str(error))

    async def _wait_room(self, staged: _Staged) -> None:
        """Books what could not be booked yet. Raises Overloaded where all was given back and it is not enough."""
        revision, size_bytes = staged.view.revision, staged.view.memory_bytes
        while not staged.is_booked:
            is_itself = any(other.view.revision == revision for other in self._ending)
            if is_itself or (self._ending and size_bytes > self._ledger.free_bytes):
                tasks = [self._tasks[other] for other in self._ending]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                continue
            self._ledger.book(revision, size_bytes)
            staged.is_booked = True
            self._publish(staged.view)

    def _ended(self, staged: _Staged) -> None:
        revision = staged.view.revision
        del self._tasks[staged]
        self._ending.discard(staged)
        if self._staged.get(revision) is staged:
            del self._staged[revision]
        if staged.is_booked:
            self._ledger.release(revision)
        view = replace(
            staged.view,
            state=StagedState.GONE,
            memory_bytes=0,
            resident_bytes=0,
            locked_bytes=0,
            failure=staged.failure,
        )
        self._publish(view)
        log.info("revision unstaged", revision=revision, reason=staged.failure.reason if staged.failure else "ASKED")

    async def _keep_resident(self, staged: _Staged, lent: Lent) -> None:
        directory = Path(lent.path)
        held = await self._open(staged, directory)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(staged, held, directory), name="keep resident")
                await lent.wait_lost()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            if staged.held is not None:
                await asyncio.to_thread(staged.held.close)

    async def _open(self, staged: _Staged, directory: Path) -> StartFiles:
        """Maps what a start reads, and books it, in place of what is held; returns what is held then.

        Raises:
            Overloaded: NO_CAPACITY, and nothing was held before.
        """
        revision, before = staged.view.revision, staged.held
        held = await asyncio.to_thread(StartFiles, directory, revision, self._packed_root)
        try:
            self._ledger.book(revision, held.files.size_bytes)
        except Overloaded:
            held.close()
            if before is not None:
                return before
            if not held.is_packed:
                raise
            # Packed weights may be larger than the checkpoint, by an output layer.
            held = await asyncio.to_thread(StartFiles, directory, revision, None)
            self._ledger.book(revision, held.files.size_bytes)
        staged.held = held
        staged.view = replace(staged.view, memory_bytes=held.files.size_bytes)
        if before is not None:
            await asyncio.to_thread(before.close)
        return held

    async def _watch(self, staged: _Staged, held: StartFiles, directory: Path) -> None:
        await self._bring_in(staged, held)
        size_bytes = held.files.size_bytes
        log.info("revision staged", revision=staged.view.revision, model=staged.view.model, bytes=size_bytes)
        seconds = _LOOK_SECONDS
        while True:
            await asyncio.sleep(seconds)
            before = held
            if not await asyncio.to_thread(held.is_current):
                held = await self._open(staged, directory)
            is_dropped = await asyncio.to_thread(held.files.resident_bytes) < held.files.size_bytes
            seconds = next_look_seconds(seconds, is_dropped=is_dropped)
            if is_dropped or held is not before:
                await self._bring_in(staged, held)

    async def _bring_in(self, staged: _Staged, held: StartFiles) -> None:
        files = held.files
        await asyncio.to_thread(files.bring_in)
        resident_bytes = await asyncio.to_thread(files.resident_bytes)
        view = replace(
            staged.view, state=StagedState.STAGED, resident_bytes=resident_bytes, locked_bytes=files.locked_bytes
        )
        if view != staged.view:
            staged.view = view
            self._publish(view)


def next_look_seconds(last_seconds: float, *, is_dropped: bool) -> float:
    """Returns how long to wait before it is looked again: longer each time that something was dropped."""
    return min(2 * last_seconds, _LONGEST_LOOK_SECONDS) if is_dropped else _LOOK_SECONDS
