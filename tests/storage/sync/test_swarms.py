"""Agents that fetch one model at the same time, with a registry that brings them together: real sockets and mTLS."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path

import grpc.aio
import pytest

from helios.api.storage.v1 import blob_service_pb2 as pb
from helios.api.storage.v1.blob_service_pb2_grpc import BlobServiceStub
from helios.mesh.status import error_from_rpc
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.order import TransferOptions
from helios.registry.sync.servicer import SyncServicer
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob
from tests.storage.harness import Agent, Mesh, digest_of
from tests.storage.sync.test_session import wait_until
from tests.storage.test_chunk_source import indexed_mesh

MIB = 1 << 20
CONTENT = random.Random(4).randbytes(60 * MIB + 17)
DIGEST = digest_of(CONTENT)
WAIT_SECONDS = 60.0


@asynccontextmanager
async def cluster(directory: Path, *names: str) -> AsyncIterator[tuple[Mesh, SyncServicer, list[Agent]]]:
    """Agents with sessions, whose ranges are one chunk of 4 MiB."""
    sync = SyncServicer()
    async with indexed_mesh(directory, CONTENT, sync=sync) as mesh, AsyncExitStack() as stack:
        agents = [
            await stack.enter_async_context(
                mesh.agent(name=name, is_synced=True, downloader=Downloader(TransferOptions(4 * MIB, 4)))
            )
            for name in names
        ]
        await wait_until(lambda: len(sync.cluster.agents()) == len(names))
        yield mesh, sync, agents


async def fetch(agent: Agent, revision: str) -> Mapping[str, int]:
    """Brings the model to an agent; returns where its bytes came from."""
    async with asyncio.timeout(WAIT_SECONDS), agent.client.materialize(revision, holder="test") as lent:
        assert Path(lent.path, "model.safetensors").read_bytes() == CONTENT
    return (await agent.client.statistics()).tiers[0].written_bytes


def asked_bytes(server: BlobServer) -> int:
    return sum(last + 1 - first for first, last in server.ranges)


def add(mesh: Mesh, server: BlobServer) -> str:
    mesh.shelf.url = server.url.removesuffix("/blob")
    return mesh.shelf.add({"model.safetensors": CONTENT})


@contextmanager
def gated_server(first_byte: int) -> Iterator[tuple[BlobServer, threading.Event]]:
    """A cloud that answers for what begins here, or behind it, once the event is set."""
    gate = threading.Event()

    def script(request: Request) -> Answer:
        if request.first >= first_byte:
            gate.wait(WAIT_SECONDS)
        return Answer()

    with serve_blob(CONTENT, script=script) as server:
        try:
            yield server, gate
        finally:
            gate.set()


@pytest.mark.parametrize("count", [2, 3])
async def test_agents_that_fetch_at_once_read_the_cloud_once(tmp_path: Path, count: int) -> None:
    names = [f"node-{number}" for number in range(count)]
    with serve_blob(CONTENT) as server:
        async with cluster(tmp_path, *names) as (mesh, _, agents):
            revision = add(mesh, server)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(fetch(agent, revision)) for agent in agents]
            came = [task.result() for task in tasks]
    assert asked_bytes(server) == len(CONTENT)
    assert sum(counts.get("store", 0) for counts in came) == len(CONTENT)
    assert sum(counts.get("peer", 0) for counts in came) == (count - 1) * len(CONTENT)


async def test_one_that_comes_late_reads_from_those_that_have_it(tmp_path: Path) -> None:
    with serve_blob(CONTENT) as server:
        async with cluster(tmp_path, "one", "two") as (mesh, _, (one, two)):
            revision = add(mesh, server)
            await fetch(one, revision)
            assert asked_bytes(server) == len(CONTENT)
            assert await fetch(two, revision) == {"peer": len(CONTENT)}
    assert asked_bytes(server) == len(CONTENT)


async def test_one_that_leaves_in_the_middle_leaves_its_part_to_the_other(tmp_path: Path) -> None:
    with gated_server(12 * MIB) as (server, gate):
        async with cluster(tmp_path, "one", "two") as (mesh, sync, (one, two)):
            revision = add(mesh, server)
            first = asyncio.get_running_loop().create_task(fetch(one, revision))
            await wait_until(lambda: any(start >= 12 * MIB for start, _ in server.ranges))
            second = asyncio.get_running_loop().create_task(fetch(two, revision))
            await wait_until(lambda: len([view for view in sync.cluster.agents() if view.wanted]) == 2)
            first.cancel()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            counts = await second
            assert counts["store"] + counts.get("peer", 0) == len(CONTENT)
            assert (await fetch(one, revision))["peer"] > 0


async def test_what_came_so_far_is_told_and_served_and_nothing_else(tmp_path: Path) -> None:
    with gated_server(24 * MIB) as (server, gate):
        async with cluster(tmp_path, "one") as (mesh, _, (one,)), mesh.dial(one.address, "storage") as dialer:
            stub = dialer.stub(BlobServiceStub)

            async def find(version: int, seconds: float) -> pb.FindChunksResponse:
                request = pb.FindChunksRequest(hash=DIGEST.hash, known_version=version)
                request.wait.FromTimedelta(timedelta(seconds=seconds))
                return await stub.FindChunks(request, timeout=WAIT_SECONDS)

            assert await find(0, 5.0) == pb.FindChunksResponse(), "who has nothing says so at once"
            revision = add(mesh, server)
            fetching = asyncio.get_running_loop().create_task(fetch(one, revision))
            await wait_until(lambda: any(first >= 24 * MIB for first, _ in server.ranges))
            answer = await find(0, 0.0)
            while sum(span.length for span in answer.spans) < 24 * MIB:
                answer = await find(answer.version, 5.0)
            assert [(span.offset, span.length) for span in answer.spans] == [(0, 24 * MIB)]
            same = await find(answer.version, 0.2)
            assert same == answer

            async def read(offset: int, length: int) -> bytes:
                request = pb.ReadBlobRequest(hash=DIGEST.hash, offset=offset, limit=length)
                return b"".join([piece.data async for piece in stub.ReadBlob(request, timeout=WAIT_SECONDS)])

            assert await read(4 * MIB, 8 * MIB) == CONTENT[4 * MIB : 12 * MIB]
            for offset, length in ((20 * MIB, 8 * MIB), (0, 0)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await read(offset, length)
                assert error_from_rpc(caught.value).reason == "BLOB_NOT_FOUND"
            gate.set()
            assert (await fetching)["store"] == len(CONTENT)
            assert await find(0, 0.0) == pb.FindChunksResponse(version=1, is_whole=True)
