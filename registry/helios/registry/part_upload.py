"""Uploads in parts that go on where a crash ended them.

    begin → put_part … → complete         an object appears with `complete`, whole, and not before

The file is read once, in order: each part is hashed, and sent unless the journal says that the store has it with that
hash; the whole is hashed beside it, and the upload is completed only if the sha256 is the blob's. Parts travel with a
checksum that the store verifies (`PartStore.put_part`), so what is completed is the file.

Memory: ``concurrency`` times ``part_bytes``.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from helios.mesh.errors import Unavailable
from helios.registry import offload
from helios.registry.hashing import OnBytes, changed
from helios.registry.manifest import Digest
from helios.registry.upload_journal import JournalFile, Part, Upload, UploadJournal

# S3's and GCS's bound; Azure's is 50,000.
MAX_PARTS: Final = 10_000
_MIB: Final = 1 << 20


class UploadGone(Unavailable):
    """The store knows the upload no more: it was completed, swept, or expired."""

    default_reason = "UPLOAD_GONE"


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """How a blob is sent: parts of this size (larger where there would be too many), so many at once."""

    part_bytes: int
    concurrency: int

    def part_bytes_of(self, size_bytes: int) -> int:
        """Returns the size of the parts of a blob: whole MiB where it has to be more than usual."""
        least = -(-size_bytes // MAX_PARTS)
        return max(self.part_bytes, -(-least // _MIB) * _MIB if least > self.part_bytes else 0)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that the store knows and that is not complete."""

    key: str
    upload: str
    began_at: datetime


class PartStore(Protocol):
    """Uploads in parts, as a store has them. Blocking, thread-safe; retries by itself what may be retried.

    Every method raises Unavailable (BLOB_STORE_UNAVAILABLE, BLOB_STORE_DENIED), and UploadGone where it names an
    upload.
    """

    def begin(self, key: str) -> str:
        """Begins an upload; returns the store's name for it. Nothing is seen under the key."""
        ...

    def put_part(self, upload: Upload, number: int, data: bytes, sha256: str) -> str:
        """Sends a part, from 1 on, with a checksum that the store verifies; returns its tag. Idempotent."""
        ...

    def complete(self, upload: Upload, tags: Mapping[int, str]) -> None:
        """Makes an object of the parts, in the order of their numbers, unless there is one: then that stays."""
        ...

    def abort(self, upload: Upload) -> None:
        """Drops an upload and its parts. Idempotent."""
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """Yields what was begun and is not complete, as far as the store can tell."""
        ...

    def close(self) -> None:
        """Closes connections; nothing is asked of it afterwards."""
        ...


class PartUploader:
    """Uploads blobs to one store in parts. Thread-safe; one upload of a blob at a time."""

    def __init__(self, store_url: str, parts: PartStore, journal: UploadJournal, limits: UploadLimits) -> None:
        self._store_url = store_url
        self._parts = parts
        self._journal = journal
        self._limits = limits
        self._idle = threading.Condition()
        self._running: set[str] = set()

    def upload(self, source: Path, digest: Digest, key: str, on_bytes: OnBytes, stop: offload.Stop) -> None:
        """Uploads a file under a key, from where an earlier try ended.

        Raises:
            Conflict: SOURCE_CHANGED, the file is not what it was; the upload is dropped.
            UploadGone: Somebody else has completed or dropped the upload; the next try begins anew.
            Unavailable: What was sent is kept for the next try.
        """
        with self._idle:
            # A blob has one journal.
            self._idle.wait_for(lambda: digest.hash not in self._running)
            self._running.add(digest.hash)
        try:
            with self._journal.open(digest.hash) as journal:
                upload = self._resume(digest, key) or self._begin(digest, key, journal)
                self._send(upload, journal, source, digest, _Progress(on_bytes, stop))
        finally:
            with self._idle:
                self._running.discard(digest.hash)
                self._idle.notify_all()

    def close(self) -> None:
        """Closes connections."""
        self._parts.close()

    def sweep(self, *, before: datetime, is_dry_run: bool) -> int:
        """Drops uploads that nobody has worked on since this moment; returns how many."""
        with self._idle:
            running = frozenset(self._running)
        stale = [(value, upload) for value, upload in self._journal.stale(before=before) if value not in running]
        known = self._journal.uploads()
        stray = [each for each in self._parts.unfinished() if each.began_at < before and each.upload not in known]
        if not is_dry_run:
            for hash_, upload in stale:
                if upload is not None and upload.store == self._store_url:
                    self._parts.abort(upload)
                self._journal.remove(hash_)
            for each in stray:
                self._parts.abort(Upload(self._store_url, each.key, each.upload, 0))
        return len(stale) + len(stray)

    def _begin(self, digest: Digest, key: str, journal: JournalFile) -> Upload:
        part_bytes = self._limits.part_bytes_of(digest.size_bytes)
        upload = Upload(self._store_url, key, self._parts.begin(key), part_bytes)
        journal.begin(upload)
        return upload

    def _send(self, upload: Upload, journal: JournalFile, source: Path, digest: Digest, progress: "_Progress") -> None:
        try:
            sender = _Sender(self._parts, upload, journal, progress.on_bytes, self._limits.concurrency)
            if sender.send(source, progress.stop) != digest:
                self._parts.abort(upload)
                journal.remove()
                raise changed(source)
            # Whoever asked to stop while the last parts were on their way gets no object.
            progress.stop.check()
            self._parts.complete(upload, sender.tags)
        except UploadGone:
            journal.remove()
            raise
        journal.remove()

    def _resume(self, digest: Digest, key: str) -> Upload | None:
        known = self._journal.read(digest.hash)
        if known is None or (known.store, known.key) != (self._store_url, key):
            return None
        # With other settings a journal's parts are as good as any; but not if there would be too many of them.
        return known if -(-digest.size_bytes // known.part_bytes) <= MAX_PARTS else None


@dataclass(frozen=True, slots=True)
class _Progress:
    on_bytes: OnBytes
    stop: offload.Stop


class _Sender:
    """Sends the parts of one upload, several at once."""

    def __init__(
        self, parts: PartStore, upload: Upload, journal: JournalFile, on_bytes: OnBytes, concurrency: int
    ) -> None:
        self._parts = parts
        self._upload = upload
        self._journal = journal
        self._on_bytes = on_bytes
        self._concurrency = concurrency
        self.tags: dict[int, str] = {}

    def send(self, source: Path, stop: offload.Stop) -> Digest:
        """Sends what the store does not have; returns the digest of all that was read."""
        hasher, size = hashlib.sha256(), 0
        slots = threading.Semaphore(self._concurrency)
        sending: list[Future[None]] = []
        # Leaving the block waits for what is being sent: nothing of it runs on when this returns.
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="upload") as pool, source.open("rb") as file:
            number = 0
            while data := file.read(self._upload.part_bytes):
                stop.check()
                hasher.update(data)
                size += len(data)
                number += 1
                slots.acquire()
                if any(each.done() and each.exception() for each in sending):
                    break
                future = pool.submit(self._send, number, data)
                future.add_done_callback(lambda _: slots.release())
                sending.append(future)
        for each in sending:
            each.result()
        return Digest(hasher.hexdigest(), size)

    def _send(self, number: int, data: bytes) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        known = self._upload.parts.get(number)
        if known is not None and known.sha256 == sha256:
            self.tags[number] = known.tag
        else:
            self.tags[number] = self._parts.put_part(self._upload, number, data, sha256)
            self._journal.note(number, Part(sha256, self.tags[number]))
        self._on_bytes(len(data))
