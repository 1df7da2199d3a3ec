"""Agents in processes of their own that fetch one model at once, one of which is killed in the middle."""

import asyncio
import random
import threading
from contextlib import AsyncExitStack
from pathlib import Path

from helios.registry.sync.servicer import SyncServicer
from helios.storage.client import StorageClient
from tests.mesh.transfer.blob_server import Answer, Request, serve_blob
from tests.storage.harness import AgentProcess, Mesh, agent_process
from tests.storage.sync.test_session import wait_until
from tests.storage.test_chunk_source import indexed_mesh

MIB = 1 << 20
CONTENT = random.Random(5).randbytes(64 * MIB + 17)
NODES = ("one", "two")
FLAGS = ("--fetch.chunk-bytes=4194304", "--fetch.in-flight=4")
WAIT_SECONDS = 90.0


async def fetch(mesh: Mesh, agent: AgentProcess, revision: str) -> bool:
    """Whether the agent brought the model as it is."""
    async with (
        asyncio.timeout(WAIT_SECONDS),
        mesh.dial(agent.address) as dialer,
        StorageClient(dialer).materialize(revision, holder="test") as lent,
    ):
        return Path(lent.path, "model.safetensors").read_bytes() == CONTENT


async def test_when_an_agent_is_killed_the_other_one_brings_its_part(tmp_path: Path) -> None:
    sync = SyncServicer()
    is_open = threading.Event()

    def script(request: Request) -> Answer:
        # So that all are in the middle of it when one of them is killed.
        if request.first >= 16 * MIB:
            is_open.wait(WAIT_SECONDS)
        return Answer()

    with serve_blob(CONTENT, script=script) as server:
        async with indexed_mesh(tmp_path, CONTENT, sync=sync) as mesh, AsyncExitStack() as stack:
            mesh.shelf.url = server.url.removesuffix("/blob")
            revision = mesh.shelf.add({"model.safetensors": CONTENT})
            stack.callback(is_open.set)
            agents = [
                await stack.enter_async_context(agent_process(mesh, f"--node={node}", *FLAGS, root=tmp_path / node))
                for node in NODES
            ]
            await wait_until(lambda: [view.agent.node for view in sync.cluster.agents()] == sorted(NODES))
            async with asyncio.TaskGroup() as group:
                fetches = [group.create_task(fetch(mesh, agent, revision)) for agent in agents]
                await wait_until(lambda: sum(first >= 16 * MIB for first, _ in server.ranges) >= 4)
                await wait_until(lambda: all(view.wanted for view in sync.cluster.agents()))
                agents[0].kill()
                # Its client would wait for it to come back.
                fetches[0].cancel()
                is_open.set()
            assert [fetched.result() for fetched in fetches[1:]] == [True]
            await wait_until(lambda: [view.agent.node for view in sync.cluster.agents()] == ["two"])
    asked_bytes = sum(last + 1 - first for first, last in server.ranges)
    # Twice came at most what only the killed one had, all that lies before the gate, and what it had claimed.
    assert len(CONTENT) <= asked_bytes <= len(CONTENT) + (16 + 6 * 4) * MIB
