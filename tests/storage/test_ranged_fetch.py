"""Blobs that come over a network: whole and verified or not there, and what was begun is gone on with."""

import asyncio
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from helios.mesh.errors import DigestMismatch, HeliosError, InvalidRequest, Unavailable, Unsupported
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate, Priority
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import Transfer, TransferOptions, Transferred
from helios.storage.client import StorageClient
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import DirectorySource
from helios.storage.manifest import Digest
from helios.storage.object_source import ObjectStoreSource
from helios.storage.ranged_fetch import PartialFiles
from helios.storage.sources import BlobLocation, Sources
from tests.mesh.transfer.blob_server import Answer, BlobServer, serve_blob
from tests.storage.harness import Mesh, agent_process, digest_of

CHUNK = 64 << 10
CONTENT = random.Random(11).randbytes(12 * CHUNK + 5)
DIGEST = digest_of(CONTENT)
OPTIONS = TransferOptions(
    chunk_bytes=CHUNK,
    in_flight=4,
    sync_bytes=CHUNK,
    retry=RetryPolicy(max_attempts=3, base_seconds=0.01, cap_seconds=0.05),
)


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with serve_blob(CONTENT) as blob:
        yield blob


def _store(server: BlobServer) -> ObjectStoreSource:
    return ObjectStoreSource(server.url.removesuffix("/blob"), {})


def _tier(root: Path, bytes_per_second: int = 0) -> DiskTier:
    return DiskTier(
        root, fetch_thread_count=1, downloader=Downloader(OPTIONS, DownloadGate(bytes_per_second=bytes_per_second))
    )


def _blob(root: Path, digest: Digest = DIGEST) -> Path:
    return root / "blobs" / "sha256" / digest.hash[:2] / digest.hash


def _partial(root: Path) -> list[str]:
    directory = root / "partial"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


async def test_a_blob_comes_from_an_object_store(server: BlobServer, tmp_path: Path) -> None:
    counted = 0

    def count(more: int) -> None:
        nonlocal counted
        counted += more

    async with _tier(tmp_path) as tier:
        await tier.fetch(_store(server), DIGEST, count)
        assert tier.inventory.has_blob(DIGEST)
    assert _blob(tmp_path).read_bytes() == CONTENT
    assert _blob(tmp_path).stat().st_mode & 0o777 == 0o444
    assert counted == len(CONTENT)
    assert _partial(tmp_path) == []
    assert {request.path for request in server.requests} == {f"/sha256/{DIGEST.hash[:2]}/{DIGEST.hash}"}


async def test_a_fetch_goes_on_after_a_failure_and_a_restart(server: BlobServer, tmp_path: Path) -> None:
    server.script = lambda request: Answer(status=404 if request.first >= 8 * CHUNK else 0)
    async with _tier(tmp_path) as tier:
        with pytest.raises(Unavailable) as caught:
            await tier.fetch(_store(server), DIGEST, lambda _: None)
        assert caught.value.reason == "SOURCE_UNAVAILABLE"
        assert not tier.inventory.has_blob(DIGEST)
    assert not _blob(tmp_path).exists()
    assert _partial(tmp_path) == [DIGEST.hash, f"{DIGEST.hash}.journal"]
    server.script = lambda _: Answer()
    server.requests.clear()
    async with _tier(tmp_path) as tier:
        await tier.fetch(_store(server), DIGEST, lambda _: None)
    assert _blob(tmp_path).read_bytes() == CONTENT
    assert sum(last + 1 - first for first, last in server.ranges) < len(CONTENT)
    assert _partial(tmp_path) == []


async def test_what_was_begun_has_its_room_already_and_others_give_theirs_way(
    server: BlobServer, tmp_path: Path
) -> None:
    """Otherwise a fetch that ended early would keep the disk too full for the one that goes on with it."""
    server.script = lambda request: Answer(status=404 if request.first >= 8 * CHUNK else 0)
    other = digest_of(b"other")
    async with _tier(tmp_path) as tier:
        assert await tier.copied_bytes(_store(server), [DIGEST]) == len(CONTENT)
        with pytest.raises(Unavailable):
            await tier.fetch(_store(server), DIGEST, lambda _: None)
        assert await tier.copied_bytes(_store(server), [DIGEST, other]) == other.size_bytes
        await tier.drop_unfinished([DIGEST])
        assert _partial(tmp_path) == [DIGEST.hash, f"{DIGEST.hash}.journal"]
        await tier.drop_unfinished([other])
        assert _partial(tmp_path) == []
        assert await tier.copied_bytes(_store(server), [DIGEST]) == len(CONTENT)


async def test_wrong_bytes_leave_nothing(server: BlobServer, tmp_path: Path) -> None:
    server.content = CONTENT[::-1]
    async with _tier(tmp_path) as tier:
        with pytest.raises(DigestMismatch):
            await tier.fetch(_store(server), DIGEST, lambda _: None)
        assert not tier.inventory.has_blob(DIGEST)
    assert not _blob(tmp_path).exists()
    assert _partial(tmp_path) == []


