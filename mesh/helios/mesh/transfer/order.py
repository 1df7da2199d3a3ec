"""What is ordered from a downloader, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from helios.mesh.transfer.gate import Priority
from helios.mesh.transfer.machine import Chunk, RetryPolicy
from helios.mesh.transfer.progress import TransferProgress
from helios.mesh.transfer.source import RangeSource


def _no_check() -> None:
    """Nothing ends the transfer from outside."""


def _no_progress(_: TransferProgress) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How blobs are fetched. A request in flight costs a socket's buffers in memory, not a chunk."""

    chunk_bytes: int = 8 << 20
    """One request. 8 to 16 MiB: far above what is under way during a round trip, and little to fetch again."""
    in_flight: int = 8
    """Requests of one blob at a time. 8 is best on two cores; clouds, with their latency, want 16 to 64."""
    sync_bytes: int = 64 << 20
    """What a crash may cost: so many bytes are written before they are synced and noted."""
    stall_seconds: float = 20.0
    stall_bytes: int = 64 << 10
    """A read that brought fewer bytes in `stall_seconds` is given up and tried again."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is known beforehand."""

    size_bytes: int | None = None
    sha256: str = ""
    """In lower-case hexadecimal. Empty at a first ingest, where the answer's sha256 becomes the identity."""
    part_lengths: tuple[int, ...] = ()
    """How the blob is cut into parts that must be read whole, because the source verifies them. Empty: anyhow."""
    part_hashes: tuple[bytes, ...] = ()
    """The BLAKE3 of each part. A read of the source that ends without an error has compared them, so the engine does
    not hash these bytes for a second time; what an earlier transfer left is compared with them too. Empty: unknown."""


class Guide(Protocol):
    """Has a say in a transfer, for a source that is not equally good everywhere at all times, and learns what came.

    Called by several threads. Everything should be quick: other threads of the transfer wait.
    """

    def begin(self, target: Path, wake: Callable[[], None]) -> None:
        """A try begins, with nothing that counts in its target. `wake` has `choose` be asked anew, at any time."""
        ...

    def choose(self, chunks: Sequence[Chunk]) -> int | None:
        """Which chunk to begin with; see `machine.Choose`. It is asked again within a fifth of a second."""
        ...

    def written(self, chunk: Chunk) -> None:
        """A chunk is in the target; its source, or the part's BLAKE3, vouches for it."""
        ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """One order."""

    source: RangeSource
    target: Path
    """The file. When the transfer fails in a way that a later one can carry on from, it stays, with its journal beside
    it. One transfer a target at a time."""
    wanted: Wanted = Wanted()
    priority: Priority | Callable[[], Priority] = Priority.START
    """A function is asked before chunks are read, by several threads. Should be quick."""
    deadline: float | None = None
    """On the monotonic clock; None: none."""
    check: Callable[[], None] = _no_check
    """Ends the transfer by raising. Called by several threads, with every piece and while they wait."""
    on_progress: Callable[[TransferProgress], None] = _no_progress
    """Called by several threads, one at a time, a few times a second. Should be quick."""
    guide: Guide | None = None
    """None: chunks in order."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """What came."""

    size_bytes: int
    sha256: str
    etag: str
    fetched_bytes: int
    """Bytes that came from the source, those of failed tries included."""
    resumed_bytes: int
    """Bytes of an earlier transfer that were verified and kept."""
