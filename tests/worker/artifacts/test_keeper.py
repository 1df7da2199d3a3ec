"""Artifacts between nodes, over real mTLS with a real registry and real storage agents: what one made, others use, and
whatever goes wrong ends in making it anew.
"""

import asyncio
import contextlib
import tarfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helios.mesh.errors import Corrupted
from helios.worker.artifacts.asking import take, tell_proven
from helios.worker.settings import ArtifactSettings
from tests.registry.tiny import write_model
from tests.worker.artifacts.nodes import INPUTS, Cluster, Node, open_cluster

CODE = {"torch_compile_cache/x/model": b"compiled code", "torch_compile_cache/x/kernel.so": b"ELF" * 1000}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with open_cluster(tmp_path, write_model(tmp_path / "model")) as opened:
        yield opened


@pytest.fixture
async def first(cluster: Cluster) -> AsyncIterator[Node]:
    async with cluster.node("first") as node:
        yield node


@pytest.fixture
async def second(cluster: Cluster) -> AsyncIterator[Node]:
    async with cluster.node("second") as node:
        yield node


async def publish(node: Node, cluster: Cluster, files: dict[str, bytes] = CODE) -> str:
    request = cluster.request("maker")
    node.compile(request, files)
    node.keeper.note_proven(request)
    return await node.wait_published(request)


async def test_what_one_node_made_another_takes(cluster: Cluster, first: Node, second: Node) -> None:
    request = cluster.request("taker")
    assert await second.keeper.take(request) == "nobody has made it yet"
    await publish(first, cluster)
    assert await second.keeper.take(request) == ""
    assert second.found(request) == CODE
    # It is the node's own copy: compilers write there, and blobs are everybody's.
    assert all(path.stat().st_nlink == 1 for path in second.path(request).rglob("*") if path.is_file())
    assert (await second.client.list_artifacts(revision=cluster.revision))[0].producer == "first"
    # Nothing is lent any more, so the agent may give the room away.
    assert [one.lease_count for one in second.agent.materializer.residency()] == [0]


async def test_only_what_proved_good_is_published_and_once(cluster: Cluster, first: Node, second: Node) -> None:
    request = cluster.request("r1")
    first.compile(request, CODE)
    first.keeper.note_end("r1", is_failure=True)
    await asyncio.sleep(0.1)
    assert await first.client.find(request.kind, request.key) is None
    digest = await publish(first, cluster)
    second.compile(request, {"other": b"made at the same time"})
    second.keeper.note_proven(request)
    await asyncio.sleep(0.3)
    assert await second.wait_published(request) == digest


async def test_a_directory_that_is_written_to_waits(cluster: Cluster, first: Node) -> None:
    request = cluster.request()
    first.compile(request, {"a": b""})
    first.keeper.note_proven(request)
    for length in range(1, 6):
        first.compile(request, {"a": b"x" * length})
        await asyncio.sleep(0.01)
    await first.wait_published(request)
    async with cluster.node("later") as later:
        assert await later.keeper.take(request) == ""
        assert later.found(request) == {"a": b"xxxxx"}


async def test_an_artifact_under_which_a_replica_failed_is_taken_no_more(
    cluster: Cluster, first: Node, second: Node
) -> None:
    request = cluster.request("victim")
    await publish(first, cluster)
    assert await second.keeper.take(request) == ""
    second.keeper.note_end("victim", is_failure=True)
    await second.wait_withdrawn(request)
    digest = await publish(first, cluster)
    assert await second.keeper.take(cluster.request("next")) == "a replica failed under it"
    assert await first.wait_published(request) == digest


async def test_one_that_stops_or_proves_good_takes_nothing_down(cluster: Cluster, first: Node, second: Node) -> None:
    digest = await publish(first, cluster)
    for number, is_proven in enumerate((False, True)):
        request = cluster.request(f"r{number}")
        assert await second.keeper.take(request) == ""
        if is_proven:
            second.keeper.note_proven(request)
        second.keeper.note_end(request.replica_id, is_failure=is_proven)
    await asyncio.sleep(0.3)
    assert await second.wait_published(cluster.request()) == digest


async def test_an_artifact_that_spared_nothing_is_replaced(cluster: Cluster, first: Node, second: Node) -> None:
    useless = await publish(first, cluster)
    request = cluster.request("r2")
    assert await second.keeper.take(request) == ""
    second.compile(request, {"torch_compile_cache/y/model": b"compiled again"})
    second.keeper.note_proven(request)
    await second.wait_published(request, other_than=useless)
    async with cluster.node("third") as third:
        assert await third.keeper.take(request) == ""
        assert third.found(request)["torch_compile_cache/y/model"] == b"compiled again"


async def test_a_flipped_bit_is_found_before_it_is_used_and_the_artifact_goes(
    cluster: Cluster, first: Node, second: Node
) -> None:
    await publish(first, cluster)
    request = cluster.request()
    (blob,) = {cluster.parts.state.root / path for path in cluster.parts.files() if is_archive(cluster, path)}
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    blob.chmod(0o444)
    assert await second.keeper.take(request) == "DIGEST_MISMATCH"
    assert not second.path(request).exists()
    await second.wait_withdrawn(request)


def is_archive(cluster: Cluster, path: str) -> bool:
    return tarfile.is_tarfile(cluster.parts.state.root / path)


