"""Staged revisions: weights in host memory and no process, the rung between the disk and a sleeping replica.

A start from here reads no disk. Each revision holds a lease at the storage agent and a mapping of its files; replicas
that map the same files share the pages. Memory is booked before anything is read, and given back when the mapping is
gone.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from helios.mesh.errors import HeliosError
from helios.worker.supervisor import commands
from helios.worker.supervisor.host_ledger import HostLedger
from helios.worker.supervisor.records import Failure, HostUse, StagedState, StagedView
from helios.worker.supervisor.resident_files import ResidentFiles

log = structlog.get_logger()

# How often it is looked whether the kernel dropped what is not locked.
_LOOK_SECONDS: Final = 10.0


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


@dataclass(slots=True)
class _Staged:
    view: StagedView
    task: asyncio.Task[None] | None = None
    is_stopped: bool = False


class Staging:
    """All staged revisions of a node; ``group`` runs one task for each and belongs to the caller.

    Invariants: what is in ``views`` is booked; a revision is published as GONE once, when its memory is given back.
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
    ) -> None:
        self._group = group
        self._weights = weights
        self._ledger = ledger
        self._holder = holder
        self._lease_ttl_seconds = lease_ttl_seconds
        self._publish = publish
        self._staged: dict[str, _Staged] = {}

    @property
    def views(self) -> Mapping[str, StagedView]:
        """What is staged or on its way, by revision."""
        return {revision: staged.view for revision, staged in self._staged.items()}

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
        self._ledger.book(command.revision, command.memory_bytes)
        view = StagedView(command.revision, command.model, StagedState.STAGING, command.memory_bytes)
        staged = self._staged[command.revision] = _Staged(view)
        self._publish(view)
        staged.task = self._group.create_task(self._hold(staged), name=f"stage {command.revision}")

    def unstage(self, revision: str) -> None:
        """Gives a revision's memory back; nothing happens where it is not staged."""
        staged = self._staged.get(revision)
        if staged is not None and staged.task is not None and not staged.is_stopped:
            staged.is_stopped = True
            staged.task.cancel()

    async def wait_unstaged(self, revision: str) -> None:
        """Waits until nothing of a revision is held; returns at once where nothing is."""
        staged = self._staged.get(revision)
        if staged is not None and staged.task is not None:
            await asyncio.wait((staged.task,))

    async def close(self) -> None:
        """Gives everything back and waits until it is."""
        tasks = [staged.task for staged in self._staged.values() if staged.task is not None]
        for revision in tuple(self._staged):
            self.unstage(revision)
        if tasks:
            await asyncio.wait(tasks)

    async def _hold(self, staged: _Staged) -> None:
        """Holds one revision until it is cancelled or can't be held."""
        revision = staged.view.revision
        failure: Failure | None = None
        try:
            async with self._weights.materialize(
                revision,
                holder=f"{self._holder}/staged",
                ttl_seconds=self._lease_ttl_seconds,
                lease_id=None,
                keep=False,
            ) as lent:
                await self._keep_resident(staged, lent)
        except HeliosError as error:
            failure = Failure(error.reason, error.message)
        except OSError as error:
            failure = Failure("STAGING_FAILED", str(error))
        finally:
            del self._staged[revision]
            self._ledger.release(revision)
            view = replace(
                staged.view, state=StagedState.GONE, memory_bytes=0, resident_bytes=0, locked_bytes=0, failure=failure
            )
            self._publish(view)
            log.info("revision unstaged", revision=revision, reason=failure.reason if failure else "ASKED")

    async def _keep_resident(self, staged: _Staged, lent: Lent) -> None:
        files = await asyncio.to_thread(ResidentFiles.of_directory, Path(lent.path))
        try:
            self._ledger.book(staged.view.revision, files.size_bytes)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(staged, files), name="keep resident")
                await lent.wait_lost()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await asyncio.to_thread(files.close)

    async def _watch(self, staged: _Staged, files: ResidentFiles) -> None:
        while True:
            await asyncio.to_thread(files.bring_in)
            resident_bytes = await asyncio.to_thread(files.resident_bytes)
            view = replace(
                staged.view,
                state=StagedState.STAGED,
                memory_bytes=files.size_bytes,
                resident_bytes=resident_bytes,
                locked_bytes=files.locked_bytes,
            )
            if view != staged.view:
                if view.state is not staged.view.state:
                    log.info("revision staged", revision=view.revision, model=view.model, bytes=view.memory_bytes)
                staged.view = view
                self._publish(view)
            await asyncio.sleep(_LOOK_SECONDS)