async def test_a_cancelled_fetch_ends_soon_and_is_kept(server: BlobServer, tmp_path: Path) -> None:
    async with _tier(tmp_path, bytes_per_second=4 * CHUNK) as tier, asyncio.timeout(10.0):
        task = asyncio.get_running_loop().create_task(tier.fetch(_store(server), DIGEST, lambda _: None))
        await asyncio.sleep(0.6)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started < 2.0
    assert not _blob(tmp_path).exists()
    assert _partial(tmp_path) == [DIGEST.hash, f"{DIGEST.hash}.journal"]


async def test_how_urgent_a_fetch_is_may_change_while_it_runs(server: BlobServer, tmp_path: Path) -> None:
    priorities: list[Priority] = []

    class Watched(Downloader):
        def fetch(self, transfer: Transfer) -> Transferred:
            assert not isinstance(transfer.priority, Priority), "it is asked anew for each chunk"
            priorities.append(transfer.priority())
            return super().fetch(transfer)

    async with DiskTier(tmp_path, fetch_thread_count=1, downloader=Watched(OPTIONS)) as tier:
        await tier.fetch(_store(server), DIGEST, lambda _: None, priority=lambda: Priority.PREFETCH)
        await tier.fetch(_store(server), DIGEST, lambda _: None)
    assert priorities == [Priority.PREFETCH, Priority.START]


def test_what_nobody_goes_on_with_goes(tmp_path: Path) -> None:
    files = DiskTier(tmp_path, fetch_thread_count=1).store.files
    partial = PartialFiles(tmp_path, files)
    assert partial.tidy(0.0) == 0
    (tmp_path / "partial").mkdir()
    for name, age_seconds in (("old", 100_000), ("new", 10)):
        path = tmp_path / "partial" / name
        path.touch()
        stamp = path.stat().st_mtime - age_seconds
        os.utime(path, (stamp, stamp))
    assert partial.tidy(86_400.0) == 1
    assert _partial(tmp_path) == ["new"]


def test_the_first_location_that_is_here_is_taken(server: BlobServer, tmp_path: Path) -> None:
    here, gone = BlobLocation(tmp_path.as_uri()), BlobLocation((tmp_path / "gone").as_uri())
    store = BlobLocation(server.url)
    sources = Sources({"s3": {"region": "x"}})
    assert isinstance(sources.open([gone, store]), ObjectStoreSource)
    assert isinstance(sources.open([store, here]), ObjectStoreSource)
    assert isinstance(sources.open([here, store]), DirectorySource)
    assert isinstance(sources.open([gone]), DirectorySource), "the error names the path"
    assert sources.open([store]) is sources.open([store]), "connections are kept"
    assert isinstance(sources.open([BlobLocation("ftp://x"), here]), DirectorySource)
    with pytest.raises(Unsupported):
        sources.open([BlobLocation("ftp://host/blobs")])
    for wrong in ("file://elsewhere/x", "file:relative", "file:///a/../b"):
        with pytest.raises(InvalidRequest):
            sources.open([BlobLocation(wrong)])


def test_an_object_store_is_read_at_offsets_too(server: BlobServer) -> None:
    reader = _store(server).open(DIGEST)
    buffer = memoryview(bytearray(100))
    assert reader.read_into(10, buffer) == 100
    assert buffer == CONTENT[10:110]
    assert reader.read_into(len(CONTENT) - 1, buffer) == 1
    assert reader.read_into(len(CONTENT), buffer) == 0
    reader.close()


async def test_an_agent_whose_registry_keeps_blobs_in_an_object_store(mesh: Mesh, server: BlobServer) -> None:
    revision = mesh.shelf.add({"model.safetensors": CONTENT})
    mesh.shelf.url = server.url.removesuffix("/blob")
    async with mesh.agent() as agent, agent.client.materialize(revision, holder="test") as lent:
        assert Path(lent.path, "model.safetensors").read_bytes() == CONTENT
        assert lent.fetched_bytes == len(CONTENT)


@pytest.mark.slow
async def test_an_agent_that_is_killed_while_it_fetches_goes_on(mesh: Mesh, server: BlobServer) -> None:
    revision = mesh.shelf.add({"model.safetensors": CONTENT})
    mesh.shelf.url = server.url.removesuffix("/blob")
    flags = (f"--fetch.chunk-bytes={CHUNK}", f"--fetch.bytes-per-second={8 * CHUNK}", "--fetch.in-flight=1")
    async with (
        agent_process(mesh, *flags) as agent,
        asyncio.timeout(60.0),
        mesh.dial(agent.address) as dialer,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(_look(StorageClient(dialer), revision))
        while len(server.ranges) < 11:
            await asyncio.sleep(0.02)
        agent.kill()
        server.requests.clear()
        await agent.start()
    assert 0 < len(server.ranges) <= 6, "what was synced before the kill was not fetched again"


async def _look(client: StorageClient, revision: str) -> None:
    """Asks until there is an answer, over the agent's restart."""
    while True:
        with suppress(HeliosError):
            async with client.materialize(revision, holder="test") as lent:
                assert Path(lent.path, "model.safetensors").read_bytes() == CONTENT
                return
        await asyncio.sleep(0.1)
