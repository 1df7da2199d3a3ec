"""Ingest: from a source to a served revision, all or nothing.

    inspect → (fetch) → (convert) → store → commit      each step can be cancelled; the commit, once begun, is finished

Single flight per model name: a second caller with the same request follows the ingest that runs, one with another
request is refused. An ingest is cancelled when its last follower leaves. Whatever ends it early, its blobs are
discarded unless a revision refers to them, and its workspace is removed; after a crash the next start does the same.
Only what was downloaded stays for a while (``downloads``): the next ingest of it goes on where this one stopped.

The ingester is an async context manager that owns the tasks; leaving it cancels and awaits them.
"""

import asyncio
import dataclasses
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, Self

import structlog

from helios.mesh.errors import (
    Conflict,
    DigestMismatch,
    Draining,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RevisionNotFound,
)
from helios.mesh.tasks import outcome_of
from helios.registry import metrics, offload
from helios.registry.blobs import Hold
from helios.registry.catalog import Catalog
from helios.registry.downloads import Downloads
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import PLAIN
from helios.registry.inspection import inspect_model
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.names import check_aliases, check_name, check_tag
from helios.registry.progress import ProgressLog, news
from helios.registry.records import IngestDone, IngestEvent, IngestPhase, IngestProgress, IngestSpec, Model
from helios.registry.sources.patterns import Selection
from helios.registry.sources.remote_sources import Sources
from helios.registry.sources.source import FileSet, Source
from helios.registry.state import StateDirectory
from helios.registry.store import Guard, NewRevision

log = structlog.get_logger()

# Five times a second: smooth for a progress bar, nothing for the loop.
_REPORT_SECONDS: Final = 0.2
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Ingester:
    """Runs ingests. ``ingest`` is the only call; bounds: one a model name, ``max_concurrent`` in all."""

    def __init__(
        self,
        catalog: Catalog,
        state: StateDirectory,
        sources: Sources,
        downloads: Downloads,
        *,
        max_concurrent: int = 2,
    ) -> None:
        self._catalog = catalog
        self._state = state
        self._sources = sources
        self._downloads = downloads
        self._max_concurrent = max_concurrent
        self._flights: dict[str, _Flight] = {}
        self._group = asyncio.TaskGroup()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Begins to take ingests."""
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancels what runs and waits until it has cleaned up. Followers get Draining."""
        self._is_closing = True
        for flight in self._flights.values():
            flight.cancel()
        await self._group.__aexit__(None, None, None)

    async def ingest(self, spec: IngestSpec, guard: Guard | None = None) -> AsyncGenerator[IngestEvent, None]:
        """Ingests a model; yields progress, and IngestDone last. Closing it early gives the ingest up.

        One whose ``request_id`` was carried out before does nothing: it yields the model as it is now.

        Args:
            spec: What to ingest.
            guard: What must hold at the commit; None: nothing. Its HeliosError is raised otherwise.

        Raises:
            InvalidRequest: INVALID_MODEL_NAME, INVALID_SOURCE, UNSUPPORTED_FORMAT.
            AlreadyExists: ALIAS_TAKEN.
            Conflict: INGEST_RUNNING, another source is being ingested under this name; SOURCE_CHANGED.
            DigestMismatch: The file is not the expected one.
            DiskFull: There is no room.
            Overloaded: Too many ingests run.
        """
        flight = await self._join(check_spec(spec), guard)
        flight.follower_count += 1
        try:
            seen: tuple[IngestProgress, ...] = ()
            while True:
                is_done = await flight.wait(_REPORT_SECONDS)
                now = flight.progress.snapshot()
                for progress in news(seen, now):
                    yield progress
                seen = now
                if is_done:
                    yield flight.result()
                    return
        finally:
            flight.follower_count -= 1
            if not flight.follower_count:
                flight.cancel()
                # The caller's next request must not meet what is left of this one.
                await offload.uninterrupted(flight.settle())

    async def _join(self, spec: IngestSpec, guard: Guard | None) -> "_Flight":
        while (flight := self._flights.get(spec.name)) is not None and flight.is_cancelled:
            await flight.settle()
        if self._is_closing:
            raise _draining()
        if flight is not None:
            if flight.asked != (spec, spec.mutation.expected_version, guard):
                raise Conflict(
                    f"another ingest of {spec.name!r} is running, from {flight.spec.source}; wait for it or cancel it",
                    reason="INGEST_RUNNING",
                    metadata={"model": spec.name},
                )
            return flight
        if len(self._flights) >= self._max_concurrent:
            raise Overloaded(
                f"{len(self._flights)} ingests are running, which is the limit; try again when one is done",
                reason="TOO_MANY_INGESTS",
                retry_after_seconds=10,
            )
        flight = self._flights[spec.name] = _Flight(spec, guard)
        flight.task = self._group.create_task(self._fly(flight), name=f"ingest {spec.name}")
        # A callback, not the task's own end: a task that is cancelled before its first step never runs at all.
        flight.task.add_done_callback(partial(self._land, flight))
        return flight

    async def _fly(self, flight: "_Flight") -> IngestDone | Exception:
        """Runs one ingest. What it raises goes to its followers, not to the task group, which would end the others."""
        ingest = _Ingest(flight, self._catalog, self._state, self._sources, self._downloads)
        with metrics.INGESTS_RUNNING.track_inprogress():
            return await outcome_of(ingest.run())

    def _land(self, flight: "_Flight", task: "asyncio.Task[IngestDone | Exception]") -> None:
        del self._flights[flight.spec.name]
        flight.finish(_draining() if task.cancelled() else task.result())
        _record(flight)


