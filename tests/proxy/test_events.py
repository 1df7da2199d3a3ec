"""What operators are told of workers and replicas, and that nobody misses any of it without being told."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import Draining, InvalidRequest, Overloaded, Unavailable
from helios.proxy import actions
from helios.proxy.admin.watch import EventWatches
from helios.proxy.events.log import EventLog
from helios.proxy.events.record import Event, EventKind, event_of
from helios.proxy.fleet.state import ReplicaState
from helios.proxy.runtime import Runtime
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import core, entry, hello, ready
from tests.proxy.test_runtime import NoEnvoys, SlowDisk

INTERNAL = 13


@dataclass
class Reader:
    """Follows cursors; what it has read, and how often it was told that something is gone."""

    number: int
    read: list[int] = field(default_factory=list)
    missed_count: int = 0

    def read_page(self, log: EventLog) -> None:
        page = log.after(self.number)
        self.missed_count += page.is_missed
        self.read += [each.number for each in page.events]
        self.number = page.number


@given(st.lists(st.one_of(st.integers(1, 30).map(lambda count: ("add", count)), st.just(("read", 0))), max_size=40))
def test_a_reader_sees_every_event_once_in_order_or_is_told_that_some_are_gone(steps: list[tuple[str, int]]) -> None:
    log, reader = EventLog("a", limit_count=20), Reader(0)
    for step, count in steps:
        if step == "read":
            oldest, before = max(1, log.last_number - 19), reader.number
            missed_before = reader.missed_count
            reader.read_page(log)
            assert (reader.missed_count > missed_before) == (before < oldest - 1)
            continue
        for _ in range(count):
            log.add(Event(EventKind.WORKER_CONNECTED, worker_id="w"), 0.0)
    reader.read_page(log)
    assert reader.number == log.last_number
    assert reader.read == sorted(set(reader.read))
    if not reader.missed_count:
        assert reader.read == list(range(1, log.last_number + 1))


def test_cursors() -> None:
    log = EventLog("a", limit_count=2)
    for _ in range(5):
        log.add(Event(EventKind.SCALED, "m"), 0.0)
    assert log.position(None) == (5, False)
    assert log.position("") == (3, False)
    assert log.position(log.cursor(4)) == (4, False)
    assert log.after(1).is_missed
    assert log.position("of-an-earlier-run:4") == (3, True)
    for wrong in ("4", "a:", "a:x", "a:6", ":", "a:" + "9" * 5000):
        with pytest.raises(InvalidRequest) as refused:
            log.position(wrong)
        assert refused.value.reason == "INVALID_CURSOR"


def test_a_start_that_goes_on_waiting_is_told_once() -> None:
    log = EventLog("a")
    waits = Event(EventKind.START_DELAYED, "m", reason="NO_CAPACITY", message="models in use give way in turn")
    assert [log.add(waits, 0.0), log.add(waits, 1.0)] == [True, False]
    assert log.add(Event(EventKind.START_FAILED, "m"), 2.0)
    assert log.add(waits, 3.0)


def test_of_one_model_only_and_its_cursor_goes_on_over_others() -> None:
    log = EventLog("a")
    for model in ("m", "n", "m", "n"):
        log.add(Event(EventKind.SCALED, model), 0.0)
    page = log.after(0, "m")
    assert [each.number for each in page.events] == [1, 3]
    assert page.number == 4


def told(todo: list[actions.Action]) -> list[tuple[str, str]]:
    events = filter(None, map(event_of, todo))
    return [(event.kind.name, event.reason or event.worker_id) for event in events]


def test_what_becomes_of_a_worker_and_its_replica() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=1)], 0.0, is_synced=True)
    begun = told(subject.worker_hello(hello("w"), 0.0))
    assert begun == [("WORKER_CONNECTED", "w"), ("START_BEGUN", "w")]
    (asked,) = subject.fleet.replicas()
    assert told(subject.replica_event("w", 1, ready(asked), 2.0)) == [("REPLICA_CHANGED", "READY"), ("START_DONE", "")]
    assert told(subject.worker_hello(hello("w", replicas=(ready(asked),)), 3.0)) == [], "a reconnect is no news"
    assert told(subject.worker_lost("w", 4.0)) == [("WORKER_UNREACHABLE", "w")]
    assert told(subject.worker_lost("w", 4.0)) == []
    assert told(subject.worker_seen("w", 5.0)) == [("WORKER_CONNECTED", "w")]
    assert told(subject.cordon("w", 6.0, is_cordoned=True)) == [("WORKER_CORDONED", "w")]
    assert told(subject.cordon("w", 6.0, is_cordoned=True)) == []
    assert told(subject.cordon("w", 6.0, is_cordoned=False)) == [("WORKER_UNCORDONED", "w")]
    assert ("WORKER_UNREACHABLE", "w") in told(subject.tick(20.0))
    assert told(subject.tick(60.0))[0] == ("WORKER_GONE", "w")


def test_a_breaker_that_opens_and_an_operator_who_closes_it() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=1)], 0.0, is_synced=True)
    subject.worker_hello(hello("w"), 0.0)
    (asked,) = subject.fleet.replicas()
    subject.replica_event("w", 1, ready(asked), 1.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 1.0)
    seen: list[tuple[str, str]] = []
    for number in range(3):
        assert subject.pick(entry(), f"q{number}", 2.0) is not None
        delta = LoadDelta(asked.replica_id, asked.load, finished=((f"q{number}", INTERNAL),))
        seen += told(subject.load_report([delta], 2.0))
    assert seen == [("BREAKER_OPENED", "w")]
    assert subject.pick(entry(), "q", 2.0) is None
    replica = subject.fleet.replica(asked.replica_id)
    assert replica is not None
    assert replica.state is ReplicaState.READY
    assert told(subject.reset_breaker(replica, 2.0)) == [("BREAKER_CLOSED", "w")]
    assert told(subject.reset_breaker(replica, 2.0)) == []
    assert subject.pick(entry(), "q", 2.0) is not None


async def test_a_watch_tells_what_is_known_and_what_comes_and_ends_where_it_is_told_to() -> None:
    subject = core()
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())
    watches = EventWatches(runtime)
    runtime.apply(subject.worker_hello(hello("v"), 0.0))
    known = [each async for each in watches.watch("", "", until_now=True)]
    assert [each.event.worker_id for each in known] == ["v"]
    coming = watches.watch(known[-1].event.cursor, "", until_now=False)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        first = group.create_task(anext(coming))
        await asyncio.sleep(0)
        assert not first.done()
        runtime.apply(subject.worker_hello(hello("w"), 1.0))
        assert (await first).event.worker_id == "w"
    await coming.aclose()
    older = [each async for each in watches.watch("gone:7", "", until_now=True)]
    assert older[0].HasField("missed")
    assert [each.event.worker_id for each in older[1:]] == ["v", "w"]


async def test_a_watch_ends_with_the_process_and_keeps_it_from_nothing() -> None:
    runtime = Runtime(core(), publisher=NoEnvoys(), memory=SlowDisk())
    watches = EventWatches(runtime)

    async def watched() -> None:
        with pytest.raises(Draining):
            await anext(watches.watch(None, "", until_now=False))

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(watched())
        await asyncio.sleep(0)
        runtime.stop()
    assert [each async for each in watches.watch("", "", until_now=True)] == []
    await watched()


async def test_a_watch_ends_where_another_proxy_leads_from_now_on() -> None:
    subject = core()
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())
    subject.leadership.lead(3, 0.0)
    watches = EventWatches(runtime)

    async def watched() -> None:
        with pytest.raises(Unavailable) as moved:
            await anext(watches.watch(None, "", until_now=False))
        assert moved.value.reason == "LEADER_MOVED"

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(watched())
        await asyncio.sleep(0)
        subject.leadership.follow(1.0)
    # What is known here can still be read.
    assert [each async for each in watches.watch("", "", until_now=True)] == []


async def test_watches_are_bounded_and_one_that_ends_makes_room() -> None:
    subject = core()
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())
    runtime.apply(subject.worker_hello(hello("w"), 0.0))
    watches = EventWatches(runtime)
    running = [watches.watch("", "", until_now=False) for _ in range(64)]
    for watch in running:
        await anext(watch)
    with pytest.raises(Overloaded) as refused:
        await anext(watches.watch("", "", until_now=False))
    assert refused.value.reason == "TOO_MANY_WATCHERS"
    await running.pop().aclose()
    last = watches.watch("", "", until_now=False)
    assert (await anext(last)).event.worker_id == "w"
    for watch in (*running, last):
        await watch.aclose()
