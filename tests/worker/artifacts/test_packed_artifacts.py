"""Packed weights between nodes: proven, published within bounds, linked where that can be, refused where bad."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from helios.mesh.errors import Corrupted
from helios.worker.artifacts.packed_shelf import PackedShelf
from helios.worker.artifacts.requests import PACKED_WEIGHTS, ArtifactRequest
from helios.worker.artifacts.shelf import Cancelled
from helios.worker.replica.artifact_directory import drop, mark_proven
from helios.worker.replica.packed_weights import MANIFEST, WEIGHTS, PackedInputs, find, mark_unfit
from helios.worker.replica.packed_writer import ArtifactWriter
from helios.worker.settings import ArtifactSettings, WorkerSettings
from tests.registry.tiny import write_model
from tests.worker.artifacts.nodes import Cluster, Node, blob_of, open_cluster

DATA = bytes(range(256)) * 64
SURROUNDINGS = {"engine_version": "0.32.0", "torch_version": "2", "driver": "", "architecture": "x86_64-0"}


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


def inputs_of(cluster: Cluster) -> PackedInputs:
    return PackedInputs(revision=cluster.revision, flags={"dtype": "bfloat16"}, **SURROUNDINGS)


def request_of(cluster: Cluster, replica_id: str = "") -> ArtifactRequest:
    return ArtifactRequest(PACKED_WEIGHTS, inputs_of(cluster).document, cluster.revision, replica_id)


def make(node: Node, cluster: Cluster, data: bytes = DATA, *, is_proven: bool = True) -> Path:
    """Does what the launcher's child does, and then a start."""
    with ArtifactWriter(str(node.packed), inputs_of(cluster)) as writer:
        writer.append(memoryview(data))
        path = writer.publish("skeleton", (), (), ())
    if is_proven:
        mark_proven(path)
    return path


async def publish(node: Node, cluster: Cluster, data: bytes = DATA) -> str:
    make(node, cluster, data)
    node.keeper.note_proven(request_of(cluster, "user"))
    return await node.wait_published(request_of(cluster))


def found(node: Node, cluster: Cluster) -> bytes | None:
    """Returns the weights that a start of this node would map."""
    taken = find(str(node.packed), inputs_of(cluster))
    if taken is None:
        return None
    taken.release()
    return (taken.path / WEIGHTS).read_bytes()


async def test_what_one_node_packed_another_links_through_its_storage_agent(
    cluster: Cluster, first: Node, second: Node
) -> None:
    request = request_of(cluster)
    assert await second.keeper.take(request) == "nobody has made it yet"
    await publish(first, cluster)
    assert await second.keeper.take(request) == ""
    assert found(second, cluster) == DATA
    weights = second.packed / request.key / WEIGHTS
    # One inode: the registry's blob, the storage agent's with its view, and what replicas map.
    assert weights.samefile(blob_of(cluster, DATA))
    assert [one.lease_count for one in second.agent.materializer.residency()] == [0]
    for one in second.agent.materializer.residency():
        await second.agent.client.evict(one.revision)
    assert found(second, cluster) == DATA
    assert await second.keeper.take(request) == "", "it is there"
    (artifact,) = await second.client.list_artifacts(revision=cluster.revision)
    assert (artifact.kind, artifact.producer) == (PACKED_WEIGHTS, "first")


