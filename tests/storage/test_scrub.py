"""Bits that flip on the disk: found, named, and mended or dropped; whatever is lent afterwards is good."""

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helios.mesh.errors import NotFound, PreconditionFailed
from helios.mesh.tasks import task_scope
from helios.storage import scrubber as scrubber_module
from helios.storage.fetch import FetchCancelled, FetchToken
from helios.storage.materializer import Materializer, Upkeep
from helios.storage.scrub import read_blob
from helios.storage.scrubber import Found
from tests.storage.harness import Shelf, digest_of, make_shelf
from tests.storage.local import SetClock, check_consistent, lend, local_agent, tiers_of, use
from tests.storage.test_moves import flip

MIB = 1 << 20
BASE, OTHER = os.urandom(MIB), os.urandom(MIB + 1)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "shelf")


async def scrub(agent: Materializer) -> list[Found]:
    steps = [step async for step in agent.scrubber.scrub_all(bytes_per_second=0)]
    assert [step.done_bytes for step in steps] == sorted(step.done_bytes for step in steps)
    assert steps[-1].done_bytes == steps[-1].total_bytes
    return list(steps[-1].found)


def blob_of(agent: Materializer, content: bytes) -> Path:
    return agent.rooms[0].tier.store.blob_path(digest_of(content).hash)


async def test_good_blobs_are_left_alone_and_noted(tmp_path: Path, shelf: Shelf) -> None:
    clock = SetClock()
    async with local_agent(tmp_path, shelf, clock=clock) as agent:
        await use(agent, shelf.add({"a": BASE, "b": OTHER, "empty": b""}))
        clock.advance(100)
        assert await scrub(agent) == []
        tier = agent.rooms[0].tier
        assert set(tier.scrub_times.values()) == {clock.now.timestamp()}
        assert tier.statistics.scrubbed_bytes == 2 * MIB + 1
    async with local_agent(tmp_path, shelf, clock=clock) as agent:
        assert set(agent.rooms[0].tier.scrub_times.values()) == {clock.now.timestamp()}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
async def test_a_bad_blob_that_nobody_holds_goes_and_only_it_is_fetched_again(
    tmp_path: Path, shelf: Shelf, damage: str
) -> None:
    both, base = shelf.add({"a": BASE, "b": OTHER}), shelf.add({"a": BASE})
    async with local_agent(tmp_path, shelf) as agent:
        await use(agent, both)
        await use(agent, base)
        path = blob_of(agent, OTHER)
        if damage == "flipped":
            flip(path)
        elif damage == "truncated":
            os.truncate(path, 10)
        else:
            path.unlink()
        found = await scrub(agent)
        assert found == [Found("disk", digest_of(OTHER), is_lent=False, is_healed=False)]
        assert (tiers_of(agent, both), tiers_of(agent, base)) == ((), ("disk",))
        check_consistent(agent)
        loan = await lend(agent, both)
        assert loan.fetched_bytes == len(OTHER)
        assert (loan.path / "b").read_bytes() == OTHER


async def test_a_bad_blob_that_is_lent_is_replaced_under_its_holders(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"a": BASE, "deep/b": OTHER, "again": OTHER})
    async with local_agent(tmp_path, shelf) as agent:
        loan = await lend(agent, revision)
        flip(blob_of(agent, OTHER))
        mapped = (loan.path / "again").open("rb")
        with mapped:
            assert await scrub(agent) == [Found("disk", digest_of(OTHER), is_lent=True, is_healed=True)]
            for name in ("deep/b", "again"):
                assert (loan.path / name).read_bytes() == OTHER
                assert (loan.path / name).samefile(blob_of(agent, OTHER))
            # Who has it open keeps what it has, bad as it may be.
            assert mapped.read() != OTHER
        await agent.renew(loan.lease.id)
        assert await scrub(agent) == []
        check_consistent(agent)


