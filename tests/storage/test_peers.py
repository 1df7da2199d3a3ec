"""Blobs from other agents: verified, several at once, and never more than what the object store could have given."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hypothesis.strategies as st
import pytest
from hypothesis import given

from helios.api.storage.v1 import blob_service_pb2 as pb
from helios.api.storage.v1.blob_service_pb2_grpc import BlobServiceStub
from helios.mesh.status import error_from_rpc
from helios.mesh.transfer.source import SourceFault
from helios.storage.blob_messages import HEADER_BYTES, decode_piece, encode_piece
from helios.storage.blob_servicer import PIECE_BYTES, SERVICE_NAME, BlobServicer
from helios.storage.peers import PeerSource
from tests.mesh.transfer.blob_server import BlobServer, serve_blob
from tests.storage.harness import Agent, Mesh, digest_of
from tests.storage.test_chunk_source import BASE, TUNED, indexed_mesh

DIGEST = digest_of(BASE)


async def test_a_reader_that_leaves_while_a_blob_is_opened_leaves_no_open_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"blob")
    asked, may_answer = threading.Event(), threading.Event()

    def places(_: str) -> list[Path]:
        asked.set()
        may_answer.wait(10)
        return [tmp_path / "blob"]

    async with BlobServicer(places, max_reads=1) as servicer:

        async def read() -> bytes:
            return await anext(servicer.ReadBlob(pb.ReadBlobRequest(hash=DIGEST.hash), None))

        reader = asyncio.get_running_loop().create_task(read())
        assert await asyncio.to_thread(asked.wait, 10)
        reader.cancel()
        await asyncio.sleep(0)
        may_answer.set()
        with pytest.raises(asyncio.CancelledError):
            await reader
    state = (tmp_path / "blob").stat()
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert not any(os.path.samestat(os.fstat(number), state) for number in numbers)


@pytest.mark.parametrize("is_in_memory", [True, False])
async def test_a_range_is_the_same_from_memory_and_from_the_disk(tmp_path: Path, is_in_memory: bool) -> None:
    path = tmp_path / "blob"
    path.write_bytes(BASE)
    if not is_in_memory:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    async with BlobServicer(lambda _: [path], max_reads=1) as servicer:
        request = pb.ReadBlobRequest(hash=DIGEST.hash, offset=1000, limit=PIECE_BYTES + 500)
        messages = [message async for message in servicer.ReadBlob(request, None)]
    assert [len(decode_piece(message)) for message in messages] == [PIECE_BYTES, 500]
    assert b"".join(map(decode_piece, messages)) == BASE[1000 : 1000 + PIECE_BYTES + 500]


@given(data=st.binary(max_size=300) | st.binary(min_size=1, max_size=3).map(lambda b: b * 100_000))
def test_a_message_is_what_protobuf_writes(data: bytes) -> None:
    message = pb.ReadBlobResponse(data=data).SerializeToString()
    encoded = encode_piece(bytearray(HEADER_BYTES) + data + b"left over", len(data))
    # Protobuf leaves an empty field out; a reader can't tell.
    assert encoded == message or not data
    assert decode_piece(encoded) == data
    assert decode_piece(message) == data
    # A field of a newer Helios, before or after.
    assert decode_piece(b"\x10\x05" + message) == data
    assert decode_piece(message + b"\x10\x05") == data


async def test_a_peer_that_lives_and_sends_nothing_is_given_up() -> None:
    """As one whose disk hangs: its connection answers, and so does every other call."""
    came = bytearray()
    buffer = bytearray(HEADER_BYTES) + b"a piece"

    async def hang(request: bytes, context: Any) -> AsyncIterator[bytes]:
        del request, context
        yield encode_piece(buffer, len(b"a piece"))
        await asyncio.Event().wait()

    server = grpc.aio.server()
    handlers: Any = {"ReadBlob": grpc.unary_stream_rpc_method_handler(hang)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    source = PeerSource(f"127.0.0.1:{port}", DIGEST, identity=None, stall_seconds=2.0)
    try:
        with pytest.raises(SourceFault, match="sends nothing"):
            await asyncio.to_thread(source.read, source.describe(), 0, len(BASE), came.extend)
        assert came == b"a piece"
    finally:
        source.close()
        await server.stop(None)


async def _bring(mesh: Mesh, agent: Agent, server: BlobServer, content: bytes = BASE) -> None:
    revision = mesh.shelf.add({"model.safetensors": content})
    mesh.shelf.url = server.url.removesuffix("/blob")
    async with agent.client.materialize(revision, holder="test") as lent:
        assert Path(lent.path, "model.safetensors").read_bytes() == content


async def _came_from(agent: Agent) -> Mapping[str, int]:
    """What the agent says it brought, by source."""
    return (await agent.client.statistics()).tiers[0].written_bytes


def _asked_bytes(server: BlobServer) -> int:
    return sum(last + 1 - first for first, last in server.ranges)


def _blob(root: Path) -> Path:
    return root / "blobs" / "sha256" / DIGEST.hash[:2] / DIGEST.hash


async def test_a_node_reads_from_its_peers_what_they_have(tmp_path: Path) -> None:
    async with (
        indexed_mesh(tmp_path, BASE, TUNED) as mesh,
        mesh.agent(name="one") as one,
        mesh.agent(name="two") as two,
    ):
        with serve_blob(BASE) as server:
            await _bring(mesh, one, server)
            await _bring(mesh, two, server)
            assert _asked_bytes(server) == 2 * len(BASE)
            server.requests.clear()
            peers = (one.address, two.address, "127.0.0.1:1")
            async with mesh.agent(name="three", peers=peers) as three:
                await _bring(mesh, three, server)
                assert _asked_bytes(server) == 0
                assert await _came_from(three) == {"peer": len(BASE)}
                server.content = TUNED
                await _bring(mesh, three, server, TUNED)
                assert 0 < _asked_bytes(server) < len(TUNED) // 3, "what nobody has comes from the store"
                came = await _came_from(three)
                assert came["store"] == _asked_bytes(server)
                assert came["store"] + came["node"] + came["peer"] == len(BASE) + len(TUNED)


async def test_a_peer_that_lies_costs_no_byte_of_the_blob(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path, BASE) as mesh, mesh.agent(name="one") as one:
        with serve_blob(BASE) as server:
            await _bring(mesh, one, server)
            _blob(one.root).chmod(0o644)
            _blob(one.root).write_bytes(BASE[::-1])
            server.requests.clear()
            async with mesh.agent(name="two", peers=(one.address,)) as two:
                await _bring(mesh, two, server)
                assert _blob(two.root).read_bytes() == BASE
            assert _asked_bytes(server) == len(BASE)


async def test_a_peer_that_is_busy_is_no_obstacle(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path, BASE) as mesh, mesh.agent(name="one", max_reads=1) as one:
        with serve_blob(BASE) as server:
            await _bring(mesh, one, server)
            async with mesh.dial(one.address, "storage") as dialer:
                reading = dialer.stub(BlobServiceStub).ReadBlob(pb.ReadBlobRequest(hash=DIGEST.hash), timeout=20.0)
                assert await reading.read() is not grpc.aio.EOF
                async with mesh.agent(name="two", peers=(one.address,)) as two:
                    await _bring(mesh, two, server)
                reading.cancel()


async def test_ranges(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"model.safetensors": BASE})
    async with (
        mesh.agent() as agent,
        agent.client.materialize(revision, holder="test"),
        mesh.dial(agent.address, "storage") as dialer,
    ):

        async def read(offset: int, limit: int) -> list[bytes]:
            request = pb.ReadBlobRequest(hash=DIGEST.hash, offset=offset, limit=limit)
            return [piece.data async for piece in dialer.stub(BlobServiceStub).ReadBlob(request, timeout=10.0)]

        assert b"".join(await read(0, 0)) == BASE
        assert max(map(len, await read(0, 0))) == PIECE_BYTES
        assert b"".join(await read(100, PIECE_BYTES + 1)) == BASE[100 : 101 + PIECE_BYTES]
        assert b"".join(await read(len(BASE) - 1, 100)) == BASE[-1:]
        assert await read(len(BASE), 0) == []
        found = await dialer.stub(BlobServiceStub).FindBlobs(
            pb.FindBlobsRequest(hashes=[DIGEST.hash, "0" * 64]), timeout=10.0
        )
        assert list(found.hashes) == [DIGEST.hash]


async def test_a_blob_that_is_evicted_is_sent_to_its_end(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"model.safetensors": BASE})
    async with mesh.agent() as agent, mesh.dial(agent.address, "storage") as dialer:
        async with agent.client.materialize(revision, holder="test"):
            pass
        # Any: what `read` returns at the end has no data, which its type can't tell apart.
        call: Any = dialer.stub(BlobServiceStub).ReadBlob(pb.ReadBlobRequest(hash=DIGEST.hash), timeout=20.0)
        pieces = [(await call.read()).data]
        await agent.client.evict(revision)
        assert not _blob(agent.root).exists()
        while (message := await call.read()) is not grpc.aio.EOF:
            pieces.append(message.data)
        assert b"".join(pieces) == BASE


@pytest.mark.parametrize(
    ("component", "request_", "reason"),
    [
        ("storage", pb.ReadBlobRequest(hash="0" * 64), "BLOB_NOT_FOUND"),
        ("storage", pb.ReadBlobRequest(hash="../../etc/passwd"), "INVALID_DIGEST"),
        ("worker", pb.ReadBlobRequest(hash="0" * 64), "PERMISSION_DENIED"),
    ],
)
async def test_what_is_refused(mesh: Mesh, component: str, request_: pb.ReadBlobRequest, reason: str) -> None:
    async with mesh.agent() as agent, mesh.dial(agent.address, component) as dialer, asyncio.timeout(20.0):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await dialer.stub(BlobServiceStub).ReadBlob(request_, timeout=10.0).read()
        assert error_from_rpc(caught.value).reason == reason
