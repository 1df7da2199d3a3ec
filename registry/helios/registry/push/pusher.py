"""Pushes: a revision to an OCI registry, for as long as its caller stays.

A push ends when the caller leaves, and leaves nothing here but notes of where uploads go on. Its blobs are held
meanwhile, so a model may be deleted while it is pushed. Two pushes never send the same blob to the same repository at
once; the second one finds it there.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final, Protocol, Self

import structlog

from helios.mesh.errors import Draining, HeliosError, Overloaded
from helios.mesh.tasks import outcome_of
from helios.registry import offload
from helios.registry.blobs import Blobs
from helios.registry.manifest import Manifest
from helios.registry.names import Reference, parse_reference
from helios.registry.progress import ProgressLog, news
from helios.registry.push.journal import PushJournal
from helios.registry.push.records import PushDone, PushEvent
from helios.registry.push.settings import PushSettings
from helios.registry.push.steps import Push
from helios.registry.push.target import OciTarget, parse_target
from helios.registry.records import IngestProgress, ResolvedModel, Revision
from helios.registry.sources.settings import OciSettings
from helios.registry.sources.web import Web

log = structlog.get_logger()

# Five times a second: smooth for a progress bar, nothing for the loop.
_REPORT_SECONDS: Final = 0.2
_TIDY_SECONDS: Final = 3_600.0


class Revisions(Protocol):
    """What is known of revisions; the registry's ``Store``."""

    async def resolve(self, reference: Reference) -> ResolvedModel:
        """Returns what a reference means. Raises NotFound."""
        ...

    async def get_manifest(self, digest: str) -> tuple[Manifest, Revision]:
        """Returns a revision's manifest. Raises RevisionNotFound."""
        ...


class Pusher:
    """Runs pushes, ``max_concurrent`` at most. An async context manager that owns their tasks."""

    def __init__(
        self,
        revisions: Revisions,
        blobs: Blobs,
        web: Web,
        journal: PushJournal,
        *,
        settings: PushSettings,
        oci: OciSettings,
    ) -> None:
        """Takes what pushes share; ``web`` stays the caller's, who opens and closes it."""
        self._revisions = revisions
        self._web = web
        self._journal = journal
        self._oci = oci
        self._push = Push(blobs, journal, settings)
        self._max_concurrent = settings.max_concurrent
        self._tasks: set[asyncio.Task[PushDone | Exception]] = set()
        self._group = asyncio.TaskGroup()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Begins to take pushes."""
        await offload.run(lambda _: self._journal.open())
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends what runs; callers get Draining."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)

    async def keep_tidy(self) -> None:
        """Forgets unfinished uploads that are too old, for ever: a registry may run for months."""
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            await offload.run(lambda _: self._journal.tidy())

    async def push(self, model: str, target: str) -> AsyncGenerator[PushEvent, None]:
        """Pushes a revision; yields progress, and PushDone last. Closing it early ends the push.

        Raises:
            InvalidRequest: INVALID_TARGET, TARGET_REFUSED, or the reference is none.
            NotFound: No such model, tag, revision or target.
            Overloaded: TOO_MANY_PUSHES.
            HeliosError: As PushModel in the contract.
        """
        reference = parse_target(target)
        resolved = await self._revisions.resolve(parse_reference(model))
        if self._is_closing:
            raise _draining()
        if len(self._tasks) >= self._max_concurrent:
            raise Overloaded(
                f"{len(self._tasks)} pushes are running, which is the limit; try again when one is done",
                reason="TOO_MANY_PUSHES",
                retry_after_seconds=10,
            )
        progress = ProgressLog()
        work = self._run(resolved, OciTarget(reference, self._web, self._oci), progress)
        task = self._group.create_task(work, name=f"push {resolved.model.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            seen: tuple[IngestProgress, ...] = ()
            while True:
                await asyncio.wait([task], timeout=_REPORT_SECONDS)
                is_done, now = task.done(), progress.snapshot()
                for entry in news(seen, now):
                    yield entry
                seen = now
                if is_done:
                    yield _result(task)
                    return
        finally:
            task.cancel()
            # The caller's next request must not meet what is left of this one.
            await offload.uninterrupted(_ended(task))

    async def _run(self, resolved: ResolvedModel, target: OciTarget, progress: ProgressLog) -> PushDone | Exception:
        """Runs one push. What it raises goes to its caller, not to the task group, which would end the others."""
        name = resolved.model.name
        done = await outcome_of(self._send(resolved.revision, target, progress))
        if isinstance(done, Exception):
            reason = done.reason if isinstance(done, HeliosError) else "INTERNAL"
            log.warning("push failed", model=name, target=str(target.reference), reason=reason, error=str(done))
        else:
            log.info("model pushed", model=name, location=done.location, sent_bytes=done.sent_bytes)
        return done

    async def _send(self, revision: Revision, target: OciTarget, progress: ProgressLog) -> PushDone:
        manifest, _ = await self._revisions.get_manifest(revision.digest)
        return await self._push.run(revision, manifest, target, progress)


async def _ended(task: "asyncio.Task[PushDone | Exception]") -> None:
    await asyncio.wait([task])


def _result(task: "asyncio.Task[PushDone | Exception]") -> PushDone:
    outcome = _draining() if task.cancelled() else task.result()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _draining() -> Draining:
    return Draining("the registry stops; push again when it is back: what arrived is not sent again")
