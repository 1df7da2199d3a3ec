"""Loading begins before all bytes are here, with what is verified, and counts only once the whole is."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as load_all

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.mesh.errors import Corrupted, HeliosError
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import TransferOptions
from helios.storage.early.loading import EarlyFiles, Tensor, lend_early
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob
from tests.registry.test_chunk_index import MIB, weights
from tests.storage.harness import Mesh
from tests.storage.test_chunk_source import indexed_mesh

CONTENT = weights(1)
FILE = "model.safetensors"
SECONDS = 60.0
OPTIONS = TransferOptions(
    chunk_bytes=MIB // 2, in_flight=2, retry=RetryPolicy(max_attempts=3, base_seconds=0.01, cap_seconds=0.05)
)


@contextmanager
def gated(content: bytes, open_bytes: int, gate: threading.Event) -> Iterator[BlobServer]:
    """Serves ranges that begin before `open_bytes`; the others when the gate opens."""

    def script(request: Request) -> Answer:
        if request.first >= open_bytes:
            gate.wait(SECONDS)
        return Answer()

    with serve_blob(content, script=script) as server:
        try:
            yield server
        finally:
            gate.set()


def shelve(mesh: Mesh, server: BlobServer, content: bytes = CONTENT) -> str:
    revision = mesh.shelf.add({FILE: content})
    mesh.shelf.url = server.url.removesuffix("/blob")
    return revision


async def all_tensors(early: EarlyFiles) -> list[Tensor]:
    return [tensor async for tensor in early.tensors(FILE)]


async def test_the_first_tensors_are_loaded_before_the_last_bytes_are_sent(tmp_path: Path) -> None:
    gate = threading.Event()
    order: list[str] = []

    async def load(early: EarlyFiles) -> list[Tensor]:
        tensors = []
        async for tensor in early.tensors(FILE):
            tensors.append(tensor)
            order.append(tensor.name)
            # Without this, the fetch would never end: it waits for the load.
            gate.set()
        return tensors

    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(CONTENT, 2 * MIB, gate) as server:
            revision = shelve(mesh, server)
            async with (
                asyncio.timeout(SECONDS),
                lend_early(agent.dialer, agent.client, revision, holder="test", load=load) as (lent, tensors),
            ):
                expected = load_all(Path(lent.path, FILE).read_bytes())
                assert sorted(order) == sorted(expected)
                for tensor in tensors:
                    assert tensor.shape == expected[tensor.name].shape
                    assert np.array_equal(
                        np.frombuffer(tensor.data, np.uint8), expected[tensor.name].view(np.uint8).ravel()
                    )
                # Sorted by their bytes, and no byte was fetched twice.
                assert sum(last + 1 - first for first, last in server.ranges) == len(CONTENT)


async def test_a_revision_that_is_here_is_loaded_from_what_is_lent(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent() as agent:
        with serve_blob(CONTENT) as server:
            revision = shelve(mesh, server)
            for _ in range(2):
                async with (
                    asyncio.timeout(SECONDS),
                    lend_early(agent.dialer, agent.client, revision, holder="t", load=all_tensors) as (_, tensors),
                ):
                    assert len(tensors) == len(load_all(CONTENT))


async def test_without_chunks_nothing_is_served_before_the_whole_is_verified(tmp_path: Path) -> None:
    gate = threading.Event()
    read: list[str] = []

    async def load(early: EarlyFiles) -> int:
        await early.read(FILE, 0, 8)
        read.append("header")
        return 1

    async with indexed_mesh(tmp_path) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(CONTENT, 2 * MIB, gate) as server:
            revision = shelve(mesh, server)
            async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:

                async def lend() -> None:
                    async with lend_early(agent.dialer, agent.client, revision, holder="t", load=load):
                        assert read == ["header"]

                group.create_task(lend(), name="lend")
                while not any(first >= 2 * MIB for first, _ in server.ranges):
                    await asyncio.sleep(0.01)
                assert not read
                gate.set()


async def test_a_fetch_that_fails_ends_the_load(tmp_path: Path) -> None:
    ended: list[str] = []

    async def load(early: EarlyFiles) -> int:
        try:
            await all_tensors(early)
        except asyncio.CancelledError:
            ended.append("load")
            raise
        return 1

    def script(request: Request) -> Answer:
        return Answer(status=404) if request.first >= 2 * MIB else Answer()

    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with serve_blob(CONTENT, script=script) as server:
            revision = shelve(mesh, server)
            with pytest.raises(HeliosError):
                async with (
                    asyncio.timeout(SECONDS),
                    lend_early(agent.dialer, agent.client, revision, holder="t", load=load),
                ):
                    pytest.fail("nothing is lent")
    assert ended == ["load"]


@pytest.mark.parametrize("is_here", [False, True])
async def test_what_a_load_raises_comes_as_it_is(tmp_path: Path, is_here: bool) -> None:
    gate = threading.Event()

    async def load(early: EarlyFiles) -> int:
        await early.read(FILE, 0, 8)
        raise LookupError("no such tensor")

    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(CONTENT, 2 * MIB, gate) as server:
            revision = shelve(mesh, server)
            if is_here:
                gate.set()
                async with agent.client.materialize(revision, holder="t"):
                    pass
            with pytest.raises(LookupError, match="no such tensor"):
                async with (
                    asyncio.timeout(SECONDS),
                    lend_early(agent.dialer, agent.client, revision, holder="t", load=load),
                ):
                    pytest.fail("nothing was loaded")


def told(file: Path, *spans: tuple[int, int]) -> list[pb.GrowingFile]:
    listed = [pb.VerifiedSpan(offset=start, length=end - start) for start, end in spans]
    return [pb.GrowingFile(path="w", file=str(file), size_bytes=file.stat().st_size, spans=listed)]


async def test_what_was_read_does_not_count_when_the_fetch_began_anew(tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(b"0123456789")
    early = EarlyFiles()
    early.take(told(tmp_path / "partial", (0, 4), (6, 10)))
    assert bytes(await early.read("w", 0, 4)) == b"0123"
    early.take(told(tmp_path / "partial", (0, 2)))
    with pytest.raises(Corrupted):
        await early.read("w", 0, 2)


async def test_only_the_very_file_that_was_read_counts_as_lent(tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(b"0123456789")
    lent, other = tmp_path / "lent", tmp_path / "other"
    for directory in (lent, other):
        directory.mkdir()
    (lent / "w").hardlink_to(tmp_path / "partial")
    (other / "w").write_bytes(b"0123456789")
    for directory, is_same in ((lent, True), (other, False)):
        early = EarlyFiles()
        early.take(told(tmp_path / "partial", (0, 4)))
        assert early.complete(directory) is is_same
    whole = EarlyFiles()
    assert whole.complete(other)
    assert bytes(await whole.read("w", 3, 6)) == b"345"


async def test_an_empty_file_is_read_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    early = EarlyFiles()
    early.take(told(tmp_path / "w", (0, 0)))
    assert early.complete(tmp_path)
    assert bytes(await early.read("w", 0, 0)) == b""
    with pytest.raises(Corrupted, match="ends before"):
        await early.read("w", 0, 1)


async def test_a_range_behind_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"0123456789")
    early = EarlyFiles()
    early.complete(tmp_path)
    with pytest.raises(Corrupted, match="ends before"):
        await early.read("w", 5, 11)


@pytest.mark.parametrize(
    "content", [b"\xff" * 40, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"1}"]
)
async def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    early = EarlyFiles()
    early.complete(tmp_path)
    with pytest.raises(Corrupted, match="no safetensors"):
        await all_tensors(early)
