"""One try of one transfer, with its threads.

    workers (in_flight of them)   gate ─▶ read a range ─▶ BLAKE3 (or an index has it) and pwrite, by pieces ─▶ written
    hashing thread                follows the contiguous frontier: sha256 of what is in the page cache
    syncing thread                each `sync_bytes`: fsync, then the journal gains the chunks that this covered

The first thread that fails ends all others; what was written by then is synced and noted all the same.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

from blake3 import blake3

from helios.mesh.errors import DeadlineExceeded, HeliosError, Unavailable
from helios.mesh.transfer.disk import PartFile
from helios.mesh.transfer.journal import Journal
from helios.mesh.transfer.machine import Chunk, Fetch, Finished, Part, TransferMachine, Verify, Wait
from helios.mesh.transfer.order import Transfer, TransferOptions
from helios.mesh.transfer.progress import ProgressTeller, StallWatch
from helios.mesh.transfer.source import ChunkMismatch, Interrupted, SourceChanged, SourceFault, SourceState

T = TypeVar("T")

_POLL_SECONDS = 0.2
"""How late a thread that waits may notice that the transfer was cancelled."""

_HASH_BYTES = 1 << 20
"""1 MiB: fits a core's cache, so that what is copied out of the page cache is hashed there."""

Admit = Callable[[int, Callable[[], None]], AbstractContextManager[None]]
"""Waits for room for so many bytes; the callable ends the wait by raising."""


class Run:
    """Fetches what is missing of one blob. Used once."""

    def __init__(
        self,
        transfer: Transfer,
        state: SourceState,
        machine: TransferMachine,
        *,
        options: TransferOptions,
        file: PartFile,
        journal: Journal,
        admit: Admit,
        parts: Sequence[tuple[Part, ...]] = (),
    ) -> None:
        """`parts`: what each chunk's bytes are known to be; empty where nobody knows."""
        self._transfer = transfer
        self._state = state
        self._machine = machine
        self._options = options
        self._file = file
        self._journal = journal
        self._admit = admit
        self._parts = parts
        # Guards the machine and all below.
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._unsynced: dict[int, bytes] = {}
        self._unsynced_bytes = 0
        self._done_bytes = 0
        self._teller = ProgressTeller(transfer.on_progress, state.size_bytes, time.monotonic())
        self.fetched_bytes = 0
        self.resumed_bytes = 0

    def execute(self) -> str:
        """Returns the sha256 of the whole, which is on the disk then.

        Raises:
            HeliosError, OSError: As `Downloader.fetch`; or what the transfer's `check` raised.
        """
        worker_count = min(self._options.in_flight, self._machine.chunk_count)
        if self._transfer.guide is not None:
            self._transfer.guide.begin(self._transfer.target, self._wake)
        if self._machine.chunk_count <= 1:
            # Most files are small, and need no threads.
            self._work()
            sha256 = self._hash()
            self._sync()
        else:
            with ThreadPoolExecutor(worker_count + 2, thread_name_prefix="transfer") as pool:
                hashing = pool.submit(self._guarded, self._hash)
                pool.submit(self._guarded, self._sync)
                for _ in range(worker_count):
                    pool.submit(self._guarded, self._work)
            if self._error is not None:
                raise self._error
            sha256 = hashing.result()
        self._teller.observe(time.monotonic(), self._done_bytes, is_told=True)
        return sha256

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except BaseException as error:
            with self._changed:
                is_first = self._error is None
                self._error = self._error or error
                self._changed.notify_all()
            if is_first:
                self._transfer.source.close()
            raise

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, Verify):
                self._verify(job)
            else:
                self._fetch(job.chunk)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next(self) -> Fetch | Verify | None:
        choose = self._transfer.guide.choose if self._transfer.guide is not None else None
        with self._changed:
            while True:
                self._check()
                job = self._machine.next_job(time.monotonic(), choose)
                match job:
                    case Finished():
                        return None
                    case Wait(seconds):
                        self._changed.wait(_POLL_SECONDS if seconds is None else min(_POLL_SECONDS, seconds))
                    case _:
                        return job

    def _verify(self, job: Verify) -> None:
        chunk = job.chunk
        # What an index says is worth more than what a journal says of the same bytes.
        parts = self._parts[chunk.index] if self._parts else (Part(chunk.offset, chunk.length, job.blake3),)
        is_true = all(self._file.blake3(part.offset, part.length) == part.blake3 for part in parts)
        with self._changed:
            if is_true:
                self._machine.written(chunk.index)
                self.resumed_bytes += chunk.length
                self._teller.found(chunk.length)
                self._done_bytes += chunk.length
            else:
                self._machine.refuted(chunk.index)
            self._changed.notify_all()
        if is_true:
            self._tell_written(chunk)

    def _fetch(self, chunk: Chunk) -> None:
        with self._admit(chunk.length, self._check):
            writer = _ChunkWriter(self._file, chunk, self._options, self._arrived, is_hashed=not self._parts)
            error = self._read(writer)
        if error is not None:
            with self._changed:
                self._done_bytes -= writer.count
                is_tried_again = self._machine.failed(
                    chunk.index,
                    time.monotonic(),
                    jitter=random.random(),  # noqa: S311 - spreads retries, hides nothing
                    retry_after_seconds=error.retry_after_seconds,
                )
                self._changed.notify_all()
            if not is_tried_again:
                raise error
            return
        self._file.start_writeback(chunk.offset, chunk.length)
        claim = _claim_of(self._parts[chunk.index]) if self._parts else writer.blake3()
        with self._changed:
            self._machine.written(chunk.index)
            self._unsynced[chunk.index] = claim
            self._unsynced_bytes += chunk.length
            self._changed.notify_all()
        self._tell_written(chunk)

    def _tell_written(self, chunk: Chunk) -> None:
        if self._transfer.guide is not None:
            self._transfer.guide.written(chunk)

    def _read(self, writer: "_ChunkWriter") -> HeliosError | None:
        """Reads a chunk; returns the error where another try may help."""
        chunk = writer.chunk
        try:
            self._transfer.source.read(self._state, chunk.offset, chunk.length, writer.take)
            writer.finish()
        except Interrupted as interrupted:
            cause = interrupted.__cause__
            assert cause is not None, "the writer says why it interrupts"
            if isinstance(cause, SourceFault):
                return cause
            raise cause from None
        except SourceChanged:
            raise
        except (Unavailable, DeadlineExceeded, ChunkMismatch) as error:
            return error
        return None

    def _arrived(self, count: int) -> None:
        """Notes bytes that came; raises when they are not wanted any more."""
        self._check()
        now = time.monotonic()
        with self._changed:
            self._done_bytes += count
            self.fetched_bytes += count
            self._teller.observe(now, self._done_bytes)

    def _check(self) -> None:
        if self._error is not None:
            raise _StoppedError from self._error
        self._transfer.check()
        deadline = self._transfer.deadline
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded("the blob was not fetched before the deadline")

    def _hash(self) -> str:
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASH_BYTES, max(1, self._state.size_bytes))))
        offset = 0
        while offset < self._state.size_bytes:
            with self._changed:
                while (frontier := self._machine.frontier_bytes) <= offset:
                    self._check()
                    self._changed.wait(_POLL_SECONDS)
            while offset < frontier:
                self._check()
                count = self._file.read_into(offset, buffer[: frontier - offset])
                if count == 0:
                    raise OSError(f"the file ended at {offset} while it was written")
                sha256.update(buffer[:count])
                offset += count
        return sha256.hexdigest()

    def _sync(self) -> None:
        """Syncs and notes what is written, again and again; also when the transfer fails, for the next one."""
        while True:
            with self._changed:
                while not (is_last := self._machine.is_finished or self._error is not None):
                    if self._unsynced_bytes >= self._options.sync_bytes:
                        break
                    self._changed.wait(_POLL_SECONDS)
                claims, self._unsynced, self._unsynced_bytes = self._unsynced, {}, 0
            self._file.sync()
            if not self._machine.is_finished:
                self._journal.append(claims)
            if is_last:
                return


