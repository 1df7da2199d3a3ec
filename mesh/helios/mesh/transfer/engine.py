"""Fetching one blob: describe it, look at what an earlier try left, run, and never mix two states of a source.

The result is a file that is complete, synced, and has the sha256 that was asked for; the caller gives it its name.
"""

import random
import time
from contextlib import ExitStack, closing

import structlog
from blake3 import blake3

from helios.mesh.errors import DeadlineExceeded, DigestMismatch, Unavailable
from helios.mesh.transfer.disk import PartFile
from helios.mesh.transfer.gate import DownloadGate
from helios.mesh.transfer.journal import Journal, JournalHeader, discard, journal_path
from helios.mesh.transfer.machine import Chunk, TransferMachine, aligned_chunks, parts_of_chunks, uniform_chunks
from helios.mesh.transfer.order import Transfer, TransferOptions, Transferred, Wanted
from helios.mesh.transfer.progress import ProgressTeller
from helios.mesh.transfer.run import Run
from helios.mesh.transfer.source import SourceChanged, SourceState

log = structlog.get_logger()

_MAX_RESTARTS = 3
"""A source whose bytes change more often than this while they are read is being written to."""

_WINDOW_FACTOR = 4
"""Chunks that may be begun ahead of the first missing one, as a multiple of those in flight: one slow chunk does not
stop the others, and what waits to be hashed is still in memory."""

_POLL_SECONDS = 0.2


class Downloader:
    """Fetches blobs. Thread-safe; one a process, because its gate is what transfers share."""

    def __init__(self, options: TransferOptions | None = None, gate: DownloadGate | None = None) -> None:
        self._options = options or TransferOptions()
        self._gate = gate or DownloadGate()

    def fetch(self, transfer: Transfer) -> Transferred:
        """Fetches a blob into the transfer's target. Blocks.

        Raises:
            DigestMismatch: The source has other bytes than what is wanted; nothing of them is left.
            DeadlineExceeded: The transfer's deadline is over.
            Unavailable: SOURCE_UNAVAILABLE, SOURCE_CHANGED or SOURCE_FAULT, after all tries.
            HeliosError: What the source raised for good.
            OSError: The target can't be written.
        """
        try:
            return self._fetch(transfer)
        finally:
            transfer.source.close()

    def _fetch(self, transfer: Transfer) -> Transferred:
        wanted = transfer.wanted
        if (whole := _take_whole(transfer)) is not None:
            return whole
        for _ in range(1 + _MAX_RESTARTS):
            try:
                result = self._try(transfer)
            except SourceChanged:
                discard(transfer.target)
                log.info("source changed, transfer begins anew", target=transfer.target.name)
                continue
            if wanted.sha256 in ("", result.sha256):
                journal_path(transfer.target).unlink(missing_ok=True)
                return result
            discard(transfer.target)
            if not result.resumed_bytes:
                raise _mismatch(wanted, result.size_bytes, result.sha256)
            # Where a source has no ETag, only this tells that its bytes changed since the earlier transfer.
            log.info("resumed bytes are of another state, transfer begins anew", target=transfer.target.name)
        raise SourceChanged("the source changes faster than it can be read")

    def _try(self, transfer: Transfer) -> Transferred:
        state = self._describe(transfer)
        wanted = transfer.wanted
        if wanted.size_bytes not in (None, state.size_bytes):
            discard(transfer.target)
            raise _mismatch(wanted, state.size_bytes, "unknown")
        options = self._options
        chunks = _cut(state, wanted.part_lengths, options.chunk_bytes)
        header = JournalHeader(state.size_bytes, wanted.sha256, state.etag, grid=_name_of(chunks))
        with ExitStack() as stack:
            journal, claims = Journal.open(transfer.target, header)
            stack.enter_context(closing(journal))
            file = stack.enter_context(PartFile(transfer.target, state.size_bytes))
            flow = stack.enter_context(self._gate.flow(transfer.priority))
            machine = TransferMachine(
                chunks, claims, policy=options.retry, window_count=_WINDOW_FACTOR * options.in_flight
            )
            run = Run(
                transfer,
                state,
                machine,
                options=options,
                file=file,
                journal=journal,
                admit=lambda count, check: self._gate.admit(flow, count, check),
                parts=parts_of_chunks(chunks, wanted.part_lengths, wanted.part_hashes) if wanted.part_hashes else (),
            )
            sha256 = run.execute()
        return Transferred(state.size_bytes, sha256, state.etag, run.fetched_bytes, run.resumed_bytes)

    def _describe(self, transfer: Transfer) -> SourceState:
        attempt = 0
        while True:
            attempt += 1
            try:
                return transfer.source.describe()
            except (Unavailable, DeadlineExceeded) as error:
                jitter = random.random()  # noqa: S311 - spreads retries, hides nothing
                pause = self._options.retry.delay_seconds(attempt, jitter, error.retry_after_seconds)
                if pause is None:
                    raise
            _sleep(pause, transfer)


def _take_whole(transfer: Transfer) -> Transferred | None:
    """What an earlier transfer completed before its process died: it has no journal any more. Verified anew: that there
    is none proves nothing after a power failure.
    """
    target, wanted = transfer.target, transfer.wanted
    if not wanted.sha256 or journal_path(target).exists() or not target.exists():
        return None
    size_bytes = target.stat().st_size
    if wanted.size_bytes not in (None, size_bytes):
        return None
    teller = ProgressTeller(transfer.on_progress, size_bytes, time.monotonic())

    def on_hashed(count: int) -> None:
        transfer.check()
        teller.observe(time.monotonic(), count, is_told=count == size_bytes)

    with PartFile(target, size_bytes) as file:
        sha256 = file.sha256(size_bytes, on_hashed)
        if sha256 == wanted.sha256:
            file.sync()
            return Transferred(size_bytes, sha256, etag="", fetched_bytes=0, resumed_bytes=size_bytes)
    return None


def _cut(state: SourceState, part_lengths: tuple[int, ...], chunk_bytes: int) -> list[Chunk]:
    if not state.is_ranged:
        return uniform_chunks(state.size_bytes, max(1, state.size_bytes))
    if part_lengths:
        return aligned_chunks(part_lengths, chunk_bytes)
    return uniform_chunks(state.size_bytes, chunk_bytes)


def _name_of(chunks: list[Chunk]) -> str:
    """The same for the same cuts: a journal counts chunks by their place among them."""
    return blake3(",".join(str(chunk.length) for chunk in chunks).encode()).hexdigest()


def _sleep(seconds: float, transfer: Transfer) -> None:
    until = time.monotonic() + seconds
    if transfer.deadline is not None and until >= transfer.deadline:
        raise DeadlineExceeded("the source did not answer before the deadline")
    while (left := until - time.monotonic()) > 0:
        transfer.check()
        time.sleep(min(_POLL_SECONDS, left))


def _mismatch(wanted: Wanted, actual_bytes: int, actual_sha256: str) -> DigestMismatch:
    return DigestMismatch(
        "the source has other bytes than what was wanted",
        metadata={
            "digest": f"sha256:{wanted.sha256}",
            "actual": f"sha256:{actual_sha256}",
            "size_bytes": str(wanted.size_bytes),
            "actual_bytes": str(actual_bytes),
        },
    )
