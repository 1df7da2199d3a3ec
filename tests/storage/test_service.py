"""The agent through a real server, dialer and registry: what clients see, and what must be on the disk after."""

import asyncio
import contextlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.mesh import names
from helios.mesh.errors import (
    DigestMismatch,
    DiskFull,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RevisionNotFound,
    Unavailable,
)
from helios.mesh.transfer.progress import TransferProgress
from helios.storage.client import CorruptBlob, LeaseLost, StorageClient, Tier
from helios.storage.metrics import TIERS
from helios.storage.tiers import TierKind, TierOptions
from tests.mesh.transfer.blob_server import Answer, serve_blob
from tests.storage.harness import Agent, Mesh, digest_of, entry_of, files_below, is_clean, raw_stream
from tests.storage.test_moves import flip

MIB = 1 << 20
FILES = {"config.json": b"{}", "weights/model.safetensors": os.urandom(3 * MIB), "empty.txt": b""}


@pytest.mark.parametrize("is_link_allowed", [True, False])
async def test_materialises_verified_read_only_files(mesh: Mesh, is_link_allowed: bool) -> None:
    revision = mesh.shelf.add(FILES)
    async with (
        mesh.agent(is_link_allowed=is_link_allowed) as agent,
        agent.client.materialize(revision, holder="test") as lent,
    ):
        assert files_below(Path(lent.path)) == set(FILES)
        for path, content in FILES.items():
            file = Path(lent.path) / path
            assert file.read_bytes() == content
            assert file.stat().st_mode & 0o777 == 0o444
            is_shared = file.stat().st_ino == mesh.shelf.blob_path(digest_of(content)).stat().st_ino
            assert is_shared == is_link_allowed
        assert lent.fetched_bytes == sum(map(len, FILES.values()))
        assert not list((agent.root / "tmp").iterdir())


async def test_second_materialise_fetches_nothing(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        async with agent.client.materialize(revision, holder="first") as first:
            pass
        async with agent.client.materialize(revision, holder="second") as second:
            assert second.fetched_bytes == 0
            assert second.path == first.path
            assert second.lease_id != first.lease_id
        assert mesh.shelf.call_count == 1


async def test_revisions_share_blobs(mesh: Mesh) -> None:
    one, other = os.urandom(MIB), os.urandom(2 * MIB)
    base = mesh.shelf.add({"a": one})
    tuned = mesh.shelf.add({"a": one, "b": other, "again": other})
    async with mesh.agent() as agent:
        async with agent.client.materialize(base, holder="t"):
            pass
        async with agent.client.materialize(tuned, holder="t") as lent:
            assert lent.fetched_bytes == len(other)
        residency = await agent.client.residency()
        assert residency.tiers[0].used_bytes == 3 * MIB
        assert await agent.client.evict(tuned) == len(other)
        assert [r.revision for r in (await agent.client.residency()).revisions] == [base]
        assert await agent.client.evict(tuned) == 0


@pytest.mark.parametrize("is_link_allowed", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "short", "long"])
async def test_a_corrupt_source_leaves_nothing(mesh: Mesh, damage: str, is_link_allowed: bool) -> None:
    good, bad = os.urandom(MIB), bytearray(os.urandom(2 * MIB))
    revision = mesh.shelf.add({"good": good, "bad": bytes(bad)})
    digest = digest_of(bytes(bad))
    if damage == "flipped":
        bad[MIB] ^= 1
    path = mesh.shelf.blob_path(digest)
    path.chmod(0o644)
    path.write_bytes({"flipped": bad, "short": bad[:-1], "long": bad + b"!"}[damage])
    path.chmod(0o444)
    async with mesh.agent(is_link_allowed=is_link_allowed) as agent:
        with pytest.raises(DigestMismatch) as raised:
            async with agent.client.materialize(revision, holder="t"):
                pytest.fail("corrupt bytes were lent")
        assert raised.value.metadata["digest"] == f"sha256:{digest.hash}"
        assert is_clean(agent.root)
        assert (await agent.client.residency()).revisions == ()


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "a/../../escape", "a//b", "./a", "a\\b", "x\0y"])
async def test_a_harmful_path_is_refused_before_anything_is_written(mesh: Mesh, path: str) -> None:
    revision = mesh.shelf.add_entries([entry_of(path, b"evil")], [b"evil"])
    async with mesh.agent() as agent:
        with pytest.raises(InvalidRequest) as raised:
            async with agent.client.materialize(revision, holder="t"):
                pytest.fail("a harmful manifest was lent")
        assert raised.value.reason == "INVALID_MANIFEST"
        assert is_clean(agent.root)


