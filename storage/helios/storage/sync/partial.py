"""Unfinished blobs that other nodes may read from already, as far as they are here and verified.

Fetching threads say what came, the event loop reads it for peers. A blob is here from the beginning of its fetch until
its file has its final name; then the tier has it. Two fetches may bring one blob to two tiers at once: what is here is
known of each file, and a part is only read from a file that has it.
"""

import asyncio
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from helios.mesh.transfer.spans import Spans


@dataclass(slots=True)
class _Partial:
    version: int = 0
    files: dict[Path, Spans] = field(default_factory=dict)
    generations: dict[Path, int] = field(default_factory=dict)


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
        """A fetch to a file begins, or begins anew: nothing of it is here."""
        with self._lock:
            partial = self._partials.setdefault(hash_, _Partial())
            partial.files[path] = Spans()
            self._change(partial)
            partial.generations[path] = partial.version
        self._wake()

    def add(self, hash_: str, path: Path, start: int, end: int) -> None:
        """A part is in a file, and verified."""
        with self._lock:
            partial = self._partials.get(hash_)
            if partial is not None and path in partial.files:
                partial.files[path].add(start, end)
                self._change(partial)
        self._wake()

    def end(self, hash_: str, path: Path) -> None:
        """The fetch to a file has ended. Idempotent."""
        with self._lock:
            partial = self._partials.get(hash_)
            if partial is not None and partial.files.pop(path, None) is not None:
                del partial.generations[path]
                self._change(partial)
                if not partial.files:
                    del self._partials[hash_]
        self._wake()

    def state(self, hash_: str) -> tuple[int, list[tuple[int, int]]] | None:
        """What is here of a blob in any file, and the version of that; None while it is not being fetched."""
        with self._lock:
            partial = self._partials.get(hash_)
            if partial is None:
                return None
            return partial.version, list(Spans(span for spans in partial.files.values() for span in spans))

    def spans(self, hash_: str) -> list[tuple[int, int]]:
        """What is here of a blob in any file."""
        state = self.state(hash_)
        return state[1] if state is not None else []

    def find(self, hash_: str, start: int, end: int) -> Path | None:
        """A file that has all of a part of a blob."""
        with self._lock:
            partial = self._partials.get(hash_)
            files = partial.files.items() if partial is not None else ()
            return next((path for path, spans in files if spans.covers(start, end)), None)

    def growing(self, hash_: str, directory: Path) -> tuple[Path, int, list[tuple[int, int]]] | None:
        """The file below a directory that a blob is fetched to, which try that is, as a number of its own, and what is
        here in that file; None: there is none.
        """
        with self._lock:
            partial = self._partials.get(hash_)
            if partial is None:
                return None
            found = ((path, spans) for path, spans in partial.files.items() if path.is_relative_to(directory))
            return next(((path, partial.generations[path], list(spans)) for path, spans in found), None)

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

    def _change(self, partial: _Partial) -> None:
        self._version += 1
        partial.version = self._version

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_waits)

    def _end_waits(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
