"""What an agent tells of a revision on its way: verified parts of the very files that it will lend, and no others."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import TransferOptions
from helios.storage.early.order import in_reading_order
from helios.storage.early.watching import GrowingFile, Growth
from helios.storage.manifest import Manifest, make_manifest, manifest_digest
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob
from tests.registry.test_chunk_index import MIB, weights
from tests.storage.harness import Agent, Mesh, digest_of, entry_of
from tests.storage.test_chunk_source import indexed_mesh

CONTENT = weights(1)
FILE = "model.safetensors"
CONFIG = b"{}"
SECONDS = 60.0
OPTIONS = TransferOptions(
    chunk_bytes=MIB // 2, in_flight=2, retry=RetryPolicy(max_attempts=3, base_seconds=0.01, cap_seconds=0.05)
)


@contextmanager
def gated(gate: threading.Event, *, status: int = 0) -> Iterator[BlobServer]:
    """Serves ranges in the first 2 MiB; the others when the gate opens, or with another status."""

    def script(request: Request) -> Answer:
        if request.first < 2 * MIB:
            return Answer()
        gate.wait(SECONDS)
        return Answer(status=status)

    with serve_blob(CONTENT, script=script, named={digest_of(CONFIG).hash: CONFIG}) as server:
        try:
            yield server
        finally:
            gate.set()


def shelve(mesh: Mesh, server: BlobServer) -> str:
    revision = mesh.shelf.add({FILE: CONTENT, "config.json": CONFIG})
    mesh.shelf.url = server.url.removesuffix("/blob")
    return revision


async def first(agent: Agent, revision: str, path: str, end: int) -> tuple[Growth, GrowingFile]:
    """The first that is told with so much of a file."""
    async with asyncio.timeout(SECONDS), aclosing(agent.client.watch_fetch(revision)) as changes:
        async for growth in changes:
            for file in growth.files:
                if file.path == path and any(span[0] == 0 and span[1] >= end for span in file.spans):
                    return growth, file
    raise AssertionError("the watch ended")


async def told(agent: Agent, revision: str, *, seconds: float) -> Growth:
    async with asyncio.timeout(seconds), aclosing(agent.client.watch_fetch(revision)) as changes:
        return await anext(changes)


async def test_parts_are_told_before_the_rest_is_sent_and_are_of_the_file_that_is_lent(tmp_path: Path) -> None:
    gate = threading.Event()
    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(gate) as server:
            revision = shelve(mesh, server)
            async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:

                async def lend() -> str:
                    async with agent.client.materialize(revision, holder="test") as lent:
                        assert Path(lent.path, FILE).read_bytes() == CONTENT
                        return lent.path + "/" + str(os.stat(Path(lent.path, FILE)).st_ino)  # noqa: PTH116

                lending = group.create_task(lend(), name="lend")
                # The small file is fetched first, though the other one decides how long it takes.
                await first(agent, revision, "config.json", len(CONFIG))
                growth, file = await first(agent, revision, FILE, MIB)
                assert (file.size_bytes, growth.awaited_paths) == (len(CONTENT), ())
                assert file.generation
                descriptor = os.open(file.place, os.O_RDONLY)
                try:
                    for start, end in file.spans:
                        assert os.pread(descriptor, end - start, start) == CONTENT[start:end]
                        # A range that begins before what is held back has a whole tensor.
                        assert end < 4 * MIB
                    gate.set()
                    assert (await lending).endswith(f"/{os.fstat(descriptor).st_ino}")
                finally:
                    os.close(descriptor)


async def test_without_chunks_nothing_is_told_before_the_whole_is_verified(tmp_path: Path) -> None:
    gate = threading.Event()
    async with indexed_mesh(tmp_path) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(gate) as server:
            revision = shelve(mesh, server)
            async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:

                async def lend() -> None:
                    async with agent.client.materialize(revision, holder="test"):
                        pass

                group.create_task(lend(), name="lend")
                growth, _ = await first(agent, revision, "config.json", len(CONFIG))
                while not any(first >= 2 * MIB for first, _ in server.ranges):
                    await asyncio.sleep(0.01)
                assert growth.awaited_paths == (FILE,)
                gate.set()


async def test_a_fetch_that_fails_tells_nothing_more(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()
    async with indexed_mesh(tmp_path, CONTENT) as mesh, mesh.agent(downloader=Downloader(OPTIONS)) as agent:
        with gated(gate, status=404) as server:
            revision = shelve(mesh, server)
            with pytest.raises(HeliosError):
                async with agent.client.materialize(revision, holder="test"):
                    pytest.fail("nothing is lent")
            with pytest.raises(TimeoutError):
                await told(agent, revision, seconds=1.0)


async def test_only_revisions_are_watched(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path) as mesh, mesh.agent() as agent:
        with pytest.raises(InvalidRequest):
            await told(agent, "latest", seconds=SECONDS)


def manifest_of(sizes: dict[str, int]) -> Manifest:
    entries = sorted((entry_of(path, bytes([size]) * size) for path, size in sizes.items()), key=lambda e: e.path)
    return make_manifest(manifest_digest(entries), entries)


def test_weights_come_last_and_in_the_order_of_their_numbers() -> None:
    sizes = {"model-10.safetensors": 9, "model-9.safetensors": 8, "tokenizer.json": 3, "config.json": 1, "x/v.txt": 2}
    manifest = manifest_of(sizes)
    paths = {entry.digest: entry.path for entry in manifest.entries}
    ordered = [paths[blob] for blob in in_reading_order(manifest, manifest.blobs)]
    assert ordered == ["tokenizer.json", "x/v.txt", "config.json", "model-9.safetensors", "model-10.safetensors"]


@given(st.dictionaries(st.sampled_from(["a", "b.safetensors", "c1.safetensors", "c2.txt", "d"]), st.integers(1, 4)))
def test_every_blob_is_fetched_once_also_under_two_names(sizes: dict[str, int]) -> None:
    if sizes:
        manifest = manifest_of(sizes)
        ordered = in_reading_order(manifest, manifest.blobs)
        assert len(ordered) == len(manifest.blobs) == len(set(ordered))
