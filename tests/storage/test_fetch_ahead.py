"""Fetching ahead on a node: where it goes, what it leaves alone, and who has the way."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import DiskFull
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.gate import Priority
from helios.storage.fetch import BlobSource
from helios.storage.manifest import Manifest
from helios.storage.materializer import Materializer, Upkeep
from helios.storage.prefetch.prefetcher import Prefetcher
from helios.storage.prefetch.state import Ahead, Order, Plan, State
from helios.storage.tiers import DiskRoom, TierKind, TierOptions
from tests.storage.harness import Shelf, make_shelf
from tests.storage.local import START, SetClock, ShelfManifests, check_consistent, local_agent, tiers_of, use

KIB = 1 << 10
NVME = TierOptions("fast", TierKind.NVME, 100 * KIB, high_ratio=1, low_ratio=0.9)
SSD = TierOptions("slow", TierKind.SSD, 400 * KIB, high_ratio=1, low_ratio=0.9)
MEMORY = TierOptions("memory", TierKind.MEMORY, 100 * KIB, high_ratio=1, low_ratio=1)
WAIT_SECONDS = 20.0


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that nobody fills; the machine's own may be nearly full."""
    monkeypatch.setattr("helios.storage.blob_store.BlobStore.disk_room", lambda _: DiskRoom(1 << 40, 1 << 39))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "shelf")


def model(shelf: Shelf, kib: int) -> str:
    return shelf.add({"w": os.urandom(kib * KIB)})


