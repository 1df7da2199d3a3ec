"""How a 2 GiB checkpoint comes from the disk into a loader's tensors, warm and cold, and what a warm load copies.

Warm: the stock safetensors library opens what the storage agent lends, from the page cache and from sealed memory.
Cold: the file was dropped from memory (looked at before each run), the supervisor's read-ahead runs beside the loader,
as it does beside a start, and the load is over when the loader has touched each page of each tensor. Against it, in
turns: a raw O_DIRECT read into buffers that are used again, which copies nothing to anybody, and the two streamers that
vLLM offers, whose tensors are touched the same way. The median of the rounds' ratios counts.
"""

import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
from runai_model_streamer import SafetensorsStreamer
from safetensors import safe_open
from safetensors.torch import save_file

from helios.mesh.sealed import make_memory_file, seal
from helios.worker.supervisor.resident_files import ResidentFiles, read_in

SIZE_BYTES = 2 << 30
TENSOR_BYTES = 32 << 20
"""A matrix of a model of some billion parameters."""

WARM_COUNT = 9
ROUND_COUNT = 7
DIRECT_BYTES = 8 << 20
DIRECT_THREADS = 4
"""The best of 1 to 32 threads and 1 to 32 MiB."""

_DIRECTORY = Path(__file__).resolve().parents[2] / "build"
"""On the repository's disk: a temporary directory may be memory."""

_DROP_SECONDS = 30.0


def run() -> list[dict[str, Any]]:
    """Measures; ratios are rates of Helios over the other's."""
    _DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="load-bench-") as name:
        path = Path(name, "model.safetensors")
        _write(path)
        return [*_warm(path), *_cold(path)]


def _write(path: Path) -> None:
    random = torch.frombuffer(bytearray(os.urandom(TENSOR_BYTES)), dtype=torch.bfloat16)
    save_file({f"t{i:03}": torch.roll(random, 7 * i) for i in range(SIZE_BYTES // TENSOR_BYTES)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _warm(path: Path) -> Iterator[dict[str, Any]]:
    read_in([path], threading.Event())
    with _sealed_copy(path) as sealed:
        for name, place in (("storage.load_warm_ms", path), ("storage.load_sealed_ms", sealed)):
            seconds = []
            for _ in range(WARM_COUNT):
                started = time.monotonic()
                tensors = _open(place)
                seconds.append(time.monotonic() - started)
                assert sum(tensor.nbytes for tensor in tensors) == SIZE_BYTES
                del tensors
            yield _result(name, statistics.median(seconds) * 1000, "ms", WARM_COUNT)
        before = _memory()
        tensors = _open(sealed)
        _touch(tensors)
        copied_bytes = {kind: value - before[kind] for kind, value in _memory().items()}
        # A copy shows as memory of this process's own; what is mapped is shared. A MiB is the tensors' Python objects.
        own_bytes = copied_bytes["Anonymous"] if copied_bytes["Anonymous"] > 1 << 20 else 0
        assert copied_bytes["Rss"] > 0.95 * SIZE_BYTES, "every page was touched"
        yield _result("storage.memory_tier_copied_bytes", own_bytes, "bytes", 1)


def _cold(path: Path) -> Iterator[dict[str, Any]]:
    loads: dict[str, Callable[[Path], None]] = {
        "direct": _read_direct,
        "helios": _load_ahead,
        "runai": _load_runai,
        "fastsafetensors": _load_fastsafetensors,
        "stock": _load_stock,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in loads}
    for number in range(ROUND_COUNT):
        for kind in list(loads)[:: 1 if number % 2 else -1]:
            _drop(path)
            started = time.monotonic()
            loads[kind](path)
            seconds[kind].append(time.monotonic() - started)
    helios = seconds["helios"]
    for name, kind in (
        ("storage.load_cold_ratio", "direct"),
        ("storage.load_cold_vs_runai", "runai"),
        ("storage.load_cold_vs_fastsafetensors", "fastsafetensors"),
        ("storage.load_cold_vs_stock", "stock"),
    ):
        ratio = statistics.median(other / own for other, own in zip(seconds[kind], helios, strict=True))
        baseline = round((SIZE_BYTES >> 20) / statistics.median(seconds[kind]), 1)
        yield {**_result(name, ratio, "ratio", ROUND_COUNT), "baseline": baseline}


def _result(name: str, value: float, unit: str, samples: int) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "unit": unit, "baseline": None, "samples": samples}


def _open(path: Path) -> list[torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no mapping


def _touch(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        assert int(tensor.view(torch.uint8).flatten()[:: mmap.PAGESIZE].sum()) >= 0


def _load_ahead(path: Path) -> None:
    reading = threading.Thread(target=read_in, args=([path], threading.Event()))
    reading.start()
    _touch(_open(path))
    reading.join()


def _load_stock(path: Path) -> None:
    _touch(_open(path))


def _read_direct(path: Path) -> None:
    buffers = threading.local()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(offset: int) -> int:
        if not hasattr(buffers, "pages"):
            buffers.pages = mmap.mmap(-1, DIRECT_BYTES)
        return os.preadv(descriptor, [buffers.pages], offset)

    try:
        with ThreadPoolExecutor(DIRECT_THREADS) as pool:
            size = path.stat().st_size
            assert sum(pool.map(read, range(0, size, DIRECT_BYTES))) == size
    finally:
        os.close(descriptor)


def _load_runai(path: Path) -> None:
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        _touch([tensor for _, tensor in streamer.get_tensors()])


def _load_fastsafetensors(path: Path) -> None:
    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True, max_threads=DIRECT_THREADS)
    try:
        loader.add_filenames({0: [str(path)]})
        buffer = loader.copy_files_to_device()
        try:
            _touch([buffer.get_tensor(name) for name in buffer.key_to_rank_lidx])
        finally:
            buffer.close()
    finally:
        loader.close()


@contextmanager
def _sealed_copy(path: Path) -> Iterator[Path]:
    """The file in sealed memory, as an agent hands it over."""
    descriptor = make_memory_file("load-bench")
    try:
        with path.open("rb") as source:
            size, offset = path.stat().st_size, 0
            while offset < size:
                offset += os.sendfile(descriptor, source.fileno(), offset, size - offset)
        seal(descriptor)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _memory() -> dict[str, int]:
    """What this process has, in bytes: all, and what is its own and no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return {kind: values[kind] for kind in ("Rss", "Anonymous")}


def _drop(path: Path) -> None:
    """Has the kernel forget the file, and looks that it did; pages that another core just handled take a moment."""
    deadline = time.monotonic() + _DROP_SECONDS
    while True:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        looked_at = ResidentFiles([path])
        resident_bytes = looked_at.resident_bytes()
        looked_at.close()
        if resident_bytes < SIZE_BYTES // 200:
            return
        assert time.monotonic() < deadline, f"{resident_bytes} bytes stay in memory"
        time.sleep(0.05)


if __name__ == "__main__":
    for entry in run():
        print(entry)
