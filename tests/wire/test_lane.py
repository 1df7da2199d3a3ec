"""The picker inside the real Envoy: models with several replicas, by what a proxy says each tenth of a second."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.mesh.xds.state import ExpressRoute
from helios.proxy.routing.sessions import Ring
from tests.wire import fakes
from tests.wire.gateway import Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
CHAT = "/v1/chat/completions"
LEASE_SECONDS = 0.5


def prompt(text: str) -> dict[str, Any]:
    """A request with a prompt of some blocks."""
    return {"model": "alias", "messages": [{"role": "user", "content": text * 100}]}


def candidate(replica_id: str, address: str, **more: Any) -> lane_pb.LaneCandidate:
    """A replica that may be picked."""
    return lane_pb.LaneCandidate(replica_id=replica_id, address=address, fixed_score=0.5, **more)


@pytest.fixture(autouse=True)
def nothing_before(gateway: Gateway) -> Iterator[None]:
    """Each test begins with what no test before it has said."""
    gateway.lane.requests.clear()
    gateway.picker.requests.clear()
    yield
    gateway.lane.hold = None
    gateway.lane.answer = lane_pb.RenewResponse()


@asynccontextmanager
async def several(gateway: Gateway, model: str, *, renew_seconds: float = 0.1) -> AsyncIterator[fakes.FakeReplica]:
    """Has Envoy pick between the gateway's replica and another one, which it gives. Each test has its own model.

    This proxy does not count what it is told of: where it matters who was sent how many, it is not asked meanwhile.
    """
    other = fakes.FakeReplica()
    async with gateway.serve_replica(other) as address:
        await gateway.publish(gateway.replica_address, address)
        gateway.lane.answer = lane_pb.RenewResponse(
            lease_milliseconds=round(1000 * max(LEASE_SECONDS, 2 * renew_seconds)),
            renew_milliseconds=round(1000 * renew_seconds),
            revision="sha256:2",
            seed=1 << 52,
            candidates=[candidate("first", gateway.replica_address), candidate("second", address)],
            retry_count=2,
            running_weight=0.4,
            prefix_weight=0.5,
        )
        await gateway.publish_routes(ExpressRoute("alias", None, "", model))
        yield other
        await gateway.publish_routes()
        await gateway.publish(gateway.replica_address)


async def test_requests_are_picked_for_in_envoy_and_told_of(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "m", renew_seconds=1.5) as other:
        answers = [await rest.post(CHAT, json={"model": "alias"}) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert not gateway.picker.requests
        assert len(other.calls) == 2, "what was sent to one counts until it is heard of"
        metadata = other.calls[-1].metadata
        assert metadata["x-helios-route-model"] == "alias"
        assert metadata["x-helios-route-revision"] == "sha256:2"
        assert "x-helios-lane" not in metadata
        await asyncio.sleep(1.5)
        await rest.post(CHAT, json={"model": "alias"})
        first, second = gateway.lane.requests
        assert first.model == "m"
        assert not first.picks
        assert [pick.request_id for pick in second.picks] == [answer.headers["x-request-id"] for answer in answers]
        assert sorted(pick.replica_id for pick in second.picks) == ["first", "first", "second", "second"]
        assert all(first.now_seconds <= pick.picked_seconds <= second.now_seconds for pick in second.picks)


async def test_prompts_that_begin_alike_meet_the_same_replica(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "prefixes", renew_seconds=5) as other:
        for text in ("Once upon a time. ", "It was a dark and stormy night. "):
            for _ in range(3):
                assert (await rest.post(CHAT, json=prompt(text))).status_code == 200
        assert not gateway.picker.requests
        assert len(other.calls) == 3
        bodies = {bytes(call.request.data) for call in other.calls}
        assert len(bodies) == 1
        assert "x-helios-cohort" in other.calls[0].metadata


@pytest.mark.parametrize("name", ["x-session-id", "user", "safety_identifier", "prompt_cache_key"])
async def test_a_session_meets_the_replica_that_is_its_home(
    gateway: Gateway, rest: httpx.AsyncClient, name: str
) -> None:
    ring = Ring(["first", "second"])
    async with several(gateway, f"sessions by {name}") as other:
        gateway.lane.answer.session_weight = 0.6
        for number in range(12):
            key = f"sess\u00edon {number}"
            before = len(other.calls)
            is_header = name.startswith("x-")
            body = {"model": "alias"} | ({} if is_header else {name: key})
            answer = await rest.post(CHAT, json=body, headers=[(name.encode(), key.encode())] if is_header else [])
            assert answer.status_code == 200
            assert len(other.calls) - before == (ring.home(key) == "second"), key
        assert not gateway.picker.requests
        await asyncio.sleep(0.15)
        await rest.post(CHAT, json={"model": "alias"})
        assert all(pick.is_home for request in gateway.lane.requests for pick in request.picks)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"service_tier": "flex"}, {}),
        ({"cache_salt": "s"}, {}),
        ({"max_tokens": 1000}, {}),
        ({}, {"x-helios-durable": "true"}),
        ({}, {"authorization": "Bearer sk-helios-abc"}),
        ({"padding": "x" * 100_000}, {}),
    ],
    ids=["tier", "salt", "long answer", "durable", "one of our keys", "large"],
)
async def test_what_a_proxy_knows_better_is_asked_about(
    gateway: Gateway,
    rest: httpx.AsyncClient,
    body: dict[str, Any],
    headers: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    async with several(gateway, request.node.name):
        gateway.lane.answer.context_tokens = 1000
        gateway.lane.answer.tokens_per_byte = 1.0
        assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert not gateway.picker.requests
        answer = await rest.post(CHAT, json={"model": "alias"} | body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert gateway.picker.requests


async def test_where_the_proxy_lets_nothing_be_picked_it_is_asked(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "unfit"):
        gateway.lane.answer = lane_pb.RenewResponse(renew_milliseconds=100)
        assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert len(gateway.picker.requests) == 1


async def test_a_lease_ends_although_nobody_renews_it(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "stalled"):
        assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert not gateway.picker.requests

        async def stall(request: Any) -> None:
            await asyncio.sleep(5)

        gateway.lane.hold = stall
        await asyncio.sleep(LEASE_SECONDS)
        async with asyncio.timeout(2):
            assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert len(gateway.picker.requests) == 1


async def test_one_request_asks_and_others_go_on_meanwhile(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "meanwhile"):
        assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        go_on = asyncio.Event()

        async def wait(request: Any) -> None:
            await go_on.wait()

        gateway.lane.hold = wait
        await asyncio.sleep(0.12)
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(rest.post(CHAT, json={"model": "alias"}), name="ask")
            while len(gateway.lane.requests) < 2:
                await asyncio.sleep(0.005)
            # At once: the call is waited for no longer than a quarter of a second.
            async with asyncio.TaskGroup() as others:
                going = [others.create_task(rest.post(CHAT, json={"model": "alias"}), name="go on") for _ in range(3)]
            assert [other.result().status_code for other in going] == [200] * 3
            assert not asking.done()
            assert len(gateway.lane.requests) == 2
            go_on.set()
        assert asking.result().status_code == 200
        assert not gateway.picker.requests


async def test_a_client_that_leaves_while_its_request_asks_stops_nobody_from_asking(
    gateway: Gateway, rest: httpx.AsyncClient
) -> None:
    async with several(gateway, "left"):
        begun = asyncio.Event()

        async def stall(request: Any) -> None:
            begun.set()
            await asyncio.sleep(5)

        gateway.lane.hold = stall
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(rest.post(CHAT, json={"model": "alias"}), name="leave")
            await begun.wait()
            leaving.cancel()
        gateway.lane.hold = None
        await asyncio.sleep(0.3)
        assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert not gateway.picker.requests
        assert len(gateway.lane.requests) == 2


async def test_a_replica_that_refuses_is_left_for_the_next(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    async with several(gateway, "retried"):
        gateway.lane.answer.candidates.insert(0, candidate("gone", "127.0.0.1:9"))
        gateway.lane.answer.candidates[0].fixed_score = 1.0
        for _ in range(3):
            assert (await rest.post(CHAT, json={"model": "alias"})).status_code == 200
        assert not gateway.picker.requests


async def test_clients_can_not_name_a_model_to_the_lane(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    answer = await rest.post(CHAT, json={"model": "other"}, headers={"x-helios-lane": "m"})
    assert answer.status_code == 200
    assert len(gateway.picker.requests) == 1
    assert not gateway.lane.requests