async def test_where_disks_differ_it_is_copied(cluster: Cluster, first: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await publish(first, cluster)

    async with cluster.node("far", can_link=False) as far:
        link = os.link

        def link_elsewhere(source: Path, target: Path, *, follow_symlinks: bool = True) -> None:
            if far.packed in target.parents:
                raise OSError(errno.EXDEV, "another file system")
            link(source, target, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(os, "link", link_elsewhere)
        assert await far.keeper.take(request_of(cluster)) == ""
        assert found(far, cluster) == DATA
        assert (far.packed / request_of(cluster).key / WEIGHTS).stat().st_nlink == 1


async def test_only_what_a_start_proved_and_fits_the_bounds_is_published(cluster: Cluster, tmp_path: Path) -> None:
    request = request_of(cluster, "user")
    cases = {"unproven": 1 << 20, "unfit": 1 << 20, "large": len(DATA) - 1, "never": 0, "refused": 1 << 20}
    for name, offered_bytes in cases.items():
        async with cluster.node(name, offered_bytes=offered_bytes) as node:
            path = make(node, cluster, is_proven=name != "unproven")
            if name == "refused":
                with ArtifactWriter(str(node.packed), inputs_of(cluster)) as writer:
                    mark_proven(writer.refuse("quantised"))
            if name == "unfit":
                mark_unfit(path)
            node.keeper.note_proven(request)
            await asyncio.sleep(0.15)
            assert await node.client.find(request.kind, request.key) is None, name
    async with cluster.node("small", offered_bytes=len(DATA)) as node:
        await publish(node, cluster)
        # What is sent is linked aside, and goes.
        async with asyncio.timeout(5):
            while list((node.directory / "scratch").iterdir()):
                await asyncio.sleep(0.01)


async def test_a_flipped_bit_is_found_before_it_is_used_and_the_artifact_goes(
    cluster: Cluster, first: Node, second: Node
) -> None:
    await publish(first, cluster)
    blob = blob_of(cluster, DATA)
    blob.chmod(0o644)
    blob.write_bytes(DATA[:-1] + b"\0")
    blob.chmod(0o444)
    assert await second.keeper.take(request_of(cluster)) == "DIGEST_MISMATCH"
    assert found(second, cluster) is None
    await second.wait_withdrawn(request_of(cluster))


async def test_what_says_something_else_than_its_name_is_refused_and_goes(
    cluster: Cluster, first: Node, second: Node
) -> None:
    other = replace(inputs_of(cluster), flags={"dtype": "float32"})
    with ArtifactWriter(str(first.packed), other) as writer:
        path = writer.publish("skeleton", (), (), ())
    request = request_of(cluster)
    await first.client.put(
        kind=request.kind,
        inputs=request.inputs,
        revision=request.revision,
        producer="x",
        files={name: path / name for name in (MANIFEST, WEIGHTS)},
        timeout_seconds=5,
    )
    assert await second.keeper.take(request) == Corrupted.default_reason
    assert list(second.packed.glob("*")) == []
    await second.wait_withdrawn(request)


async def test_one_that_did_no_good_is_withdrawn_and_replaced_by_what_the_node_packs(
    cluster: Cluster, first: Node, second: Node
) -> None:
    request = request_of(cluster)
    bad = await publish(first, cluster)
    assert await second.keeper.take(request) == ""
    # The end of a replica says nothing: it may have been any that ran when it was brought.
    second.keeper.note_end("", is_failure=True)
    await asyncio.sleep(0.1)
    assert await second.wait_published(request) == bad
    second.keeper.note_refused(request)
    await second.wait_withdrawn(request)
    drop(second.packed / request.key)
    assert await second.keeper.take(request) == "a replica failed under it"
    own = DATA[::-1]
    await publish(second, cluster, own)
    async with cluster.node("third") as third:
        assert await third.keeper.take(request) == ""
        assert found(third, cluster) == own


async def test_one_that_was_made_here_and_did_no_good_takes_nobody_elses_down(
    cluster: Cluster, first: Node, second: Node
) -> None:
    digest = await publish(first, cluster)
    make(second, cluster, b"other")
    second.keeper.note_refused(request_of(cluster))
    await asyncio.sleep(0.1)
    assert await second.wait_published(request_of(cluster)) == digest


async def test_they_have_a_longer_time_than_what_a_start_waits_for(cluster: Cluster, first: Node) -> None:
    await publish(first, cluster)
    settings = ArtifactSettings(take_seconds=1e-6, take_weights_seconds=20.0)
    async with cluster.node("slow", settings) as node:
        assert "not here after" in await node.keeper.take(cluster.request())
        assert await node.keeper.take(request_of(cluster)) == ""


def test_nothing_is_left_where_nobody_waits_any_more(tmp_path: Path) -> None:
    inputs = PackedInputs(revision="sha256:1", flags={}, **SURROUNDINGS)
    with ArtifactWriter(str(tmp_path / "lent"), inputs) as writer:
        writer.append(memoryview(DATA))
        lent = writer.publish("skeleton", (), (), ())
    shelf, stop = PackedShelf(tmp_path / "packed", offered_bytes=0), threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        shelf.install(inputs.key, lent, stop)
    assert list((tmp_path / "packed").iterdir()) == []
    assert shelf.state(inputs.key) == ""
    stop.clear()
    assert shelf.install(inputs.key, lent, stop) == shelf.state(inputs.key)
    with pytest.raises(FileNotFoundError):
        shelf.pack("0" * 64, tmp_path)


@pytest.mark.parametrize(
    ("target", "policy", "is_published"),
    [
        ("127.0.0.1:9000", "remote", False),
        ("localhost:9000", "remote", False),
        ("[::1]:9000", "remote", False),
        ("unix:/run/registry", "remote", False),
        ("10.0.0.1:9000", "remote", True),
        ("[fd00::1]:9000", "remote", True),
        ("registry.example:9000", "remote", True),
        ("127.0.0.1:9000", "always", True),
        ("10.0.0.1:9000", "never", False),
    ],
)
def test_weights_are_given_away_where_the_registry_is_elsewhere(target: str, policy: str, is_published: bool) -> None:
    artifacts = ArtifactSettings.model_validate({"publish_weights": policy, "publish_weights_bytes": 5})
    settings = WorkerSettings(registry_target=target, artifacts=artifacts)
    assert settings.published_weights_bytes == (5 if is_published else 0)
