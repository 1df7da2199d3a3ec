"""Revisions between tiers: where they go, what makes them move, and what never happens meanwhile."""

import asyncio
import ctypes
import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest

from helios.mesh.errors import DiskFull, PreconditionFailed, Unavailable
from helios.storage.fetch import DirectorySource
from helios.storage.statistics import EvictionReason
from helios.storage.tiers import DiskRoom, TierKind, TierOptions
from tests.storage.harness import Shelf, digest_of, make_shelf
from tests.storage.local import SetClock, check_consistent, lend, local_agent, tiers_of, use

KIB = 1 << 10
SLOW = TierOptions("slow", TierKind.SSD, high_ratio=1, low_ratio=1)
FAST = TierOptions("fast", TierKind.NVME, 100 * KIB, high_ratio=0.9, low_ratio=0.5)
# A directory like the others, for what is tested is the policy: memory holds copies only.
MEMORY = TierOptions("memory", TierKind.MEMORY, 100 * KIB, high_ratio=1, low_ratio=1)
ROOMY = DiskRoom(1 << 40, 1 << 39)


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that nobody fills; the machine's own may be nearly full."""
    monkeypatch.setattr("helios.storage.blob_store.BlobStore.disk_room", lambda _: ROOMY)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "shelf")


def model(shelf: Shelf, kib: int) -> str:
    return shelf.add({"w": os.urandom(kib * KIB)})


async def test_a_fetch_goes_to_the_fastest_disk_and_memory_is_none(tmp_path: Path, shelf: Shelf) -> None:
    revision = model(shelf, 10)
    async with local_agent(tmp_path, shelf, SLOW, MEMORY, FAST) as agent:
        loan = await lend(agent, revision)
        assert loan.path.is_relative_to(tmp_path / "fast")
        assert tiers_of(agent, revision) == ("fast",)


async def test_what_the_fast_disk_can_not_take_goes_to_the_next(tmp_path: Path, shelf: Shelf) -> None:
    large, held, other = model(shelf, 101), model(shelf, 80), model(shelf, 30)
    async with local_agent(tmp_path, shelf, SLOW, FAST) as agent:
        await use(agent, large)
        assert tiers_of(agent, large) == ("slow",)
        await lend(agent, held)
        await use(agent, other)
        assert tiers_of(agent, held) == ("fast",)
        assert tiers_of(agent, other) == ("slow",)


async def test_a_model_larger_than_all_tiers_is_refused_before_anything_is_evicted(
    tmp_path: Path, shelf: Shelf
) -> None:
    here, large = model(shelf, 90), model(shelf, 101)
    async with local_agent(tmp_path, shelf, FAST) as agent:
        await use(agent, here)
        with pytest.raises(DiskFull, match="103424 bytes, more than any tier"):
            await lend(agent, large)
        assert tiers_of(agent, here) == ("fast",)


async def test_what_is_used_often_is_copied_to_memory_and_lent_from_there(tmp_path: Path, shelf: Shelf) -> None:
    hot, cold = model(shelf, 40), model(shelf, 40)
    async with local_agent(tmp_path, shelf, SLOW, MEMORY) as agent:
        await use(agent, cold)
        await use(agent, hot, times=2)
        await agent.mover.look()
        assert tiers_of(agent, hot) == ("memory", "slow")
        assert tiers_of(agent, cold) == ("slow",)
        assert (await lend(agent, hot)).path.is_relative_to(tmp_path / "memory")
        memory, slow = (room.tier.statistics for room in agent.rooms)
        assert (memory.promoted_count, memory.hit_count, slow.hit_count) == (1, 1, 1)
        assert memory.written_bytes == {"slow": 40 * KIB}
        check_consistent(agent)
    async with local_agent(tmp_path, shelf, SLOW, MEMORY) as agent:
        assert tiers_of(agent, hot) == ("memory", "slow")


async def test_what_is_in_memory_is_there_once(tmp_path: Path, shelf: Shelf) -> None:
    """Copying reads the disk's file, whose pages would stay as long as nobody needs the memory."""
    content = os.urandom(1024 * KIB)
    hot = shelf.add({"w": content})
    async with local_agent(tmp_path, shelf, SLOW, replace(MEMORY, capacity_bytes=2048 * KIB)) as agent:
        await use(agent, hot, times=2)
        path = agent.rooms[1].tier.store.blob_path(digest_of(content).hash)
        assert path.read_bytes() == content
        assert pages_in_memory(path) == 256
        await agent.mover.look()
        assert tiers_of(agent, hot) == ("memory", "slow")
        assert pages_in_memory(path) == 0


