"""How fast the storage agent materialises a blob, against a tuned program that copies, hashes and syncs it.

The agent is measured as a client sees it: mTLS, manifest, fetch, verification, view and lease included. Runs are
interleaved, so that what else the machine does hits both alike; the median of the rounds' ratios counts. `copy` is
what a source on another file system takes; `link` is the usual case on one machine, where the bytes are only
verified.
"""

import asyncio
import contextlib
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from helios.mesh.identity import CertificateAuthority
from tests.storage.harness import Agent, Mesh, digest_of, make_shelf, serve_registry

BLOB_BYTES = 256 << 20
"""As large as the shards of a small model; the agent's fixed cost is below a hundredth of it."""

CHUNK_BYTES = 8 << 20
SAMPLE_COUNT = 11
_DIRECTORY = Path(__file__).resolve().parents[2] / "build"
"""On the repository's disk: a temporary directory may be memory."""


def run() -> list[dict[str, Any]]:
    """Measures, and returns throughputs as ratios of the baseline's; `baseline` is that in MiB/s."""
    return asyncio.run(_run())


async def _run() -> list[dict[str, Any]]:
    _DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="storage-bench-") as name:
        directory = Path(name)
        content = os.urandom(BLOB_BYTES)
        async with _mesh(directory) as mesh:
            revision = mesh.shelf.add({"model.safetensors": content})
            copy = partial(_copy_hash_sync, mesh.shelf.put(content), directory / "copy", digest_of(content).hash)
            async with (
                mesh.agent(name="copying", is_link_allowed=False) as copying,
                mesh.agent(name="linking") as linking,
            ):
                seconds: dict[str, list[float]] = {"baseline": [], "copy": [], "link": []}
                runs: dict[str, Callable[[], Awaitable[float]]] = {
                    "baseline": lambda: asyncio.to_thread(copy),
                    "copy": lambda: _materialise(copying, revision),
                    "link": lambda: _materialise(linking, revision),
                }
                for number in range(SAMPLE_COUNT):
                    # The order turns round each time, so that none always runs after the same other one.
                    for kind in list(runs)[:: 1 if number % 2 else -1]:
                        seconds[kind].append(await runs[kind]())
    return _results(seconds)


def _results(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Compares within each round: what else the machine does changes from round to round, by more than what is
    sought.
    """
    baseline = seconds["baseline"]
    return [
        {
            "name": name,
            "value": round(statistics.median(b / s for b, s in zip(baseline, seconds[kind], strict=True)), 3),
            "unit": "ratio",
            "baseline": round((BLOB_BYTES >> 20) / statistics.median(baseline), 1),
            "samples": SAMPLE_COUNT,
        }
        for name, kind in (("storage.disk_load_ratio", "copy"), ("storage.linked_load_ratio", "link"))
    ]


async def _materialise(agent: Agent, revision: str) -> float:
    started = time.monotonic()
    async with agent.client.materialize(revision, holder="bench") as lent:
        took = time.monotonic() - started
        assert lent.fetched_bytes == BLOB_BYTES
    await agent.client.evict(revision)
    return took


def _copy_hash_sync(source: Path, target: Path, expected: str) -> float:
    """The baseline: hashing in a second thread, room taken at once, one fsync of the file and one of its directory."""
    started = time.monotonic()
    sha256 = hashlib.sha256()
    buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)]
    with (
        ThreadPoolExecutor(1) as pool,
        source.open("rb", buffering=0) as reader,
        target.open("wb", buffering=0) as writer,
    ):
        os.posix_fallocate(writer.fileno(), 0, BLOB_BYTES)
        running = pool.submit(sha256.update, b"")
        while count := reader.readinto(buffers[0]):
            running.result()
            running = pool.submit(sha256.update, buffers[0][:count])
            writer.write(buffers[0][:count])
            buffers.reverse()
        running.result()
        os.fsync(writer.fileno())
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    took = time.monotonic() - started
    assert sha256.hexdigest() == expected
    target.unlink()
    return took


@contextlib.asynccontextmanager
async def _mesh(directory: Path) -> AsyncIterator[Mesh]:
    authority = CertificateAuthority.open(directory / "ca")
    shelf = make_shelf(directory / "registry" / "blobs")
    shelf.base.mkdir(parents=True)
    async with serve_registry(shelf, authority.issue("registry", directory / "pki" / "registry")) as address:
        yield Mesh(directory, authority, shelf, address)


if __name__ == "__main__":
    for entry in run():
        print(entry)
