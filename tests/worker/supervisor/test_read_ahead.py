"""What a start will load is read while the replica is forked; what it will not, and what memory can't hold, is not."""

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helios.worker.supervisor.read_ahead import read_ahead
from helios.worker.supervisor.resident_files import ResidentFiles, read_in
from tests.worker.replica.support import ROOT

SIZE = 80 << 20
"""More than a window of each reader."""

REVISION = "sha256:" + "1" * 64


@pytest.fixture
def checkpoint() -> Iterator[Path]:
    """A directory with one file of weights that is on the disk and not in memory."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    # On the repository's disk: a temporary directory may be memory.
    with tempfile.TemporaryDirectory(dir=build, prefix="read-ahead-") as name:
        weights = Path(name, "model.safetensors")
        with weights.open("wb") as file:
            file.write(os.urandom(SIZE))
            file.flush()
            os.fsync(file.fileno())
        drop(weights)
        yield Path(name)


def drop(path: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(path) < SIZE / 4:
            return
        assert time.monotonic() < deadline, "the kernel keeps the file"
        time.sleep(0.05)


def resident(path: Path) -> int:
    files = ResidentFiles([path])
    try:
        return files.resident_bytes()
    finally:
        files.close()


async def test_the_checkpoint_is_in_memory_when_it_was_read_ahead(checkpoint: Path) -> None:
    await read_ahead("vllm", str(checkpoint), REVISION, "")
    assert resident(checkpoint / "model.safetensors") == SIZE


async def test_an_engine_that_loads_none_reads_none(checkpoint: Path) -> None:
    await read_ahead("simulated", str(checkpoint), REVISION, "")
    assert resident(checkpoint / "model.safetensors") < SIZE / 2


async def test_what_is_larger_than_memory_is_left_to_the_loader(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = SIZE

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    await read_ahead("vllm", str(checkpoint), REVISION, "")
    assert resident(checkpoint / "model.safetensors") < SIZE / 2


async def test_a_directory_that_is_gone_is_the_starts_to_tell(tmp_path: Path) -> None:
    await read_ahead("transformers", str(tmp_path / "gone"), REVISION, "")


async def test_it_waits_for_no_thread_of_the_loop_and_takes_none(tmp_path: Path) -> None:
    let_go = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        asyncio.get_running_loop().set_default_executor(busy)
        busy.submit(let_go.wait, 60)
        try:
            async with asyncio.timeout(20):
                await read_ahead("vllm", str(tmp_path), REVISION, "")
        finally:
            let_go.set()


def test_a_stop_ends_the_reading(checkpoint: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert read_in([checkpoint / "model.safetensors"], stop) == SIZE
    assert resident(checkpoint / "model.safetensors") < SIZE / 2


def test_empty_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_in([tmp_path / "empty"], threading.Event()) == 0