def pages_in_memory(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    libc = ctypes.CDLL(None)
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) == 0, os.strerror(
            ctypes.get_errno()
        )
        return sum(state & 1 for state in states)


async def test_one_copy_in_memory_for_all_holders(tmp_path: Path, shelf: Shelf) -> None:
    """What is lent is not copied up; and who wants it gets the very files that others map, whatever is faster."""
    hot = model(shelf, 40)
    async with local_agent(tmp_path, shelf, SLOW, MEMORY) as agent:
        await use(agent, hot, times=5)
        first = await lend(agent, hot)
        await agent.mover.look()
        assert tiers_of(agent, hot) == ("slow",)
        await agent.release(first.lease.id)
        await agent.mover.look()
        assert tiers_of(agent, hot) == ("memory", "slow")
        second, third = await lend(agent, hot), await lend(agent, hot)
        assert second.path == third.path
        assert second.path.is_relative_to(tmp_path / "memory")


async def test_above_the_high_mark_the_coldest_move_down_to_the_low_mark(tmp_path: Path, shelf: Shelf) -> None:
    cold, warm, hot = (model(shelf, 31) for _ in range(3))
    async with local_agent(tmp_path, shelf, SLOW, FAST) as agent:
        for revision, times in ((cold, 1), (warm, 3), (hot, 9)):
            await use(agent, revision, times)
        await agent.mover.look()
        assert [tiers_of(agent, revision) for revision in (cold, warm, hot)] == [("slow",), ("slow",), ("fast",)]
        fast, slow = (room.tier.statistics for room in agent.rooms)
        assert slow.demoted_count == 2
        assert fast.evicted_count == {EvictionReason.WATER_MARK: 2}
        check_consistent(agent)
        # It came without the registry: nothing is fetched for the next want.
        assert (await lend(agent, cold)).fetched_bytes == 0


