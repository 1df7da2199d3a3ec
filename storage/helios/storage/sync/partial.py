"""Unfinished blobs that other nodes may read from already, as far as they are here and verified.

Fetching threads say what came, the event loop reads it for peers. A blob is here from the beginning of its fetch until
its file has its final name; then the tier has it.
"""

import asyncio
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from helios.mesh.transfer.spans import Spans


@dataclass(slots=True)
class _Partial:
    path: Path
    version: int
    spans: Spans = field(default_factory=Spans)


class PartialBlobs:
    """What is here of unfinished blobs, by sha256. Thread-safe, but for `wait`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partials: dict[str, _Partial] = {}
        # Grows with each change of any blob, and begins elsewhere in each process: a version never means two states.
        self._version = time.monotonic_ns()
        self._waiting: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, hash_: str, path: Path) -> None:
        """A fetch begins, or begins anew: nothing of it is here."""
        with self._lock:
            self._version += 1
            self._partials[hash_] = _Partial(path, self._version)
        self._wake()

    def add(self, hash_: str, start: int, end: int) -> None:
        """A part is here and verified."""
        with self._lock:
            self._version += 1
            if (partial := self._partials.get(hash_)) is not None:
                partial.spans.add(start, end)
                partial.version = self._version
        self._wake()

    def end(self, hash_: str) -> None:
        """The fetch has ended. Idempotent."""
        with self._lock:
            self._partials.pop(hash_, None)
        self._wake()

    def state(self, hash_: str) -> tuple[int, list[tuple[int, int]]] | None:
        """What is here of a blob, and the version of that; None while it is not being fetched."""
        with self._lock:
            partial = self._partials.get(hash_)
            return (partial.version, list(partial.spans)) if partial is not None else None

    def spans(self, hash_: str) -> list[tuple[int, int]]:
        """What is here of a blob."""
        state = self.state(hash_)
        return state[1] if state is not None else []

    def find(self, hash_: str, start: int, end: int) -> Path | None:
        """The file that a part of a blob is in, if all of the part is here."""
        with self._lock:
            partial = self._partials.get(hash_)
            return partial.path if partial is not None and partial.spans.covers(start, end) else None

    async def wait(self, seconds: float) -> None:
        """Waits for the next change of any blob, no longer than so long."""
        self._loop = asyncio.get_running_loop()
        waiting = self._loop.create_future()
        self._waiting.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiting)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_waits)

    def _end_waits(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