async def test_two_scrubs_that_find_the_same_bad_blob_mend_it_once(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in the background and one that was asked for; two fetches of a blob would write to one file."""
    revision = shelf.add({"b": OTHER})
    async with local_agent(tmp_path, shelf) as agent:
        loan = await lend(agent, revision)
        room, blob = agent.rooms[0], digest_of(OTHER)
        flip(blob_of(agent, OTHER))
        fetch, count = room.tier.fetch, 0

        async def slow_fetch(*args: object, **options: object) -> None:
            nonlocal count
            count += 1
            await asyncio.sleep(0.3)
            await fetch(*args, **options)  # type: ignore[arg-type]  # passed on as they came

        monkeypatch.setattr(room.tier, "fetch", slow_fetch)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            scrubs = [group.create_task(agent.scrubber.scrub_one(room, blob), name=f"scrub {n}") for n in range(2)]
        assert [found for task in scrubs if (found := task.result())] == [
            Found("disk", blob, is_lent=True, is_healed=True)
        ]
        assert count == 1
        assert (loan.path / "b").read_bytes() == OTHER


async def test_where_no_source_has_good_bytes_leases_end_and_nothing_bad_is_lent(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"a": BASE, "b": OTHER})
    async with local_agent(tmp_path, shelf, is_link_allowed=True) as agent:
        loan = await lend(agent, revision)
        # The link's other end: the registry's own file is the same inode.
        flip(shelf.blob_path(digest_of(OTHER)))
        assert await scrub(agent) == [Found("disk", digest_of(OTHER), is_lent=True, is_healed=False)]
        with pytest.raises(NotFound):
            await agent.renew(loan.lease.id)
        assert agent.residency() == []
        check_consistent(agent)
    async with local_agent(tmp_path, shelf) as agent:
        assert agent.residency() == []


async def test_a_want_waits_while_a_blob_is_replaced(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = shelf.add({"b": OTHER})
    async with local_agent(tmp_path, shelf) as agent:
        await lend(agent, revision)
        tier = agent.rooms[0].tier
        flip(blob_of(agent, OTHER))
        fetch, may_go, started = tier.fetch, asyncio.Event(), asyncio.Event()

        async def slow_fetch(*args: object, **options: object) -> None:
            started.set()
            await may_go.wait()
            await fetch(*args, **options)  # type: ignore[arg-type]  # passed on as they came

        monkeypatch.setattr(tier, "fetch", slow_fetch)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(scrub(agent), name="scrub")
            await started.wait()
            second = group.create_task(lend(agent, revision), name="want")
            await asyncio.sleep(0.05)
            assert not second.done()
            may_go.set()
        assert (second.result().path / "b").read_bytes() == OTHER


async def test_what_is_due_is_found_oldest_first_and_one_scrub_runs_at_a_time(tmp_path: Path, shelf: Shelf) -> None:
    clock = SetClock()
    upkeep = Upkeep(scrub_bytes_per_second=0, scrub_period=timedelta(hours=1))
    async with local_agent(tmp_path, shelf, clock=clock, upkeep=upkeep) as agent:
        await use(agent, shelf.add({"a": BASE, "b": OTHER}))
        room, tier = agent.rooms[0], agent.rooms[0].tier
        await tier.note_scrubbed(digest_of(BASE), clock())
        clock.advance(60)
        await tier.note_scrubbed(digest_of(OTHER), clock())
        assert agent.scrubber.find_due() is None
        clock.advance(3541)
        assert agent.scrubber.find_due() == (room, digest_of(BASE))
        first = agent.scrubber.scrub_all(bytes_per_second=0)
        await anext(first)
        with pytest.raises(PreconditionFailed) as raised:
            await anext(agent.scrubber.scrub_all(bytes_per_second=0))
        assert raised.value.reason == "SCRUB_RUNS"
        await first.aclose()
        assert await scrub(agent) == []


async def test_a_scrub_of_a_large_blob_ends_with_its_task(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent is asked to stop: at the rate of the background this would go on for eight seconds."""
    monkeypatch.setattr(scrubber_module, "_LOOK_SECONDS", 0.0)
    clock = SetClock()
    upkeep = Upkeep(scrub_bytes_per_second=MIB)
    async with local_agent(tmp_path, shelf, clock=clock, upkeep=upkeep) as agent:
        await use(agent, shelf.add({"w": bytes(8 * MIB)}))
        clock.now = datetime.now(UTC) + timedelta(days=8)
        async with task_scope() as group:
            group.create_task(agent.scrubber.run(), name="scrub")
            await asyncio.sleep(0.2)
            started = time.monotonic()
        assert time.monotonic() - started < 2
        assert agent.rooms[0].tier.statistics.scrubbed_bytes == 0


async def test_a_tier_is_measured_once(tmp_path: Path, shelf: Shelf) -> None:
    large = os.urandom(16 * MIB)
    async with local_agent(tmp_path, shelf) as agent:
        tier = agent.rooms[0].tier
        await use(agent, shelf.add({"a": BASE}))
        await agent.scrubber.measure()
        assert tier.statistics.scrubbed_bytes == 0
        await use(agent, shelf.add({"w": large}))
        for _ in range(2):
            await agent.scrubber.measure()
        assert tier.statistics.read.bytes_per_second > MIB
        assert tier.statistics.scrubbed_bytes == 16 * MIB


def test_reading_keeps_to_its_limit_and_is_cancelled_at_once(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    content = os.urandom(12 * MIB + 77)
    path.write_bytes(content)
    started = time.monotonic()
    result = read_blob(path, FetchToken(), bytes_per_second=60 * MIB)
    assert time.monotonic() - started >= 0.19
    assert (result.hash, result.size_bytes) == (digest_of(content).hash, len(content))
    token = FetchToken()
    token.cancel()
    with pytest.raises(FetchCancelled):
        read_blob(path, token, bytes_per_second=1)