async def test_a_disk_that_others_fill_is_relieved_of_what_nobody_uses(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused, leased, pinned = (model(shelf, 30) for _ in range(3))
    disk = TierOptions("disk", high_ratio=0.9, low_ratio=0.8)
    async with local_agent(tmp_path, shelf, disk) as agent:
        await use(agent, unused)
        await lend(agent, leased)
        await agent.pin(pinned)
        await use(agent, pinned)
        await agent.mover.look()
        assert tiers_of(agent, unused) == ("disk",)
        monkeypatch.setattr(agent.rooms[0].tier.store, "disk_room", lambda: DiskRoom(1000 * KIB, 50 * KIB))
        await agent.mover.look()
        assert [tiers_of(agent, r) for r in (unused, leased, pinned)] == [(), ("disk",), ("disk",)]
        check_consistent(agent)


async def test_a_disk_that_others_fill_is_relieved_of_blobs_that_no_revision_has(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = TierOptions("disk", high_ratio=0.9, low_ratio=0.8)
    revision = shelf.add({"a": bytes(40 * KIB)})
    async with local_agent(tmp_path, shelf, disk) as agent:
        tier = agent.rooms[0].tier
        content = b"s" * 150 * KIB
        shelf.put(content)
        await use(agent, revision)
        await tier.fetch(DirectorySource(shelf.base), digest_of(content), lambda _: None)
        assert tier.inventory.strays() == [digest_of(content)]
        monkeypatch.setattr(tier.store, "disk_room", lambda: DiskRoom(1000 * KIB, 50 * KIB))
        await agent.mover.look()
        assert tier.inventory.strays() == []
        assert tiers_of(agent, revision) == ("disk",)
        check_consistent(agent)


async def test_blobs_that_are_linked_from_elsewhere_are_no_relief_and_stay(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = model(shelf, 30)
    disk = TierOptions("disk", high_ratio=0.9, low_ratio=0.8)
    async with local_agent(tmp_path, shelf, disk, is_link_allowed=True) as agent:
        await use(agent, revision)
        monkeypatch.setattr(agent.rooms[0].tier.store, "disk_room", lambda: DiskRoom(1000 * KIB, 0))
        await agent.mover.look()
        assert tiers_of(agent, revision) == ("disk",)
        # And room for a link is not asked of the disk.
        await use(agent, model(shelf, 30))


async def test_a_full_disk_is_said_before_a_byte_is_fetched(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased, wanted = model(shelf, 30), model(shelf, 31)
    async with local_agent(tmp_path, shelf) as agent:
        await lend(agent, leased)
        monkeypatch.setattr(agent.rooms[0].tier.store, "disk_room", lambda: DiskRoom(1000 * KIB, 30 * KIB))
        with pytest.raises(DiskFull, match="30720 bytes left, 31744 are needed"):
            await lend(agent, wanted)
        assert agent.rooms[0].tier.statistics.queued_count == 1
        check_consistent(agent)


async def test_a_move_gives_way_to_a_request_and_to_an_eviction(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot, other = model(shelf, 40), model(shelf, 10)
    async with local_agent(tmp_path, shelf, SLOW, MEMORY) as agent:
        await use(agent, hot, times=3)
        memory = agent.rooms[0].tier
        started = asyncio.Event()

        async def stuck(*_: object, **__: object) -> None:
            started.set()
            await asyncio.sleep(3600)

        with monkeypatch.context() as patch:
            patch.setattr(memory, "fetch", stuck)
            for action in (lambda: use(agent, other), lambda: agent.evict(hot)):
                async with asyncio.timeout(10), asyncio.TaskGroup() as group:
                    moving = group.create_task(agent.mover.look(), name="look")
                    await started.wait()
                    started.clear()
                    (found,) = [r for r in agent.residency() if r.revision == hot]
                    assert found.moving_to == "memory"
                    await action()
                    await moving
                assert agent.mover.move is None
        assert tiers_of(agent, hot) == ()
        check_consistent(agent)


async def test_a_pinned_revision_stays_where_it_is_slowest_and_over_a_restart(tmp_path: Path, shelf: Shelf) -> None:
    pinned, large = model(shelf, 60), model(shelf, 60)
    async with local_agent(tmp_path, shelf, FAST) as agent:
        await agent.pin(pinned)
        await use(agent, pinned)
    async with local_agent(tmp_path, shelf, FAST) as agent:
        with pytest.raises(PreconditionFailed) as raised:
            await agent.evict(pinned)
        assert raised.value.reason == "REVISION_PINNED"
        with pytest.raises(DiskFull):
            await lend(agent, large)
        await agent.unpin(pinned)
        await use(agent, large)
        assert tiers_of(agent, pinned) == ()


async def test_bandwidth_is_measured_and_kept(tmp_path: Path, shelf: Shelf) -> None:
    revision = model(shelf, 2 * KIB)
    async with local_agent(tmp_path, shelf) as agent:
        await use(agent, revision)
        written = agent.rooms[0].tier.statistics.write.bytes_per_second
        assert written > 1 << 20
    async with local_agent(tmp_path, shelf) as agent:
        assert agent.rooms[0].tier.statistics.write.bytes_per_second == written


async def test_a_flipped_bit_in_the_slow_tier_is_not_promoted(tmp_path: Path, shelf: Shelf) -> None:
    content = os.urandom(40 * KIB)
    revision = shelf.add({"w": content})
    async with local_agent(tmp_path, shelf, SLOW, MEMORY, clock=SetClock()) as agent:
        await use(agent, revision, times=3)
        path = agent.rooms[1].tier.store.blob_path(digest_of(content).hash)
        flip(path)
        await agent.mover.look()
        # Nobody held it: the bad blob went with its revision, and the next want has a good one.
        assert tiers_of(agent, revision) == ()
        assert agent.rooms[1].tier.statistics.corrupt_count == 1
        check_consistent(agent)
        assert ((await lend(agent, revision)).path / "w").read_bytes() == content


async def test_a_move_that_failed_is_not_tried_again_and_again(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision, clock = model(shelf, 40), SetClock()
    async with local_agent(tmp_path, shelf, SLOW, MEMORY, clock=clock) as agent:
        await use(agent, revision, times=9)
        memory, tries = agent.rooms[0].tier, 0

        async def fail(*_: object, **__: object) -> None:
            nonlocal tries
            tries += 1
            raise Unavailable("no", reason="TIER_FAILED")

        with monkeypatch.context() as patch:
            patch.setattr(memory, "fetch", fail)
            for _ in range(3):
                await agent.mover.look()
        assert tries == 1
        await agent.mover.look()
        assert tiers_of(agent, revision) == ("slow",)
        clock.advance(601)
        await agent.mover.look()
        assert tiers_of(agent, revision) == ("memory", "slow")


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file, below its read-only mode, as a disk would."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)