class _StoppedError(Exception):
    """Another thread of the transfer failed first; `__cause__` is why."""


def _claim_of(parts: tuple[Part, ...]) -> bytes:
    """What a journal notes of a chunk whose parts are known: that it was written. Its bytes are looked at all the same,
    and compared with the parts, not with this.
    """
    return blake3(b"".join(part.blake3 for part in parts)).digest()


class _ChunkWriter:
    """Takes the pieces of one chunk. Used by one thread."""

    def __init__(
        self,
        file: PartFile,
        chunk: Chunk,
        options: TransferOptions,
        on_bytes: Callable[[int], None],
        *,
        is_hashed: bool,
    ) -> None:
        """`is_hashed` False: the source has compared the bytes, and nobody asks for their BLAKE3."""
        self.chunk = chunk
        self.count = 0
        self._file = file
        self._on_bytes = on_bytes
        self._hasher = blake3() if is_hashed else None
        self._watch = StallWatch(
            time.monotonic(), interval_seconds=options.stall_seconds, min_bytes=options.stall_bytes
        )

    def take(self, piece: memoryview) -> None:
        """A `Sink`."""
        try:
            self._take(piece)
        except BaseException as error:
            raise Interrupted from error

    def finish(self) -> None:
        """Looks whether all came.

        Raises:
            SourceFault: Fewer bytes than were asked for.
        """
        if self.count != self.chunk.length:
            raise SourceFault(
                f"the source sent {self.count} of {self.chunk.length} bytes",
                metadata={"offset": str(self.chunk.offset)},
            )

    def blake3(self) -> bytes:
        """Of what came."""
        assert self._hasher is not None, "only what is hashed has a hash"
        return self._hasher.digest()

    def _take(self, piece: memoryview) -> None:
        if self.count + len(piece) > self.chunk.length:
            raise SourceFault("the source sent more bytes than were asked for")
        if self._watch.is_stalled(time.monotonic(), len(piece)):
            raise SourceFault("the source sends too slowly")
        self._on_bytes(len(piece))
        if self._hasher is not None:
            self._hasher.update(piece)
        self._file.write(self.chunk.offset + self.count, piece)
        self.count += len(piece)
