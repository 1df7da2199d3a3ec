"""Cold starts of a model that is fetched at 100 MB/s: loading it while it comes, over loading it when it is here.

Storage agent, source, launcher and replica are processes; the agent's own cap is the limit. Starts of the two kinds
take turns, each after the revision was evicted, and run from the order to the first token. `baseline` of the first row
is the start that waits; the second row is the early start over its own fetch, which a start that costs nothing beyond
it would take.
"""

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from helios.mesh.errors import PreconditionFailed
from helios.storage.client import StorageClient
from helios.worker.early.loads import EarlyLoads
from helios.worker.supervisor.commands import Stop
from helios.worker.supervisor.process_tree import become_subreaper
from helios.worker.supervisor.records import ReplicaState
from tests.conftest import embedded_model
from tests.storage.harness import Mesh, agent_process, entry_of
from tests.storage.test_chunk_source import indexed_mesh
from tests.worker.replica.support import Launcher
from tests.worker.replica.test_early_real import PATIENT, Forks, ask, start
from tests.worker.supervisor.fakes import Node, running_node

BYTES_PER_SECOND: Final = 100_000_000
ROUNDS: Final = 5
SECONDS: Final = 120.0
_ROOT = Path(__file__).resolve().parents[2]
_DIRECTORY = _ROOT / "build"
"""On the repository's disk: a temporary directory may be memory."""


async def run() -> list[dict[str, Any]]:
    """Measures."""
    become_subreaper()
    files = {path.name: path.read_bytes() for path in embedded_model().iterdir()}
    _DIRECTORY.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="early-bench-") as name,
        tempfile.TemporaryDirectory(prefix="eb") as short,
        _launched() as launcher,
    ):
        directory = Path(name)
        async with indexed_mesh(directory, *files.values()) as mesh:
            entries = [entry_of(path, content) for path, content in files.items()]
            revision = mesh.shelf.add_entries(entries)
            store = directory / "store"
            store.mkdir()
            for entry in entries:
                (store / entry.digest.hash).write_bytes(files[entry.path])
            with _serve(store) as url:
                mesh.shelf.url = url
                cap = f"--fetch.bytes-per-second={BYTES_PER_SECOND}"
                async with agent_process(mesh, cap, root=directory / "storage") as agent:
                    return _rows(*await _measure(mesh, agent.address, launcher, Path(short), revision))


async def _measure(
    mesh: Mesh, address: str, launcher: Launcher, directory: Path, revision: str
) -> tuple[dict[str, list[float]], list[float]]:
    seconds: dict[str, list[float]] = {"early": [], "whole": []}
    fetches: list[float] = []
    async with mesh.dial(address) as dialer:
        storage = StorageClient(dialer)
        async with (
            EarlyLoads(directory / "early", directory / "d", storage) as early,
            running_node(directory, launcher=Forks(launcher), weights=storage, rules=PATIENT) as node,
        ):
            # The first start of a launcher touches what the others find.
            await _start(node, storage, "first", revision)
            for number in range(ROUNDS):
                for kind in ("early", "whole") if number % 2 else ("whole", "early"):
                    node.supervisor.early = early if kind == "early" else None
                    seconds[kind].append(await _start(node, storage, f"{kind}-{number}", revision))
                fetches.append(await _fetch(storage, revision))
            await node.supervisor.end_all(5)
    return seconds, fetches


async def _start(node: Node, storage: StorageClient, replica_id: str, revision: str) -> float:
    """Returns the seconds of a start from the order to the first token; leaves nothing of it, nor of the revision."""
    began_at = time.monotonic()
    await start(node, replica_id, revision)
    async with asyncio.timeout(SECONDS):
        view = await node.wait_state(replica_id, ReplicaState.READY, seconds=SECONDS)
        await ask(view, max_tokens=1)
        seconds = time.monotonic() - began_at
        node.supervisor.execute(f"stop {replica_id}", Stop(replica_id))
        await node.wait_state(replica_id, ReplicaState.STOPPED, seconds=SECONDS)
        await _evict(storage, revision)
    return seconds


async def _fetch(storage: StorageClient, revision: str) -> float:
    began_at = time.monotonic()
    async with asyncio.timeout(SECONDS), storage.materialize(revision, holder="bench"):
        seconds = time.monotonic() - began_at
    await _evict(storage, revision)
    return seconds


async def _evict(storage: StorageClient, revision: str) -> None:
    """Drops a revision as soon as its last lease was given back."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                await storage.evict(revision)
                break
            except PreconditionFailed:
                await asyncio.sleep(0.05)
    os.sync()


def _rows(seconds: dict[str, list[float]], fetches: list[float]) -> list[dict[str, Any]]:
    ratios = [early / whole for early, whole in zip(seconds["early"], seconds["whole"], strict=True)]
    beyond = [early / fetch for early, fetch in zip(seconds["early"], fetches, strict=True)]
    return [
        _row("worker.early_load_ratio", ratios, statistics.median(seconds["whole"])),
        _row("worker.early_load_over_fetch_ratio", beyond, statistics.median(fetches)),
    ]


def _row(name: str, ratios: list[float], baseline: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(statistics.median(ratios), 4),
        "unit": "ratio",
        "baseline": round(baseline, 3),
        "samples": len(ratios),
    }


@contextmanager
def _launched() -> Iterator[Launcher]:
    launcher = Launcher("vllm")
    with contextlib.closing(launcher):
        yield launcher


@contextmanager
def _serve(directory: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.benchmarks.range_server", str(directory)]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.communicate(timeout=10)


if __name__ == "__main__":
    for entry in asyncio.run(run()):
        print(entry)
