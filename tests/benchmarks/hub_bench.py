"""Fetching a model from a Hugging Face hub, against huggingface_hub's own download.

The baseline is `snapshot_download` of the client that everybody uses, without progress bars, with its eight workers
for four files, which is what it is best at, and for one. Both end when the whole is on the disk, which its files are
brought to by an fsync each; it hashes nothing, while ours are compared with their sha256. The same without that fsync
is reported beside it. hf_xet, which the client prefers, has no part in this: it needs the hub's own chunk service, and
where there is none the client does what it does here. Both read the same bytes from one bare server by the same
redirects, in turns; what is compared is the pair of a round.

What is judged is a server that gives each connection as much as object stores and content networks do: the client has
one connection a file. Without any such limit, over loopback, two cores that also serve, copy and hash are the limit of
ours, and a gigabyte's SHA-256 alone takes a quarter of the client's time; that is reported, too.
"""

import asyncio
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils.tqdm import disable_progress_bars

from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.registry.sources.hugging_face import HuggingFaceRepository
from helios.registry.sources.reference import HubReference
from helios.registry.sources.remote import RemoteFile
from helios.registry.sources.settings import DownloadSettings, HuggingFaceSettings
from helios.registry.sources.web import Web
from tests.benchmarks.hub_server import REPOSITORY

FILE_COUNT = 4
TOTAL_BYTES = 1 << 30
SAMPLE_COUNT = 5
PACED_SAMPLE_COUNT = 3
"""A sixth of a minute each, and they differ by little."""
CONNECTION_BYTES_PER_SECOND = 85_000_000
"""Source: Amazon S3's performance guidelines, "85-90 MB/s per request"."""

_ROOT = Path(__file__).resolve().parents[2]
_DIRECTORY = _ROOT / "build"
"""On the repository's disk: a temporary directory may be memory."""


def run() -> Iterator[dict[str, Any]]:
    """Measures, and gives the throughput as a ratio of the baseline's; `baseline` is that in MiB/s."""
    _DIRECTORY.mkdir(exist_ok=True)
    disable_progress_bars()
    yield _result("storage.hub_fetch_ratio", _measure(FILE_COUNT, CONNECTION_BYTES_PER_SECOND), "synced")
    # What most models are, below some gigabytes: the client has one connection for it.
    yield _result("storage.hub_fetch_one_file_ratio", _measure(1, CONNECTION_BYTES_PER_SECOND), "synced")
    unlimited = _measure(FILE_COUNT)
    yield _result("storage.hub_fetch_unlimited_ratio", unlimited, "synced")
    yield _result("storage.hub_fetch_unlimited_unsynced_ratio", unlimited, "baseline")
    yield _result("storage.hub_fetch_unlimited_one_file_ratio", _measure(1), "synced")


def _result(name: str, seconds: dict[str, list[float]], kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(statistics.median(b / s for b, s in zip(seconds[kind], seconds["ours"], strict=True)), 3),
        "unit": "ratio",
        "baseline": round((TOTAL_BYTES >> 20) / statistics.median(seconds[kind]), 1),
        "samples": len(seconds["ours"]),
    }


def _measure(file_count: int, rate: int = 0) -> dict[str, list[float]]:
    """Fetches so many files in turns; returns the seconds of ours, of the baseline, and of that with its fsync.

    `rate` bounds each connection, in bytes per second; 0: nothing does.
    """
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="hub-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        _make_files(directory / "files", file_count)
        port = stack.enter_context(_process("tests.benchmarks.range_server", str(directory / "files"), str(rate)))
        # Another host than the hub's, as its content network is: the client wants that.
        network = f"http://localhost:{port}"
        endpoint = stack.enter_context(_process("tests.benchmarks.hub_server", str(directory / "files"), network))
        # The hub computes what a real one knows.
        asyncio.run(_list(endpoint))
        runs: dict[str, Callable[[], None]] = {
            "baseline": lambda: _fetch_by_its_client(endpoint, directory / "files-of-baseline"),
            "ours": lambda: _fetch(endpoint, directory / "files-of-ours"),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in (*runs, "synced")}
        for number in range(PACED_SAMPLE_COUNT if rate else SAMPLE_COUNT):
            # The order turns round each time, so that neither always runs after the other.
            for kind in list(runs)[:: 1 if number % 2 else -1]:
                os.sync()
                started = time.monotonic()
                runs[kind]()
                seconds[kind].append(time.monotonic() - started)
                if kind == "baseline":
                    _sync_files(directory / "files-of-baseline")
                    seconds["synced"].append(time.monotonic() - started)
                shutil.rmtree(directory / f"files-of-{kind}")
    return seconds


def _fetch(endpoint: str, target: Path) -> None:
    """As a pull does, with the registry's own settings: the list of files first, then each in ranges."""
    target.mkdir()
    repository, files = asyncio.run(_list(endpoint))
    settings = DownloadSettings()
    options = TransferOptions(
        chunk_bytes=settings.chunk_bytes, in_flight=settings.in_flight, sync_bytes=settings.sync_bytes
    )
    downloader = Downloader(options, DownloadGate(slot_count=settings.in_flight))

    def fetch(file: RemoteFile) -> None:
        wanted = Wanted(file.size_bytes, file.sha256)
        downloader.fetch(Transfer(repository.open(file), target / file.path, wanted))

    with ThreadPoolExecutor(settings.files) as pool:
        list(pool.map(fetch, files))


async def _list(endpoint: str) -> tuple[HuggingFaceRepository, tuple[RemoteFile, ...]]:
    async with Web() as web:
        settings = HuggingFaceSettings(endpoint=endpoint, token_file=None)
        repository = HuggingFaceRepository(HubReference("hf", REPOSITORY), web, settings)
        return repository, (await repository.list_files()).files


def _fetch_by_its_client(endpoint: str, target: Path) -> None:
    """The baseline."""
    huggingface_hub.snapshot_download(REPOSITORY, endpoint=endpoint, cache_dir=target, token=False)


def _sync_files(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _make_files(directory: Path, count: int) -> None:
    directory.mkdir()
    for _ in range(count):
        content = os.urandom(TOTAL_BYTES // count)
        (directory / hashlib.sha256(content).hexdigest()).write_bytes(content)


@contextmanager
def _process(module: str, *arguments: str) -> Iterator[str]:
    """Runs a server; gives the line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(timeout=10.0)


if __name__ == "__main__":
    for entry in run():
        print(entry)