async def test_a_manifest_of_another_revision_is_refused(mesh: Mesh) -> None:
    wanted, other = mesh.shelf.add({"a": b"wanted"}), mesh.shelf.add({"a": b"other"})
    mesh.shelf.manifests[wanted] = mesh.shelf.manifests[other]
    async with mesh.agent() as agent:
        with pytest.raises(DigestMismatch):
            async with agent.client.materialize(wanted, holder="t"):
                pytest.fail("another revision was lent")
        assert is_clean(agent.root)


async def test_what_is_not_there(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    mesh.shelf.blob_path(digest_of(FILES["config.json"])).unlink()
    async with mesh.agent() as agent:
        with pytest.raises(RevisionNotFound):
            async with agent.client.materialize("sha256:" + "0" * 64, holder="t"):
                pytest.fail("lent")
        with pytest.raises(InvalidRequest) as invalid:
            async with agent.client.materialize("sha256:../../x", holder="t"):
                pytest.fail("lent")
        assert invalid.value.reason == "INVALID_REVISION"
        with pytest.raises(Unavailable) as unavailable:
            async with agent.client.materialize(revision, holder="t"):
                pytest.fail("lent")
        assert unavailable.value.reason == "SOURCE_UNAVAILABLE"
        with pytest.raises(InvalidRequest) as ttl:
            async with agent.client.materialize(revision, holder="t", ttl_seconds=2):
                pytest.fail("lent")
        assert ttl.value.reason == "INVALID_TTL"


async def test_the_first_message_is_a_want(mesh: Mesh) -> None:
    async with mesh.agent() as agent:
        for first in (pb.MaterializeRequest(renew=pb.Renew()), pb.MaterializeRequest()):
            with raw_stream(agent.dialer) as stream:
                stream.send(first)
                assert (await stream.failure()).reason == "WANT_EXPECTED"
        with raw_stream(agent.dialer) as stream:
            stream.done_writing()
            assert (await stream.failure()).reason == "WANT_EXPECTED"


async def test_a_stream_wants_one_revision(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        with raw_stream(agent.dialer) as stream:
            await stream.want(revision).ready()
            assert (await stream.want(revision).failure()).reason == "WANT_UNEXPECTED"


async def test_a_client_that_says_no_more_still_gets_its_answer(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        with raw_stream(agent.dialer) as stream:
            stream.want(revision).done_writing()
            await stream.ready()
            assert await stream.read() is None
        # The stream's end ended nothing.
        assert (await agent.client.residency()).revisions[0].lease_count == 1


async def test_only_workers_hold(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with (
        mesh.agent() as agent,
        mesh.dial(agent.address, "admin-edge") as admin,
        mesh.dial(agent.address, "edge") as edge,
    ):
        assert (await StorageClient(admin).residency()).revisions == ()
        for dialer in (admin, edge):
            with pytest.raises(PermissionDenied):
                async with StorageClient(dialer).materialize(revision, holder="t"):
                    pytest.fail("lent")
        forbidden = StorageClient(edge)
        for call in (forbidden.evict, forbidden.pin, forbidden.unpin):
            with pytest.raises(PermissionDenied):
                await call(revision)
        with pytest.raises(PermissionDenied):
            await forbidden.residency()
        with pytest.raises(PermissionDenied):
            await forbidden.statistics()
        with pytest.raises(PermissionDenied):
            await anext(forbidden.scrub())


async def test_operators_see_what_the_tiers_did_pin_and_scrub(mesh: Mesh) -> None:
    content = os.urandom(2 * MIB)
    revision = mesh.shelf.add({"w": content})
    more = [TierOptions("fast", TierKind.NVME, 100 * MIB, high_ratio=1, low_ratio=1)]
    async with mesh.agent(is_link_allowed=False, more=more) as agent, mesh.dial(agent.address, "admin-edge") as admin:
        operator = StorageClient(admin)
        for _ in range(2):
            async with agent.client.materialize(revision, holder="t"):
                pass
        await operator.pin(revision)
        (found,) = (await operator.residency()).revisions
        assert (found.tiers, found.is_pinned, found.moving_to) == (("fast",), True, "")
        with pytest.raises(PreconditionFailed) as raised:
            await operator.evict(revision)
        assert raised.value.reason == "REVISION_PINNED"
        await operator.unpin(revision)
        steps = [step async for step in operator.scrub(bytes_per_second=100 * MIB)]
        assert (steps[-1].done_bytes, steps[-1].total_bytes, steps[-1].corrupt) == (2 * MIB, 2 * MIB, ())
        assert await operator.evict(revision) == 2 * MIB
        counted = await operator.statistics()
        fast, disk = counted.tiers
        assert (counted.miss_count, fast.hit_count, fast.hit_bytes, disk.hit_count) == (1, 1, 2 * MIB, 0)
        assert fast.tier == Tier("fast", 0, 100 * MIB, "nvme")
        assert fast.written_bytes == {"registry": 2 * MIB}
        assert (fast.evicted_count, fast.evicted_bytes) == ({"asked": 1}, {"asked": 2 * MIB})
        assert fast.scrubbed_bytes == 2 * MIB
        assert fast.write_bytes_per_second > 0
        assert fast.free_bytes > 0
        samples = {
            (sample.name, sample.labels.get("reason", "")): sample.value
            for family in TIERS.collect()
            for sample in family.samples
            if sample.labels.get("tier") == "fast"
        }
        assert samples[names.TIER_HITS_TOTAL, ""] == 1
        assert samples[names.TIER_EVICTIONS_TOTAL, "asked"] == 1


async def test_a_scrub_over_the_wire_names_what_is_bad(mesh: Mesh) -> None:
    content = os.urandom(MIB)
    revision = mesh.shelf.add({"w": content})
    async with mesh.agent(is_link_allowed=False) as agent:
        async with agent.client.materialize(revision, holder="t"):
            pass
        flip(agent.materializer.rooms[0].tier.store.blob_path(digest_of(content).hash))
        steps = [step async for step in agent.client.scrub()]
        assert steps[-1].corrupt == (CorruptBlob(digest_of(content).hash, "disk", is_lent=False, is_healed=False),)
        assert (await agent.client.statistics()).tiers[0].corrupt_count == 1
        assert is_clean(agent.root)


async def test_a_leased_revision_is_not_evicted(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        async with agent.client.materialize(revision, holder="t") as lent:
            with pytest.raises(PreconditionFailed) as raised:
                await agent.client.evict(revision)
            assert raised.value.reason == "REVISION_LEASED"
            assert files_below(Path(lent.path)) == set(FILES)
        assert await agent.client.evict(revision) == sum(map(len, FILES.values()))
        assert is_clean(agent.root)


async def test_a_lost_stream_ends_nothing_and_is_resumed(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        with raw_stream(agent.dialer) as stream:
            ready = await stream.want(revision).ready()
        with pytest.raises(PreconditionFailed):
            await agent.client.evict(revision)
        async with agent.client.materialize(revision, holder="t", lease_id=ready.lease_id) as lent:
            assert lent.lease_id == ready.lease_id
            assert (await agent.client.residency()).revisions[0].lease_count == 1
        # The block's end released it, so it can't be resumed again.
        with pytest.raises(NotFound) as raised:
            async with agent.client.materialize(revision, holder="t", lease_id=ready.lease_id):
                pytest.fail("an ended lease was resumed")
        assert raised.value.reason == "LEASE_NOT_FOUND"


async def test_the_client_carries_a_lease_over_a_restart_of_the_agent(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        agent = await first.enter_async_context(mesh.agent())
        dialer = await stack.enter_async_context(mesh.dial(agent.address))
        lent = await stack.enter_async_context(StorageClient(dialer).materialize(revision, holder="t", ttl_seconds=20))
        expires_at = lent.expires_at
        await first.aclose()
        again = await stack.enter_async_context(mesh.agent(listen=agent.address))
        async with asyncio.timeout(10):
            while lent.expires_at == expires_at and not lent.lost.is_set():
                await asyncio.sleep(0.05)
                revisions = (await again.client.residency()).revisions
                if revisions[0].lease_count == 1 and Path(lent.path).is_dir():
                    break
        assert not lent.lost.is_set()
        with pytest.raises(PreconditionFailed):
            await again.client.evict(revision)


async def test_a_lease_expires_by_the_clock_and_the_client_learns_it(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    async with mesh.agent(clock=lambda: now[0]) as agent:
        with raw_stream(agent.dialer) as stream:
            ready = await stream.want(revision, ttl=timedelta(seconds=60)).ready()
            assert ready.expires_at.ToDatetime(tzinfo=UTC) == now[0] + timedelta(seconds=60)
            now[0] += timedelta(seconds=59)
            stream.send(pb.MaterializeRequest(renew=pb.Renew()))
            answer = await stream.read()
            assert answer is not None
            assert answer.renewed.expires_at.ToDatetime(tzinfo=UTC) == now[0] + timedelta(seconds=60)
            now[0] += timedelta(seconds=60)
            assert (await agent.client.residency()).revisions[0].lease_count == 0
            stream.send(pb.MaterializeRequest(renew=pb.Renew()))
            assert (await stream.failure()).reason == "LEASE_NOT_FOUND"
        assert await agent.client.evict(revision) > 0


async def test_a_lease_that_can_not_be_resumed_is_reported_lost(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    async with (
        mesh.agent(clock=lambda: now[0]) as agent,
        agent.client.materialize(revision, holder="t", ttl_seconds=5) as lent,
    ):
        now[0] += timedelta(hours=1)
        async with asyncio.timeout(10):
            await lent.lost.wait()
        assert lent.error is not None
        assert lent.error.reason == "LEASE_LOST"
        with pytest.raises(LeaseLost):
            lent.check()
        assert await agent.client.evict(revision) > 0


async def test_a_renewed_lease_outlives_its_time_to_live(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    async with (
        mesh.agent(clock=lambda: now[0]) as agent,
        agent.client.materialize(revision, holder="t", ttl_seconds=5) as lent,
    ):
        for _ in range(2):
            before = lent.expires_at
            now[0] += timedelta(seconds=3)
            async with asyncio.timeout(10):
                while lent.expires_at == before:
                    await asyncio.sleep(0.01)
        assert not lent.lost.is_set()
        assert (await agent.client.residency()).revisions[0].lease_count == 1


async def test_keep_leaves_the_lease_to_its_end(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        async with agent.client.materialize(revision, holder="t", keep=True):
            pass
        assert (await agent.client.residency()).revisions[0].lease_count == 1


async def test_the_exception_of_the_block_is_not_wrapped(mesh: Mesh) -> None:
    revision = mesh.shelf.add(FILES)
    async with mesh.agent() as agent:
        with pytest.raises(ZeroDivisionError):
            async with agent.client.materialize(revision, holder="t"):
                raise ZeroDivisionError
        assert (await agent.client.residency()).revisions[0].lease_count == 0


async def test_concurrent_wants_share_one_fetch_and_one_cancel_spares_the_others(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"big": os.urandom(64 * MIB)})
    async with mesh.agent(is_link_allowed=False) as agent, contextlib.AsyncExitStack() as stack:
        streams = [stack.enter_context(raw_stream(agent.dialer)).want(revision) for _ in range(3)]
        async with asyncio.timeout(20):
            while not list((agent.root / "tmp").iterdir()):
                await asyncio.sleep(0.001)
        streams[0].break_off()
        lent = [await stream.ready() for stream in streams[1:]]
        assert {ready.fetched_bytes for ready in lent} == {64 * MIB}
        assert mesh.shelf.call_count == 1
        assert len(files_below(agent.root / "blobs")) == 1
        assert (await agent.client.residency()).revisions[0].lease_count == 2


async def test_a_want_that_everybody_left_is_cancelled_and_cleaned_up(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"big": os.urandom(64 * MIB)})
    async with mesh.agent(is_link_allowed=False) as agent:
        with raw_stream(agent.dialer) as stream:
            stream.want(revision)
            async with asyncio.timeout(20):
                while not list((agent.root / "tmp").iterdir()):
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            while list((agent.root / "tmp").iterdir()):
                await asyncio.sleep(0.01)
        # And it can be wanted again at once.
        async with agent.client.materialize(revision, holder="t") as lent:
            assert (Path(lent.path) / "big").stat().st_size == 64 * MIB


async def test_progress_comes_in_order_at_most_ten_times_a_second(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"big": os.urandom(96 * MIB)})
    seen: list[TransferProgress] = []
    async with mesh.agent(is_link_allowed=False) as agent:
        started = asyncio.get_running_loop().time()
        async with agent.client.materialize(revision, holder="t", on_progress=seen.append):
            took = asyncio.get_running_loop().time() - started
    assert all(progress.total_bytes == 96 * MIB for progress in seen)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert len(seen) <= took * 10 + 1


async def test_progress_says_how_fast_bytes_come_and_how_long_they_will(mesh: Mesh) -> None:
    # An object store's bytes come in pieces of a mebibyte.
    content = os.urandom(4 * MIB)
    seen: list[TransferProgress] = []
    with serve_blob(content) as server:
        # Some two seconds.
        server.script = lambda request: Answer(drip_seconds=0.0005 if request.last else 0.0)
        revision = mesh.shelf.add({"big": content})
        mesh.shelf.url = server.url.removesuffix("/blob")
        async with mesh.agent() as agent, agent.client.materialize(revision, holder="t", on_progress=seen.append):
            pass
    moving = [progress for progress in seen if progress.bytes_per_second]
    assert moving
    for progress in moving:
        assert progress.remaining_seconds is not None
        left_bytes = progress.total_bytes - progress.done_bytes
        assert progress.remaining_seconds * progress.bytes_per_second == pytest.approx(left_bytes, abs=1.0)


async def test_the_event_loop_is_free_while_bytes_are_fetched(mesh: Mesh) -> None:
    """Bytes are read, hashed and written by other threads. By processor time, which a busy machine does not stretch."""
    revision = mesh.shelf.add({"big": os.urandom(128 * MIB)})
    async with mesh.agent(is_link_allowed=False) as agent:
        of_loop, of_all = time.thread_time(), time.process_time()
        async with agent.client.materialize(revision, holder="t"):
            of_loop, of_all = time.thread_time() - of_loop, time.process_time() - of_all
    # Some hundredths; two fifths and more where the loop does the work itself.
    assert of_loop < 0.2 * of_all


async def test_capacity_evicts_the_longest_unused_and_refuses_what_can_not_fit(mesh: Mesh) -> None:
    contents = [os.urandom(2 * MIB) for _ in range(3)]
    first, second, third = (mesh.shelf.add({"w": content}) for content in contents)
    large = mesh.shelf.add({"w": os.urandom(5 * MIB)})
    async with mesh.agent(capacity_bytes=4 * MIB) as agent:
        for revision in (first, second, first):
            async with agent.client.materialize(revision, holder="t"):
                pass
        async with agent.client.materialize(third, holder="t"):
            assert _resident(await _revisions(agent)) == {first, third}
            async with agent.client.materialize(first, holder="t"):
                with pytest.raises(DiskFull):
                    async with agent.client.materialize(second, holder="t"):
                        pytest.fail("more than the capacity was lent")
        with pytest.raises(DiskFull):
            async with agent.client.materialize(large, holder="t"):
                pytest.fail("more than the capacity was lent")
        assert (await agent.client.residency()).tiers[0].used_bytes <= 4 * MIB


async def test_of_two_wants_with_room_for_one_exactly_one_is_lent(mesh: Mesh) -> None:
    old = mesh.shelf.add({"w": os.urandom(2 * MIB)})
    both = [mesh.shelf.add({"w": os.urandom(3 * MIB)}) for _ in range(2)]
    async with mesh.agent(capacity_bytes=4 * MIB) as agent:
        async with agent.client.materialize(old, holder="t"):
            pass

        async def want(revision: str) -> str:
            try:
                async with agent.client.materialize(revision, holder="t", keep=True):
                    return "lent"
            except DiskFull:
                return "full"

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(want(revision), name="want") for revision in both]
        assert sorted(task.result() for task in tasks) == ["full", "lent"]
        assert len(await _revisions(agent)) == 1


async def _revisions(agent: Agent) -> list[str]:
    return [r.revision for r in (await agent.client.residency()).revisions]


def _resident(revisions: list[str]) -> set[str]:
    return set(revisions)
