"""Taking artifacts in: a header, then bytes, all or nothing.

What comes is not believed: the manifest says how many bytes follow and what each blob hashes to, and no byte beyond is
read. Blobs are written to a workspace, moved into the blob store and hashed there, and held until their rows are
committed, as an ingest does it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

import structlog

from helios.mesh.errors import DeadlineExceeded, InvalidRequest, Overloaded, QuotaExceeded
from helios.registry import metrics, offload
from helios.registry.artifact_store import ArtifactStore
from helios.registry.artifacts import Artifact, NewArtifact
from helios.registry.catalog import Catalog
from helios.registry.manifest import Digest, Manifest
from helios.registry.settings import ArtifactSettings
from helios.registry.state import StateDirectory

log = structlog.get_logger()

MAX_CHUNK_BYTES: Final = 1 << 20
# What goes first is decided among hours and days; a write for each start of a fleet would be an fsync for nothing.
USE_STEP: Final = timedelta(minutes=1)


class Uploads:
    """Stores and drops artifacts. ``store`` is for reading; every write goes through a method here."""

    def __init__(
        self, catalog: Catalog, store: ArtifactStore, state: StateDirectory, settings: ArtifactSettings
    ) -> None:
        self.store = store
        self._catalog = catalog
        self._state = state
        self._settings = settings
        self._running_count = 0

    async def put(self, new: NewArtifact, chunks: AsyncIterator[bytes]) -> tuple[Artifact, bool]:
        """Stores an artifact unless there is one of its name; returns the one that has it, and whether it is this one.

        Args:
            new: What comes; checked here.
            chunks: The bytes of its blobs, each once, in the order in which the entries first name them. Not read where
                the name is taken.

        Raises:
            InvalidRequest: INVALID_ARTIFACT, also where there are more or fewer bytes than announced.
            RevisionNotFound: It is of no revision that is here.
            DigestMismatch: A blob is not what the manifest says.
            QuotaExceeded: ARTIFACT_TOO_LARGE.
            DiskFull: There is no room.
            Overloaded: TOO_MANY_UPLOADS.
            DeadlineExceeded: It took too long.
        """
        new.check()
        size_bytes = new.manifest.size_bytes
        if size_bytes > min(self._settings.max_bytes, self._settings.quota_bytes):
            raise QuotaExceeded(
                f"an artifact of {size_bytes} bytes is larger than the registry keeps",
                reason="ARTIFACT_TOO_LARGE",
                metadata={"size_bytes": str(size_bytes), "max_bytes": str(self._settings.max_bytes)},
            )
        taken = await self.store.find(new.kind, new.key)
        if taken is not None:
            return taken, False
        await self._catalog.store.get_manifest(new.revision)
        self._catalog.blobs.require_space(size_bytes)
        if self._running_count >= self._settings.max_concurrent:
            raise Overloaded(
                "other artifacts are being uploaded; try again later", reason="TOO_MANY_UPLOADS", retry_after_seconds=10
            )
        self._running_count += 1
        try:
            async with asyncio.timeout(self._settings.upload_seconds):
                stored, is_new = await self._receive(new, chunks)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the artifact was not here after {self._settings.upload_seconds:g} s") from error
        finally:
            self._running_count -= 1
        await self.measure()
        log.info(
            "artifact stored", kind=new.kind, key=new.key, size_bytes=size_bytes, producer=new.producer, is_new=is_new
        )
        return stored, is_new

    async def use(self, kind: str, key: str, used_at: datetime) -> Artifact:
        """Returns an artifact, and notes that it was used. Raises NotFound (ARTIFACT_NOT_FOUND)."""
        found = await self.store.get(kind, key)
        since = used_at - USE_STEP
        if found.used_at >= since:
            return found
        # A fleet that starts asks at once: the first one notes it, the others find that when it is their turn.
        await self._catalog.write(lambda: self.store.note_use(kind, key, used_at=used_at, unless_since=since))
        return replace(found, used_at=used_at)

    async def delete(self, kind: str, key: str, *, digest: str = "") -> int:
        """Removes an artifact, where it has this digest if one is given; returns the bytes freed. Idempotent."""

        async def write() -> tuple[None, Mapping[str, int]]:
            return None, await self.store.delete(kind, key, digest=digest)

        _, freed_bytes = await self._catalog.write_and_collect(write)
        await self.measure()
        return freed_bytes

    async def measure(self) -> None:
        """Shows what artifacts take."""
        metrics.ARTIFACT_BYTES.set(await self.store.used_bytes())

    async def _receive(self, new: NewArtifact, chunks: AsyncIterator[bytes]) -> tuple[Artifact, bool]:
        held: list[str] = []
        try:
            with self._catalog.blobs.hold() as hold, self._state.workspace() as workspace:
                held = hold.hashes
                for digest, path in await _write_blobs(new.manifest, chunks, workspace):
                    await hold.put(path, is_owned=True, expected=digest.hash, on_bytes=lambda _: None)
                stored, is_new = await self._commit(new)
            if not is_new:
                # Another upload was faster.
                await self._catalog.discard(held)
            return stored, is_new
        except BaseException:
            # Also after a commit whose caller went away: what a row refers to stays.
            await offload.uninterrupted(self._catalog.discard(held))
            raise

    async def _commit(self, new: NewArtifact) -> tuple[Artifact, bool]:
        # What is collected is that of artifacts that made room; this upload's own blobs are held.
        stored, _ = await self._catalog.write_and_collect(
            lambda: self.store.put(new, datetime.now(UTC), quota_bytes=self._settings.quota_bytes)
        )
        return stored


async def _write_blobs(manifest: Manifest, chunks: AsyncIterator[bytes], directory: Path) -> list[tuple[Digest, Path]]:
    """Writes each blob to a file of its own.

    Raises:
        InvalidRequest: There are more or fewer bytes than the manifest says.
    """
    written = []
    rest = b""
    for digest in dict.fromkeys(entry.digest for entry in manifest.entries):
        path = directory / digest.hash
        with path.open("xb", buffering=0) as file:
            missing = digest.size_bytes
            while missing:
                rest = rest or await _next(chunks)
                part, rest = rest[:missing], rest[missing:]
                missing -= len(part)
                await offload.run(lambda _, part=part, file=file: _write(file, part))  # type: ignore[misc]
        written.append((digest, path))
    if rest or await anext(chunks, b""):
        raise _wrong_length("more")
    return written


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    chunk = await anext(chunks, None)
    if chunk is None:
        raise _wrong_length("fewer")
    if not 0 < len(chunk) <= MAX_CHUNK_BYTES:
        raise InvalidRequest(f"a piece of an upload has 1 to {MAX_CHUNK_BYTES} bytes", reason="INVALID_ARTIFACT")
    return chunk


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _wrong_length(which: str) -> InvalidRequest:
    return InvalidRequest(f"there are {which} bytes than the manifest says", reason="INVALID_ARTIFACT")