class Fetching:
    """A tier's fetches, which wait until they are let go, and then go on or fail."""

    def __init__(self, agent: Materializer, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began = asyncio.Event()
        self.let_go = asyncio.Event()
        self.error: DiskFull | None = None
        self.priorities: list[Callable[[], Priority]] = []
        found = next(room.tier for room in agent.rooms if room.name == tier)
        self._fetch: Callable[..., Any] = found.fetch
        monkeypatch.setattr(found, "fetch", self._wait_and_fetch)

    async def _wait_and_fetch(self, *arguments: Any, **options: Any) -> None:
        self.priorities.append(options["priority"])
        self.began.set()
        await self.let_go.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
        await self._fetch(*arguments, **options)


async def test_warm_models_stay_on_the_fast_disk_while_another_has_room(tmp_path: Path, shelf: Shelf) -> None:
    warm, expected = [model(shelf, 30) for _ in range(3)], model(shelf, 30)
    async with local_agent(tmp_path, shelf, NVME, SSD) as agent:
        for revision in warm:
            await use(agent, revision)
        assert await agent.spare_bytes() == 360 * KIB
        assert await agent.fetch_ahead(expected) == 30 * KIB
        assert tiers_of(agent, expected) == ("slow",)
        assert [tiers_of(agent, revision) for revision in warm] == [("fast",)] * 3
        check_consistent(agent)


async def test_without_room_to_spare_nothing_comes_and_nothing_goes_unless_somebody_asked(
    tmp_path: Path, shelf: Shelf
) -> None:
    warm, expected = model(shelf, 80), model(shelf, 20)
    async with local_agent(tmp_path, shelf, NVME) as agent:
        await use(agent, warm)
        # It would fit the capacity, above the low mark.
        with pytest.raises(DiskFull, match="10240 bytes to spare, 20480 are needed"):
            await agent.fetch_ahead(expected)
        assert tiers_of(agent, warm) == ("fast",)
        larger = model(shelf, 90)
        assert await agent.fetch_ahead(larger, may_evict=True) == 90 * KIB
        assert (tiers_of(agent, warm), tiers_of(agent, larger)) == ((), ("fast",))
        check_consistent(agent)


async def test_who_joins_a_fetch_ahead_is_urgent_and_gets_the_room_that_it_did_not_take(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, expected = model(shelf, 50), model(shelf, 40)
    async with local_agent(tmp_path, shelf, NVME) as agent:
        await use(agent, warm)
        disk = Fetching(agent, "fast", monkeypatch)
        async with asyncio.timeout(WAIT_SECONDS), task_scope() as group:
            ahead = group.create_task(refused(agent.fetch_ahead(expected)), name="ahead")
            await disk.began.wait()
            assert [priority() for priority in disk.priorities] == [Priority.PREFETCH]
            start = group.create_task(use(agent, expected), name="start")
            while disk.priorities[0]() is Priority.PREFETCH:
                await asyncio.sleep(0)
            # Somebody else fills the disk: of a fetch ahead that is the end, not of a start.
            disk.error = DiskFull("no room")
            disk.let_go.set()
            await start
            assert await ahead
        assert tiers_of(agent, expected) == ("fast",)
        check_consistent(agent)


async def refused(fetch: Any) -> bool:
    try:
        await fetch
    except DiskFull:
        return True
    return False


async def test_a_move_goes_on_beside_a_fetch_ahead(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot, expected = model(shelf, 40), model(shelf, 10)
    async with local_agent(tmp_path, shelf, SSD, MEMORY) as agent:
        await use(agent, hot, times=3)
        memory = agent.rooms[0].tier
        began, let_go, fetch = asyncio.Event(), asyncio.Event(), memory.fetch

        async def slowly(*arguments: Any, **options: Any) -> None:
            began.set()
            await let_go.wait()
            await fetch(*arguments, **options)

        monkeypatch.setattr(memory, "fetch", slowly)
        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
            group.create_task(agent.mover.look(), name="look")
            await began.wait()
            assert await agent.fetch_ahead(expected) == 10 * KIB
            assert agent.mover.move is not None
            let_go.set()
        assert tiers_of(agent, hot) == ("memory", "slow")


@asynccontextmanager
async def prefetching(directory: Path, shelf: Shelf) -> AsyncIterator[tuple[Prefetcher, Materializer]]:
    clock = SetClock()
    prefetcher = Prefetcher(Ahead(1 << 30), clock)
    upkeep = Upkeep(make_way=prefetcher.make_way)
    async with local_agent(directory, shelf, SSD, clock=clock, upkeep=upkeep) as agent, task_scope() as group:
        group.create_task(prefetcher.run(agent), name="fetch ahead")
        yield prefetcher, agent


async def test_a_start_has_the_way_from_the_moment_it_comes_and_a_fetch_ahead_is_booked_once(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, expected = model(shelf, 10), model(shelf, 20)
    asked, answer = asyncio.Event(), asyncio.Event()
    get_manifest = ShelfManifests.get_manifest

    async def slowly(self: ShelfManifests, revision: str) -> tuple[Manifest, BlobSource]:
        if revision == wanted:
            asked.set()
            await answer.wait()
        return await get_manifest(self, revision)

    monkeypatch.setattr(ShelfManifests, "get_manifest", slowly)
    async with prefetching(tmp_path, shelf) as (prefetcher, agent), asyncio.timeout(WAIT_SECONDS):
        disk = Fetching(agent, "slow", monkeypatch)
        prefetcher.take(Plan((Order(expected, 20 * KIB),), {}, START.replace(year=START.year + 1)))
        await disk.began.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(use(agent, wanted), name="start")
            # The registry takes its time; the fetch ahead has ended, and does not begin again meanwhile.
            await asked.wait()
            while prefetcher.report().outcomes[0].state is State.FETCHING:
                await asyncio.sleep(0)
            assert agent.is_fetching
            for _ in range(50):
                await asyncio.sleep(0.001)
            report = prefetcher.report()
            assert report.outcomes[0].state is State.WAITING
            assert report.budget_bytes == (1 << 30) - 20 * KIB
            assert len(disk.priorities) == 1
            disk.let_go.set()
            answer.set()
        while not tiers_of(agent, expected):
            await asyncio.sleep(0.005)
        assert tiers_of(agent, wanted) == ("slow",)
