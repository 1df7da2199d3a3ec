"""One blob on its way to an OCI registry: in chunks, and on from where it broke off.

    begin → send … send → finish
      ↑______ lost ______|

What fails for want of a working server is asked for again: first how far the target is, then what it lacks. A try that
brings the upload further makes up for the failures before it. An upload that the target has lost begins anew; so does
one that ended with another sha256 than it should, once, because only then the store's own blob can be at fault.

A chunk is in memory while it is sent. A target that wants larger ones than that bears gets the blob in one piece, which
is read as it is sent.
"""

import asyncio
import io
from collections.abc import Callable
from contextlib import closing
from typing import BinaryIO, Final

from helios.mesh.errors import DigestMismatch, Unavailable
from helios.registry import offload
from helios.registry.manifest import Digest
from helios.registry.push.journal import PushJournal
from helios.registry.push.target import OciTarget, Unchunked, Upload, UploadLost
from helios.registry.sources.web import MAX_RETRY_AFTER_SECONDS, jitter

# Failures in a row, each after a longer pause, some half a minute in all.
_ATTEMPTS: Final = 6
# A target may forget an upload when it restarts; one that forgets more often has a fault of its own.
_RESTARTS: Final = 3
# The registries that name a least chunk want some MiB; it is their word, so it has a bound.
_MAX_CHUNK_BYTES: Final = 64 << 20


class BlobUpload:
    """Sends one blob. Used once."""

    def __init__(
        self,
        target: OciTarget,
        digest: Digest,
        open_blob: Callable[[], BinaryIO],
        journal: PushJournal,
        *,
        chunk_bytes: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Takes a blob that the target does not have; ``on_bytes`` is told of what was sent, and may be told less."""
        self._target = target
        self._digest = digest
        self._open_blob = open_blob
        self._journal = journal
        self._chunk_bytes = chunk_bytes
        self._on_bytes = on_bytes
        self._told_bytes = 0
        self._is_chunked = digest.size_bytes > chunk_bytes
        self._upload: Upload | None = None
        self._kept_bytes = 0

    async def run(self, mount: str) -> int:
        """Sends what is missing; returns the bytes that were sent, 0 where the target took them from ``mount``.

        Cancel-safe: the next upload of the blob goes on where this one is.

        Raises:
            HeliosError: TARGET_UNAVAILABLE, after some tries; what the target refuses; DIGEST_MISMATCH.
        """
        failures = restarts = 0
        while True:
            before = self._told_bytes
            try:
                return await self._try(mount)
            except Unchunked:
                self._is_chunked = False
            except UploadLost as error:
                restarts += 1
                if restarts > _RESTARTS:
                    raise self._broken(str(error)) from error
                await self._restart()
            except Unavailable as error:
                failures = 1 if self._told_bytes > before else failures + 1
                pause = error.retry_after_seconds
                if failures >= _ATTEMPTS or (pause or 0) > MAX_RETRY_AFTER_SECONDS:
                    raise
                await asyncio.sleep(pause if pause is not None else jitter(failures))
                if await self._target.has(self._digest):
                    # Its last answer was lost.
                    return await self._end()
                if self._upload is not None:
                    await self._look(self._upload.place)

    async def _try(self, mount: str) -> int:
        if self._upload is None and not await self._recall():
            self._upload = await self._target.begin(self._digest, mount)
            if self._upload is None:
                self._tell(self._digest.size_bytes)
                await self._forget()
                return 0
            if self._upload.min_chunk_bytes > max(_MAX_CHUNK_BYTES, self._chunk_bytes):
                self._is_chunked = False
        while self._is_chunked and self._left > 0:
            assert self._upload is not None
            length = min(max(self._chunk_bytes, self._upload.min_chunk_bytes), self._left)
            chunk = await self._read(self._upload.offset, length)
            self._upload = await self._target.send(self._upload, lambda chunk=chunk: io.BytesIO(chunk), length)  # type: ignore[misc]
            await self._note(self._upload.place)
            self._tell(self._upload.offset)
        await self._finish()
        return await self._end()

    async def _finish(self) -> None:
        assert self._upload is not None
        left = self._left
        if left <= self._chunk_bytes:
            rest = await self._read(self._upload.offset, left) if left else b""
            await self._target.finish(self._upload, self._digest, (lambda: io.BytesIO(rest)) if left else None, left)
        else:
            await self._target.finish(self._upload, self._digest, self._stream, left)

    @property
    def _left(self) -> int:
        return self._digest.size_bytes - (self._upload.offset if self._upload is not None else 0)

    async def _recall(self) -> bool:
        """Finds the upload that an earlier push left; returns whether there is one."""
        if not self._is_chunked:
            return False
        place = await offload.run(lambda _: self._journal.recall(self._target.name, self._digest))
        if not place or not await self._look(place):
            return False
        self._kept_bytes = self._told_bytes
        return True

    async def _look(self, place: str) -> bool:
        try:
            self._upload = await self._target.find(place, self._digest)
        except UploadLost:
            await self._restart()
            return False
        self._tell(self._upload.offset)
        return True

    async def _restart(self) -> None:
        self._upload, self._kept_bytes = None, 0
        self._tell(0)
        await self._forget()

    async def _note(self, place: str) -> None:
        await offload.run(lambda _: self._journal.note(self._target.name, self._digest, place))

    async def _forget(self) -> None:
        await offload.run(lambda _: self._journal.forget(self._target.name, self._digest))

    async def _end(self) -> int:
        await self._forget()
        self._tell(self._digest.size_bytes)
        return self._digest.size_bytes - self._kept_bytes

    async def _read(self, offset: int, length: int) -> bytes:
        def read(_: offload.Stop) -> bytes:
            with closing(self._open_blob()) as blob:
                blob.seek(offset)
                return blob.read(length)

        content = await offload.run(read)
        if len(content) != length:
            raise self._broken("the blob is shorter than its name says")
        return content

    def _stream(self) -> BinaryIO:
        """Returns the rest of the blob as a file, which aiohttp reads in threads and closes."""
        assert self._upload is not None
        blob = self._open_blob()
        blob.seek(self._upload.offset)
        return blob

    def _tell(self, done_bytes: int) -> None:
        self._on_bytes(done_bytes - self._told_bytes)
        self._told_bytes = done_bytes

    def _broken(self, detail: str) -> DigestMismatch:
        why = detail or "its upload is lost again and again"
        return DigestMismatch(
            f"the target does not take blob {self._digest} ({why}); if that goes on, add the model again: the blob may"
            " be damaged here",
            metadata={"digest": str(self._digest)},
        )
