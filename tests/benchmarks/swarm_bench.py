"""What agents that pull one model at the same time ask of the cloud, all of them together.

Agents are processes of their own with real mTLS, the registry's services run here, and the cloud is an HTTP server that
counts the bytes that it is asked for.
"""

import asyncio
import random
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from helios.registry.sync.servicer import SyncServicer
from helios.storage.client import StorageClient
from tests.mesh.transfer.blob_server import serve_blob
from tests.storage.harness import AgentProcess, Mesh, agent_process
from tests.storage.test_chunk_source import indexed_mesh

BLOB_BYTES = 256 << 20
_DIRECTORY = Path(__file__).resolve().parents[2] / "build"
"""On the repository's disk: a temporary directory may be memory."""

_WAIT_SECONDS = 120.0


async def run() -> list[dict[str, Any]]:
    """Measures two agents and four, and returns what was asked of the cloud, as a multiple of the model."""
    _DIRECTORY.mkdir(exist_ok=True)
    # Random.randbytes makes less than 256 MiB at a time.
    content = random.Random(6).randbytes(BLOB_BYTES // 4) * 4
    return [
        {
            "name": f"storage.cloud_bytes_{name}_agents",
            "value": round(await _pull(content, count), 4),
            "unit": "ratio",
            "baseline": float(BLOB_BYTES >> 20),
            "samples": 1,
        }
        for name, count in (("two", 2), ("four", 4))
    ]


async def _pull(content: bytes, count: int) -> float:
    sync = SyncServicer()
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="swarm-bench-") as name, serve_blob(content) as server:
        directory = Path(name)
        async with indexed_mesh(directory, content, sync=sync) as mesh, AsyncExitStack() as stack:
            mesh.shelf.url = server.url.removesuffix("/blob")
            revision = mesh.shelf.add({"model.safetensors": content})
            agents = [
                await stack.enter_async_context(
                    agent_process(mesh, f"--node=node-{number}", root=directory / f"node-{number}")
                )
                for number in range(count)
            ]
            async with asyncio.timeout(_WAIT_SECONDS):
                while len(sync.cluster.agents()) < count:
                    await asyncio.sleep(0.05)
                async with asyncio.TaskGroup() as group:
                    for agent in agents:
                        group.create_task(_fetch(mesh, agent, revision))
        return sum(last + 1 - first for first, last in server.ranges) / len(content)


async def _fetch(mesh: Mesh, agent: AgentProcess, revision: str) -> None:
    async with mesh.dial(agent.address) as dialer, StorageClient(dialer).materialize(revision, holder="bench"):
        pass


if __name__ == "__main__":
    for entry in asyncio.run(run()):
        print(entry)