async def test_a_lost_blob_is_a_reason_and_the_artifact_goes(cluster: Cluster, first: Node, second: Node) -> None:
    await publish(first, cluster)
    (blob,) = {cluster.parts.state.root / path for path in cluster.parts.files() if is_archive(cluster, path)}
    blob.unlink()
    assert await second.keeper.take(cluster.request()) == "BLOB_MISSING"
    await second.wait_withdrawn(cluster.request())


async def test_what_is_no_archive_is_a_reason(cluster: Cluster, first: Node, second: Node, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    request = cluster.request()
    await first.client.put(
        kind=request.kind,
        inputs=request.inputs,
        revision=request.revision,
        producer="x",
        files={"files.tar": tmp_path / "junk"},
        timeout_seconds=5,
    )
    assert await second.keeper.take(request) == Corrupted.default_reason
    assert list((second.directory / "compiled").iterdir()) == []


async def test_without_a_registry_the_answer_is_no_and_comes_at_once(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, write_model(tmp_path / "model")) as cluster:
        opened = cluster.node("lonely")
        node = await opened.__aenter__()
    try:
        async with asyncio.timeout(3):
            assert await node.keeper.take(cluster.request()) == "UNAVAILABLE"
    finally:
        await opened.__aexit__(None, None, None)


async def test_a_start_waits_for_a_bounded_time(cluster: Cluster, first: Node) -> None:
    await publish(first, cluster)
    is_asked, is_free = threading.Event(), threading.Event()

    class Slow:
        """A shelf whose disk hangs."""

        def __init__(self, node: Node) -> None:
            self._shelf = node.shelf

        def has(self, key: str) -> bool:
            return self._shelf.has(key)

        def is_offered(self, key: str) -> bool:
            return self._shelf.is_offered(key)

        def state(self, key: str) -> str:
            return self._shelf.state(key)

        def pack(self, key: str, into: Path) -> dict[str, Path]:
            return dict(self._shelf.pack(key, into))

        def install(self, key: str, files: Path, stop: threading.Event) -> str:
            is_asked.set()
            is_free.wait(10)
            return self._shelf.install(key, files, stop)

    async with cluster.node("slow", ArtifactSettings(take_seconds=0.4)) as node:
        node.keeper._shelves = {"compile-cache": Slow(node)}
        began_at = asyncio.get_running_loop().time()
        why = await node.keeper.take(cluster.request())
        assert asyncio.get_running_loop().time() - began_at < 2
        assert why == "it was not here after 0.4 s"
        assert is_asked.is_set()
        is_free.set()
        await asyncio.sleep(0.2)
        # The replica compiles by now: nothing is put under its feet.
        assert not node.path(cluster.request()).exists()
        assert node.keeper._taking == {}


async def test_starts_at_once_share_one_fetch(cluster: Cluster, first: Node, second: Node) -> None:
    await publish(first, cluster)
    requests = [cluster.request(f"r{number}") for number in range(4)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(second.keeper.take(request)) for request in requests]
    assert [task.result() for task in tasks] == [""] * 4
    assert len(second.keeper._given) == 1


async def test_the_switches(cluster: Cluster, first: Node) -> None:
    digest = await publish(first, cluster)
    async with cluster.node("proud", ArtifactSettings(take=False)) as proud:
        assert await proud.keeper.take(cluster.request()) == "this worker takes nothing from others"
    inputs = INPUTS.replace("bfloat16", "float32")
    request = cluster.request("r1", inputs)
    async with cluster.node("mean", ArtifactSettings(publish=False)) as mean:
        mean.compile(request, CODE)
        mean.keeper.note_proven(request)
        await asyncio.sleep(0.2)
        assert await mean.client.find(request.kind, request.key) is None
        assert await mean.wait_published(cluster.request()) == digest


async def test_what_a_replica_asks_and_tells_over_the_socket(cluster: Cluster, first: Node, second: Node) -> None:
    request = cluster.request()
    first.compile(request, CODE)
    proven: list[tuple[str, str]] = []
    answered = iter((False, True))

    def prove(kind: str, key: str) -> bool:
        proven.append((kind, key))
        return True

    await tell_proven(
        first.door,
        [request],
        has_answered=lambda: next(answered),
        prove=prove,
    )
    assert proven == [(request.kind, request.key)]
    await second.wait_published(request)
    assert await asyncio.to_thread(take, second.door, request, timeout_seconds=10)
    assert second.found(request) == CODE


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"{}\n", b"[1]\n", b'{"ask":"take","kind":1}\n', b"x" * 300_000, b"[" * 90_000]
)
async def test_nonsense_at_the_door_is_borne(first: Node, cluster: Cluster, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(first.door)
    writer.write(line)
    writer.write_eof()
    answer = b""
    # A line without an end is cut off while it comes.
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            answer = await reader.read()
    writer.close()
    assert answer == b"" or b'"is_here":false' in answer
    assert await asyncio.to_thread(take, first.door, cluster.request(), timeout_seconds=5) is False


async def test_a_supervisor_that_is_away_or_hangs_is_no_obstacle(cluster: Cluster, tmp_path: Path) -> None:
    assert take(str(tmp_path / "nobody"), cluster.request(), timeout_seconds=1) is False

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.close()

    server = await asyncio.start_unix_server(hang, tmp_path / "hung")
    async with server:
        assert await asyncio.to_thread(take, str(tmp_path / "hung"), cluster.request(), timeout_seconds=-1.8) is False
