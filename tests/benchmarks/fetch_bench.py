"""Fetching a blob from an object store, against obstore alone at its best.

The baseline does what the engine does for the bytes, and nothing of what it does for safety: ranged reads in threads at
the concurrency that is best here, sha256 in order beside them, room taken at once, one fsync at the end. It keeps no
journal, verifies no chunk, and has no idea of stalls, changed objects or fairness. Both read from one server, a process
of its own, in turns; what is compared is the pair of one round.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
from obstore.store import ObjectStore

from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.objects import ObjectSource, open_object_store
from helios.mesh.transfer.order import Transfer, Wanted

BLOB_BYTES = 1 << 30
BASELINE_CHUNK_BYTES = 16 << 20
BASELINE_IN_FLIGHT = 8
"""Both were the best of 1, 4, 8, 16 and 32 in flight of 8, 16 and 32 MiB on two cores."""

SAMPLE_COUNT = 7
_ROOT = Path(__file__).resolve().parents[2]
_DIRECTORY = _ROOT / "build"
"""On the repository's disk: a temporary directory may be memory."""


def run() -> list[dict[str, Any]]:
    """Measures, and returns throughputs as ratios of the baseline's; `baseline` is that in MiB/s."""
    _DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="fetch-bench-") as name:
        directory = Path(name)
        sha256 = _make_blob(directory / "blob")
        with _serve(directory / "blob") as url:
            store = open_object_store(url, client={"allow_http": True})
            wanted = Wanted(BLOB_BYTES, sha256)
            runs: dict[str, Callable[[], None]] = {
                "baseline": lambda: _fetch_bare(store, directory / "bare", sha256),
                "objects": lambda: _fetch(Transfer(ObjectSource(store, "blob"), directory / "objects", wanted)),
                "http": lambda: _fetch(Transfer(HttpSource(f"{url}/blob"), directory / "http", wanted)),
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in runs}
            for number in range(SAMPLE_COUNT):
                # The order turns round each time, so that none always runs after the same other one.
                for kind in list(runs)[:: 1 if number % 2 else -1]:
                    os.sync()
                    started = time.monotonic()
                    runs[kind]()
                    seconds[kind].append(time.monotonic() - started)
    return [
        {
            "name": name,
            "value": round(statistics.median(_ratios(seconds["baseline"], seconds[kind])), 3),
            "unit": "ratio",
            "baseline": round((BLOB_BYTES >> 20) / statistics.median(seconds["baseline"]), 1),
            "samples": SAMPLE_COUNT,
        }
        for name, kind in (("storage.object_fetch_ratio", "objects"), ("storage.http_fetch_ratio", "http"))
    ]


def _ratios(baseline: list[float], seconds: list[float]) -> list[float]:
    return [b / s for b, s in zip(baseline, seconds, strict=True)]


def _fetch(transfer: Transfer) -> None:
    Downloader().fetch(transfer)
    transfer.target.unlink()


def _fetch_bare(store: ObjectStore, target: Path, expected: str) -> None:
    """The baseline."""
    offsets = range(0, BLOB_BYTES, BASELINE_CHUNK_BYTES)
    done = [threading.Event() for _ in offsets]
    pieces: dict[int, Any] = {}
    sha256 = hashlib.sha256()
    with target.open("w+b", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, BLOB_BYTES)

        def fetch(index: int) -> None:
            piece = obstore.get_range(store, "blob", start=offsets[index], length=BASELINE_CHUNK_BYTES)
            assert os.pwrite(file.fileno(), piece, offsets[index]) == BASELINE_CHUNK_BYTES
            pieces[index] = piece
            done[index].set()

        with ThreadPoolExecutor(BASELINE_IN_FLIGHT) as pool:
            futures = [pool.submit(fetch, index) for index in range(len(offsets))]
            for index, event in enumerate(done):
                event.wait()
                sha256.update(pieces.pop(index))
            for future in futures:
                future.result()
        os.fsync(file.fileno())
    assert sha256.hexdigest() == expected
    target.unlink()


def _make_blob(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(BLOB_BYTES >> 24):
            piece = os.urandom(1 << 24)
            sha256.update(piece)
            file.write(piece)
    return sha256.hexdigest()


@contextmanager
def _serve(path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.benchmarks.range_server", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.wait(timeout=10.0)


if __name__ == "__main__":
    for entry in run():
        print(entry)
