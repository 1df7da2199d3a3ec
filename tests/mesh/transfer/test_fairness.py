"""Who gets a link's bytes when a request's start arrives while a prefetch runs, with a cap and without one."""

import hashlib
import random
import threading
import time
from pathlib import Path

import pytest

from helios.mesh.errors import Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate, Priority
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.mesh.transfer.source import Sink, SourceState

PIECE = 16 << 10
CHUNK = 64 << 10
IN_FLIGHT = 4
BYTES_PER_SECOND = 12 << 20
CONTENT = random.Random(3).randbytes(4 << 20)
WANTED = Wanted(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
LONG = bytes(256 << 20)
"""Far more than a prefetch brings while the test runs."""


class _Link:
    """A network that carries one piece after the other, of all who read, in the order in which they ask."""

    def __init__(self, bytes_per_second: float) -> None:
        self._turn = threading.Lock()
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self.carried_bytes: dict[str, int] = {}

    def carry(self, name: str, count: int) -> None:
        with self._turn:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._bytes_per_second
            self.carried_bytes[name] = self.carried_bytes.get(name, 0) + count
            wait_seconds = self._free_at - now
        time.sleep(max(0.0, wait_seconds))


class _Far:
    """A blob at the other end of a link."""

    def __init__(self, link: _Link, name: str, content: bytes) -> None:
        self._link = link
        self._name = name
        self._content = content

    def describe(self) -> SourceState:
        return SourceState(len(self._content))

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        for at in range(offset, offset + length, PIECE):
            piece = memoryview(self._content)[at : min(at + PIECE, offset + length)]
            self._link.carry(self._name, len(piece))
            sink(piece)

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("is_capped", [False, True], ids=["free", "capped"])
def test_a_start_gets_the_link_of_a_prefetch_that_runs(tmp_path: Path, is_capped: bool) -> None:
    link = _Link(100 * BYTES_PER_SECOND if is_capped else BYTES_PER_SECOND)
    # More slots than both use: it is not for want of slots that the prefetch waits.
    gate = DownloadGate(slot_count=64, bytes_per_second=BYTES_PER_SECOND if is_capped else 0)
    downloader = Downloader(TransferOptions(chunk_bytes=CHUNK, in_flight=IN_FLIGHT), gate)
    running, is_enough = threading.Event(), threading.Event()

    def check() -> None:
        if is_enough.is_set():
            raise Unavailable("enough")

    def prefetch() -> None:
        transfer = Transfer(
            _Far(link, "prefetch", LONG),
            tmp_path / "prefetch",
            Wanted(len(LONG)),
            Priority.PREFETCH,
            check=check,
            on_progress=lambda progress: running.set() if progress.done_bytes else None,
        )
        with pytest.raises(Unavailable):
            downloader.fetch(transfer)

    thread = threading.Thread(target=prefetch)
    thread.start()
    assert running.wait(20)
    before = link.carried_bytes["prefetch"]
    downloader.fetch(Transfer(_Far(link, "start", CONTENT), tmp_path / "start", WANTED, Priority.START))
    taken_bytes = link.carried_bytes["prefetch"] - before
    assert link.carried_bytes["start"] / (link.carried_bytes["start"] + taken_bytes) >= 0.8
    ended_at = time.monotonic()
    while link.carried_bytes["prefetch"] < before + taken_bytes + 2 * IN_FLIGHT * CHUNK:
        assert time.monotonic() < ended_at + 20, "the prefetch goes on afterwards"
        time.sleep(0.02)
    is_enough.set()
    thread.join(20)
    assert not thread.is_alive()
