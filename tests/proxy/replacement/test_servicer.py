"""Where an answer goes on: among replicas of the revision that began it, never the one that broke it off."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from helios.api.fleet.v1 import replacement_service_pb2 as pb
from helios.mesh.errors import HoldExpired, InvalidRequest, ModelNotFound, NoReadyReplica
from helios.proxy.catalog.session import NoRegistry
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.explain.record import RequestState
from helios.proxy.explain.wire import explanation_to_proto
from helios.proxy.fleet.state import Load
from helios.proxy.replacement.servicer import ReplacementServicer
from helios.proxy.routing.pick import Wishes
from helios.proxy.routing.prefix import blocks_of
from helios.proxy.runtime import Runtime
from helios.proxy.traffic import LoadDelta
from helios.proxy.usage.meter import Tally
from tests.proxy.support import core, entry, hello, replica
from tests.proxy.test_runtime import NoEnvoys, SlowDisk

FIRST, SECOND = "127.0.0.1:1001", "127.0.0.1:1002"


class Context:
    def time_remaining(self) -> float:
        return 20.0


def with_replicas(model: ModelEntry, *addresses: str) -> Core:
    """A proxy that believes in a replica at each address."""
    subject = core()
    now = time.monotonic()
    replicas = [
        replica(f"r{number}", model=model.name, revision=model.revision, address=address)
        for number, address in enumerate(addresses)
    ]
    subject.models_replaced([model], now, is_synced=True)
    subject.worker_hello(hello(replicas=tuple(replicas)), now)
    subject.endpoints_acknowledged(frozenset(addresses), now)
    return subject


def running(subject: Core) -> Runtime:
    return Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())


async def pick(subject: Core | Runtime, **fields: Any) -> list[str]:
    runtime = subject if isinstance(subject, Runtime) else running(subject)
    servicer = ReplacementServicer(runtime, NoRegistry(), hold_limit_seconds=20.0)
    named: dict[str, Any] = {"request_id": "q", "model": "m", "revision": entry("m").revision}
    request = pb.PickReplicaRequest(**(named | fields))
    return list((await servicer.PickReplica(request, Context())).endpoints)


async def test_the_replica_that_broke_off_is_given_up() -> None:
    subject = with_replicas(entry("m"), FIRST, SECOND)
    assert await pick(subject, failed_endpoints=[FIRST]) == [SECOND]
    # For others, too, until it proves well.
    chosen = subject.pick(entry("m"), "other", time.monotonic())
    assert chosen is not None
    assert chosen.endpoints == SECOND


async def test_a_replica_that_drains_is_left_but_not_given_up() -> None:
    subject = with_replicas(entry("m"), FIRST, SECOND)
    for _ in range(4):
        assert await pick(subject, failed_endpoints=[FIRST], is_there_only=True) == [SECOND]
    chosen = subject.pick(entry("m"), "other", time.monotonic())
    assert chosen is not None
    assert set(chosen.endpoints.split(",")) == {FIRST, SECOND}


async def test_for_one_that_drains_nobody_waits_and_nothing_is_started() -> None:
    subject = with_replicas(entry("m"), FIRST)
    with pytest.raises(NoReadyReplica):
        await pick(subject, failed_endpoints=[FIRST], is_there_only=True)
    assert not subject.holds.count("m")


PROMPT = blocks_of(bytes(range(256)) * 8, "")


@pytest.mark.parametrize("number", [1, 2])
async def test_an_answer_goes_on_where_a_prompt_began_alike(number: int) -> None:
    addresses = (FIRST, SECOND, "127.0.0.1:1003")
    subject = with_replicas(entry("m"), *addresses)
    subject.traffic.prompt_sent(entry("m"), "r0", "q", PROMPT)
    subject.traffic.prompt_sent(entry("m"), f"r{number}", "like it", PROMPT)
    assert (await pick(subject, failed_endpoints=[FIRST]))[0] == addresses[number]
    # There it is from now on, whatever becomes of the other prompt.
    subject.traffic._prefixes.forget("r0")
    assert subject.traffic.prompt_of("q") == PROMPT
    assert subject.traffic.prompt_of("unknown") == ()


async def test_a_session_goes_on_at_the_replica_that_its_next_request_goes_to() -> None:
    for session in ("a", "b", "c", "d", "e", "f"):
        subject = with_replicas(entry("m"), FIRST, SECOND, "127.0.0.1:1003")
        went_to = (await pick(subject, failed_endpoints=[FIRST], session_id=session))[0]
        following = subject.pick(entry("m"), "next", time.monotonic(), wishes=Wishes(session=session))
        assert following is not None
        assert following.choices[0].address == went_to


async def test_where_there_is_no_other_the_answer_waits_for_one() -> None:
    subject = with_replicas(entry("m"), FIRST)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        waiting = group.create_task(pick(subject, failed_endpoints=[FIRST]))
        while not subject.holds.count("m"):
            await asyncio.sleep(0)
        waiting.cancel()
    assert not subject.holds.count("m"), "who leaves is waited for no longer"


async def test_a_wait_for_another_replica_leaves_what_is_remembered_of_the_request() -> None:
    runtime = running(with_replicas(entry("m"), FIRST))
    chosen = runtime.core.pick(entry("m"), "q", time.monotonic())
    assert chosen is not None
    runtime.journal.picked("q", ("m", chosen, (), "", 0.0, 0.0))

    async def refused() -> None:
        with pytest.raises(HoldExpired):
            await pick(runtime, failed_endpoints=[FIRST])

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(refused())
        while not runtime.core.holds.count("m"):
            await asyncio.sleep(0)
        runtime.apply(runtime.core.expire_holds(time.monotonic() + 60.0))
    record = runtime.journal.find("q")
    assert record is not None
    assert (record.state, record.pick) == (RequestState.SENT, chosen)
    assert not runtime.journal._held, "nothing of the wait is left"


def noted(**fields: Any) -> pb.NoteMoveRequest:
    named: dict[str, Any] = {"request_id": "q", "left_endpoint": FIRST}
    return pb.NoteMoveRequest(**(named | fields))


async def test_where_an_answer_went_on_is_explained_by_names() -> None:
    runtime = running(with_replicas(entry("m"), FIRST, SECOND))
    now = time.monotonic()
    chosen = runtime.core.pick(entry("m"), "q", now)
    assert chosen is not None
    servicer = ReplacementServicer(runtime, NoRegistry(), hold_limit_seconds=20.0)
    assert not (await servicer.NoteMove(noted(), Context())).is_noted, "nobody remembers it"
    runtime.journal.picked("q", ("m", chosen, (), "", now, now))
    there = "127.0.0.1:9999"
    moved = noted(reached_endpoint=there, reason="REPLICA_LOST", token_count=12)
    moved.waited.FromMilliseconds(250)
    assert (await servicer.NoteMove(moved, Context())).is_noted
    record = runtime.journal.find("q")
    assert record is not None
    (told,) = explanation_to_proto(record, time.monotonic()).moves
    assert (told.left, told.reached, told.reason, told.token_count) == ("r0", there, "REPLICA_LOST", 12)
    assert told.waited.ToMilliseconds() == 250
    with pytest.raises(InvalidRequest):
        await servicer.NoteMove(pb.NoteMoveRequest(request_id="q"), Context())


async def test_another_revision_would_go_on_with_another_answer() -> None:
    subject = with_replicas(entry("m"), FIRST, SECOND)
    with pytest.raises(NoReadyReplica) as caught:
        await pick(subject, revision="sha256:" + "9" * 64)
    assert caught.value.reason == "REVISION_GONE"
    with pytest.raises(ModelNotFound):
        await pick(subject, model="nobody")


async def test_a_canary_goes_on_as_a_canary() -> None:
    served = entry("m")
    tried = replace(served, name="m@999999999999", revision="sha256:" + "9" * 64, aliases=())
    subject = with_replicas(tried, SECOND)
    subject.models_replaced(
        [replace(served, canary=tried.name, canary_percent=10), tried], time.monotonic(), is_synced=True
    )
    assert await pick(subject, revision=tried.revision) == [SECOND]


@pytest.mark.parametrize("is_told_in_time", [True, False], ids=["started", "not told of"])
async def test_of_several_proxies_the_one_that_picked_first_counts_the_request(is_told_in_time: bool) -> None:
    picked, asked = (running(with_replicas(entry("m"), FIRST, SECOND)) for _ in range(2))
    assert picked.core.pick(entry("m"), "q", time.monotonic()) is not None
    if is_told_in_time:
        picked.meter.started("q", "m", 0, is_ours=picked.core.traffic.ledger.is_ours("q"))
        picked.core.load_report([LoadDelta("r0", Load(), started=("q",))], time.monotonic())
    for runtime in (asked, picked):
        assert await pick(runtime, failed_endpoints=[FIRST]) == [SECOND]
    # Workers tell every proxy of every request.
    for runtime in (asked, picked):
        is_ours = runtime.core.traffic.ledger.is_ours("q")
        runtime.meter.started("q", "m", 0, is_ours=is_ours)
        taken = Tally(prompt_tokens=7, completion_tokens=9)
        runtime.meter.finished("q", "m", 0, taken=taken, status_code=0, is_ours=is_ours)
    assert asked.meter.take() == {}
    assert picked.meter.take() == {("m", 0): Tally(requests=1, prompt_tokens=7, completion_tokens=9)}