class _Flight:
    """One running ingest and those who follow it."""

    def __init__(self, spec: IngestSpec, guard: Guard | None) -> None:
        self.spec = spec
        self.guard = guard
        # Who asks for the same follows it.
        self.asked = (spec, spec.mutation.expected_version, guard)
        self.progress = ProgressLog()
        self.follower_count = 0
        self.is_cancelled = False
        self.task: asyncio.Task[IngestDone | Exception] | None = None
        self.outcome: IngestDone | Exception | None = None
        self.started = time.monotonic()
        self._finished = asyncio.Event()

    def cancel(self) -> None:
        if self.task is not None and self.outcome is None:
            self.is_cancelled = True
            self.task.cancel()

    def finish(self, outcome: IngestDone | Exception) -> None:
        self.outcome = outcome
        self._finished.set()

    async def wait(self, timeout_seconds: float) -> bool:
        """Waits for the end for a while; returns whether it has come."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._finished.wait()
        except TimeoutError:
            return False
        return True

    async def settle(self) -> None:
        """Waits for the end."""
        await self._finished.wait()

    def result(self) -> IngestDone:
        assert self.outcome is not None
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class _Ingest:
    """The steps of one ingest."""

    def __init__(
        self, flight: _Flight, catalog: Catalog, state: StateDirectory, sources: Sources, downloads: Downloads
    ) -> None:
        self._spec = flight.spec
        self._guard = flight.guard
        self._progress = flight.progress
        self._catalog = catalog
        self._state = state
        self._sources = sources
        self._downloads = downloads

    async def run(self) -> IngestDone:
        """Runs all steps; on failure nothing is left."""
        self._progress.begin(IngestPhase.INSPECT)
        known = await self._catalog.store.find_put(self._spec.name, _asked(self._spec), self._spec.mutation)
        if known is not None:
            return IngestDone(known, 0)
        await self._catalog.store.check_names(self._spec.name, self._spec.aliases)
        held: list[str] = []
        try:
            with ExitStack() as stack:
                hold = stack.enter_context(self._catalog.blobs.hold())
                held = hold.hashes
                fetcher = stack.enter_context(self._downloads.session(hold))
                source = await self._sources.open(self._spec, await self._engine_settings(), fetcher)
                workspace = stack.enter_context(self._state.workspace())
                converted_from = await source.fingerprint(self._spec.expected_sha256, self._progress)
                revision, new_bytes = await self._find_known(source, converted_from, hold), 0
                if revision is None:
                    files = await source.files(workspace, self._progress)
                    for name, why in files.ignored:
                        log.info("file left out", model=self._spec.name, file=name, why=why)
                    manifest, new_bytes = await self._store(files, hold)
                    revision = await self._describe(manifest, source, converted_from)
                if not source.is_file:
                    self._check_expected(revision.manifest.digest())
                done = IngestDone(await self._commit(revision), new_bytes)
                await offload.run(lambda _: fetcher.remove())
                return done
        except BaseException:
            # Also after a commit that failed, or one whose caller went away: what a revision refers to stays.
            await offload.uninterrupted(self._catalog.discard(held))
            raise

    def _check_expected(self, digest: str) -> None:
        """Raises DigestMismatch where another revision was expected of a source of several files."""
        expected = self._spec.expected_sha256
        if expected and digest != f"sha256:{expected}":
            raise DigestMismatch(
                f"{self._spec.source} is revision {digest}, expected sha256:{expected}",
                metadata={"expected": f"sha256:{expected}", "found": digest},
            )

    async def _engine_settings(self) -> EngineSettings | None:
        """Returns the settings that the model will have; None where nobody has said any."""
        if self._spec.engine_settings is not None:
            return self._spec.engine_settings
        try:
            return (await self._catalog.store.get_model(self._spec.name)).engine_settings
        except ModelNotFound:
            return None

    async def _find_known(
        self, source: Source, converted_from: tuple[str, str] | None, hold: Hold
    ) -> NewRevision | None:
        """Returns the revision that the same file was converted to before, its blobs held, if it is still whole."""
        if converted_from is None:
            return None
        digest = await self._catalog.store.find_conversion(*converted_from)
        if digest is None:
            return None
        try:
            manifest, revision = await self._catalog.store.get_manifest(digest)
        except RevisionNotFound:
            # Its model was deleted meanwhile.
            return None
        if not await hold.take([entry.digest for entry in manifest.entries]):
            return None
        return NewRevision(manifest, revision.profile, source.origin, converted_from)

    async def _store(self, files: FileSet, hold: Hold) -> tuple[Manifest, int]:
        if not files.is_owned:
            await self._catalog.blobs.require_space_for([file.size_bytes for file in files.files])
        self._progress.begin(IngestPhase.STORE, files.new_bytes)
        entries: list[Entry] = []
        new_bytes = 0
        # Files of the same content may be one at their place, which is moved when it is stored.
        digests: dict[Path, Digest] = {}
        for file in files.files:
            digest = file.known or digests.get(file.location)
            if digest is None:
                stored = await hold.put(
                    file.location, is_owned=files.is_owned, expected=file.sha256, on_bytes=self._progress.advance
                )
                digest = digests[file.location] = stored.digest
                new_bytes += stored.new_bytes
            entries.append(Entry(file.path, digest, file.media_type))
        return Manifest.of(entries), new_bytes

    async def _describe(
        self, manifest: Manifest, source: Source, converted_from: tuple[str, str] | None
    ) -> NewRevision:
        blobs = self._catalog.blobs
        files = {entry.path: blobs.file(entry.digest.hash) for entry in manifest.entries}
        profile = await offload.run(lambda _: inspect_model(files))
        return NewRevision(manifest, profile, source.origin, converted_from)

    async def _commit(self, revision: NewRevision) -> Model:
        self._progress.begin(IngestPhase.COMMIT)
        spec = self._spec
        revision = dataclasses.replace(
            revision,
            engine_settings=spec.engine_settings,
            tags=spec.tags,
            is_served=not spec.keep_served,
            asked=_asked(spec),
            guard=self._guard,
        )
        return await self._catalog.put_model(spec.name, spec.aliases, revision, spec.mutation)


def check_spec(spec: IngestSpec) -> IngestSpec:
    """Returns a request in its normal form. Raises InvalidRequest."""
    check_name(spec.name)
    spec.mutation.check()
    expected = spec.expected_sha256.lower().removeprefix("sha256:")
    if expected and not _SHA256.fullmatch(expected):
        raise InvalidRequest(
            "a sha256 is 64 hexadecimal digits", reason="INVALID_DIGEST", metadata={"param": "expected_sha256"}
        )
    if spec.engine_settings is not None:
        spec.engine_settings.check()
    Selection(spec.include, spec.exclude).check()
    aliases = check_aliases(spec.name, spec.aliases)
    tags = tuple(sorted({check_tag(tag, param="tags") for tag in spec.tags}))
    return dataclasses.replace(spec, aliases=aliases, expected_sha256=expected, tags=tags)


def _asked(spec: IngestSpec) -> str:
    """Returns what an ingest is asked for, whoever asks and whatever comes of it."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(spec, mutation=PLAIN)), sort_keys=True)


def _draining() -> Draining:
    return Draining("the registry stops; ingest again when it is back")


def _record(flight: _Flight) -> None:
    outcome = flight.outcome
    seconds = time.monotonic() - flight.started
    if isinstance(outcome, IngestDone):
        metrics.INGESTS.labels("done").inc()
        metrics.INGEST_SECONDS.observe(seconds)
        metrics.NEW_BYTES.inc(outcome.new_bytes)
        log.info(
            "model ingested",
            model=flight.spec.name,
            source=flight.spec.source,
            revision=outcome.model.revision.digest,
            new_bytes=outcome.new_bytes,
            duration_seconds=round(seconds, 3),
        )
        return
    reason = outcome.reason if isinstance(outcome, HeliosError) else "INTERNAL"
    metrics.INGESTS.labels(reason).inc()
    log.warning("ingest failed", model=flight.spec.name, reason=reason, error=str(outcome))
