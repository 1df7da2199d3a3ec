"""Fetching ahead as tasks: one at a time, broken off for whoever waits and for a plan without it, and gone on with."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import cast

from helios.mesh.errors import Unavailable
from helios.mesh.tasks import task_scope
from helios.storage.materializer import Materializer
from helios.storage.prefetch.prefetcher import Prefetcher
from helios.storage.prefetch.state import Account, Ahead, Order, Plan, State

NOW = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
WAIT_SECONDS = 20.0


class Node:
    """What a prefetcher asks of the node: fetches last until they are let go."""

    def __init__(self) -> None:
        self.fetches: list[str] = []
        self.broken_off: list[str] = []
        self.here: dict[str, int] = {}
        self.evicted: list[str] = []
        self.is_fetching = False
        self.room = 1000
        self.may_evict: list[bool] = []
        self.accounts: list[Account] = []
        self.while_asked: Callable[[], None] = lambda: None
        self.let_go = asyncio.Event()
        self.failure: Unavailable | None = None

    def use_counts(self) -> dict[str, int]:
        return dict(self.here)

    async def spare_bytes(self) -> int:
        self.while_asked()
        return self.room

    async def fetch_ahead(self, revision: str, *, may_evict: bool) -> int:
        self.fetches.append(revision)
        self.may_evict.append(may_evict)
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.broken_off.append(revision)
            raise
        if self.failure is not None:
            raise self.failure
        self.here[revision] = 0
        return 10

    async def keep_account(self, account: Account) -> None:
        self.accounts.append(account)

    async def evict(self, revision: str) -> int:
        del self.here[revision]
        self.evicted.append(revision)
        self.room = 1000
        return 10


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(*, bytes_per_hour: int = 1000) -> AsyncIterator[tuple[Prefetcher, Node]]:
    prefetcher, node = Prefetcher(Ahead(bytes_per_hour), lambda: NOW), Node()
    async with task_scope() as group:
        group.create_task(prefetcher.run(cast(Materializer, node)), name="fetch ahead")
        yield prefetcher, node


def plan(*revisions: str) -> Plan:
    return Plan(tuple(Order(revision, 10) for revision in revisions), {}, NOW + timedelta(hours=1))


async def test_what_is_planned_is_fetched_one_after_another() -> None:
    async with running() as (prefetcher, node):
        prefetcher.take(plan("a", "b"))
        await until(lambda: node.fetches)
        assert [one.state for one in prefetcher.report().outcomes] == [State.FETCHING, State.WAITING]
        node.let_go.set()
        await until(lambda: prefetcher.report().fetched_bytes == 20)
        assert node.fetches == ["a", "b"]


async def test_somebody_who_waits_for_another_revision_has_the_way() -> None:
    async with running() as (prefetcher, node):
        prefetcher.take(plan("a"))
        await until(lambda: node.fetches)
        prefetcher.make_way("a")
        assert prefetcher.report().outcomes[0].state is State.FETCHING, "who waits for it joins it"
        node.is_fetching = True
        prefetcher.make_way("other")
        await until(lambda: node.broken_off == ["a"])
        node.is_fetching = False
        node.let_go.set()
        await until(lambda: node.here)
        assert node.fetches == ["a", "a"], "it is gone on with"


async def test_who_comes_while_the_disks_are_asked_has_the_way() -> None:
    async with running() as (prefetcher, node):
        asked = asyncio.Event()

        def come() -> None:
            node.is_fetching = True
            asked.set()

        node.while_asked = come
        prefetcher.take(plan("a"))
        async with asyncio.timeout(WAIT_SECONDS):
            await asked.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert node.fetches == []


async def test_nothing_goes_for_a_forecast_but_what_people_ask_for_is_worth_it() -> None:
    async with running() as (prefetcher, node):
        node.let_go.set()
        orders = (Order("forecast", 10), Order("asked", 10, is_asked=True))
        prefetcher.take(Plan(orders, {}, NOW + timedelta(hours=1)))
        await until(lambda: len(node.here) == 2)
        assert dict(zip(node.fetches, node.may_evict, strict=True)) == {"forecast": False, "asked": True}


async def test_a_plan_without_it_ends_a_fetch() -> None:
    async with running() as (prefetcher, node):
        prefetcher.take(plan("a"))
        await until(lambda: node.fetches)
        prefetcher.take(plan("b"))
        await until(lambda: node.fetches == ["a", "b"])
        assert node.broken_off == ["a"]


async def test_a_failure_is_told_and_others_go_on() -> None:
    async with running() as (prefetcher, node):
        node.failure = Unavailable("the store is away")
        node.let_go.set()
        prefetcher.take(plan("a", "b"))
        await until(lambda: node.fetches == ["a", "b"])
        await until(lambda: all(one.state is State.FAILED for one in prefetcher.report().outcomes))
        assert "the store is away" in prefetcher.report().outcomes[0].message


async def test_what_was_fetched_for_nothing_gives_its_room() -> None:
    async with running() as (prefetcher, node):
        node.let_go.set()
        prefetcher.take(plan("wrong"))
        await until(lambda: "wrong" in node.here)
        node.room = 0
        prefetcher.take(plan("right"))
        await until(lambda: "right" in node.here)
        assert node.evicted == ["wrong"]
        await until(lambda: prefetcher.report().wasted_bytes == 10)


async def test_what_is_spent_is_noted_before_it_comes_and_what_came_after() -> None:
    async with running() as (prefetcher, node):
        prefetcher.take(plan("a"))
        await until(lambda: node.fetches)
        assert node.accounts[-1].spent_bytes == 10
        assert not node.accounts[-1].unused
        node.let_go.set()
        await until(lambda: node.accounts[-1].unused == {"a": 10})
    again = Prefetcher(Ahead(1000), lambda: NOW)
    again.recall(node.accounts[-1])
    assert again.report().fetched_bytes == 10
    assert again.report().budget_bytes == 990, "a restart gives no budget back"
