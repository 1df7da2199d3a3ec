"""Explanations over the wire: what an operator is told of requests that were answered, refused, or given up."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1 import explanation_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest, NotFound
from helios.proxy.client import AdminClient
from helios.proxy.settings import ExplainSettings, HoldSettings
from tests.proxy.fakes import FakeWorker
from tests.proxy.harness import World, small_world

TRACE = "0af7651916cd43dd8448eb211c80319c"


def seconds(message: pb.RequestExplanation) -> dict[str, float]:
    return {phase.phase: phase.duration.ToNanoseconds() / 1e9 for phase in message.phases}


async def explained(
    admin: AdminClient, request_id: str, is_met: Callable[[pb.RequestExplanation], object]
) -> pb.RequestExplanation:
    """Asks until the explanation is as it should be: workers report a moment later."""
    async with asyncio.timeout(10):
        while not is_met(found := await admin.explain(request_id)):
            await asyncio.sleep(0.02)
    return found


def report(worker: FakeWorker, replica_id: str, request_id: str, *, first: float, whole: float) -> None:
    """Says, as a replica would, that a request came and was answered."""
    delta = types_pb2.LoadDelta(replica_id=replica_id)
    delta.started.add(request_id=request_id).arrived_at.FromDatetime(datetime.now(UTC))
    end = delta.finished.add(request_id=request_id, prompt_tokens=5, completion_tokens=7)
    end.time_to_first_token.FromNanoseconds(round(first * 1e9))
    end.duration.FromNanoseconds(round(whole * 1e9))
    worker.say(load=fleet_pb.LoadReport(deltas=[delta]))


async def test_a_cold_request_is_explained_from_its_arrival_to_its_first_token(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    slow = FakeWorker(start_seconds=0.4)
    async with small_world(world, worker=slow) as (proxy, envoy, worker), world.admin(proxy) as (admin, _):
        asked_at = datetime.now(UTC).timestamp()
        await envoy.ask("alias", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, age_seconds=0.25)
        [start] = worker.starts
        assert start.traceparent.startswith(f"00-{TRACE}-")
        assert start.requested_at.ToNanoseconds() / 1e9 == pytest.approx(asked_at - 0.25, abs=0.2)
        report(worker, start.replica_id, "q1", first=0.1, whole=0.3)
        found = await explained(admin, "q1", lambda e: e.summary.state == pb.REQUEST_STATE_FINISHED)
        summary, spent = found.summary, seconds(found)
        assert (summary.requested_model, summary.model, summary.revision) == ("alias", "m", "sha256:1")
        assert (summary.is_held, summary.replica_id, summary.completion_tokens) == (True, start.replica_id, 7)
        whole = found.explained.ToNanoseconds() / 1e9
        assert sum(spent.values()) == pytest.approx(whole, abs=1e-6)
        assert summary.time_to_first_token.ToNanoseconds() / 1e9 == pytest.approx(whole, abs=1e-6)
        assert spent["edge"] == pytest.approx(0.25, abs=0.15)
        assert spent["first_token"] == pytest.approx(0.1)
        assert {"resolve", "schedule", "publish"} <= spent.keys()
        assert found.phases[0].phase == "edge"
        assert all(phase.reason for phase in found.phases if phase.phase != "unexplained")
        [told] = found.starts
        assert (told.requested_by, told.replica_id, told.worker_id) == ("q1", start.replica_id, "w1")
        assert "memory" in told.placement or "free" in told.placement
        [candidate] = found.pick.candidates
        assert (candidate.replica_id, candidate.choice, set(candidate.scores)) == (
            start.replica_id,
            1,
            {"queue", "running", "kv_usage"},
        )


async def test_refusals_are_explained_with_what_the_client_was_told(world: World) -> None:
    world.registry.put("m")
    limits = HoldSettings(limit_seconds=0.4, model_count=1)
    slow = FakeWorker(start_seconds=30)
    async with small_world(world, worker=slow, hold=limits) as (proxy, envoy, _), world.admin(proxy) as (admin, _):
        await envoy.ask("nope")
        async with asyncio.TaskGroup() as group:
            expires = group.create_task(envoy.ask("m"))
            await asyncio.sleep(0.1)
            shed = await envoy.ask("m")
        unknown, expired, refused = [await admin.explain(f"q{number}") for number in (1, 2, 3)]
        assert (unknown.summary.reason, unknown.summary.model) == ("MODEL_NOT_FOUND", "")
        assert "nope" in unknown.refusal.message
        assert (expired.summary.reason, expired.summary.model) == ("HOLD_EXPIRED", "m")
        told = expired.refusal.retry_after.ToNanoseconds() / 1e9
        assert int(expires.result().headers["retry-after"]) == pytest.approx(told, abs=1.0)
        assert 0.3 < sum(seconds(expired).values()) < 8
        assert {phase.phase for phase in expired.phases} >= {"schedule", "starting"}
        assert refused.summary.reason == "OVERLOADED"
        assert shed.headers["retry-after"] == str(refused.refusal.retry_after.seconds + 1) or shed.status == 503


async def test_requests_are_found_by_model_and_state_the_newest_first(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    remembered = ExplainSettings(request_count=4)
    async with small_world(world, explain=remembered) as (proxy, envoy, _), world.admin(proxy) as (admin, _):
        for model in ("m", "alias", "nope", "m", "m"):
            await envoy.ask(model)
        everything = [entry.request_id for entry in await admin.list_requests()]
        assert everything == ["q5", "q4", "q3", "q2"]
        assert [entry.request_id for entry in await admin.list_requests("alias")] == ["q5", "q4", "q2"]
        assert [entry.request_id for entry in await admin.list_requests("nope")] == ["q3"]
        with pytest.raises(NotFound, match="never seen here, or too long ago") as caught:
            await admin.explain("q1")
        assert caught.value.reason == "REQUEST_NOT_FOUND"
        with pytest.raises(InvalidRequest):
            await admin.explain("")
        with pytest.raises(InvalidRequest, match="page_size"):
            await admin.list_requests(count=1001)
        async with Dialer(proxy.control_address, identity=world.identity("admin-edge"), peer="proxy") as dialer:
            stub, pages, token = dialer.stub(AdminServiceStub), list[list[str]](), ""
            while token or not pages:
                request = admin_pb.ListRequestsRequest(page_size=3, page_token=token)
                page = await stub.ListRequests(request, timeout=5)
                pages.append([entry.request_id for entry in page.requests])
                token = page.next_page_token
            assert pages == [["q5", "q4", "q3"], ["q2"]]
            refused = admin_pb.ListRequestsRequest(state=pb.REQUEST_STATE_REFUSED)
            assert [entry.request_id for entry in (await stub.ListRequests(refused, timeout=5)).requests] == ["q3"]


async def test_a_client_that_left_and_a_replica_that_failed_are_told(world: World) -> None:
    world.registry.put("m")
    broken = FakeWorker(start_seconds=0.5, fail="OUT_OF_MEMORY")
    async with small_world(world, worker=broken) as (proxy, envoy, worker), world.admin(proxy) as (admin, _):
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(envoy.ask("m"))
            failing = group.create_task(envoy.ask("m"))
            await asyncio.sleep(0.2)
            leaving.cancel()
        assert failing.result().status == 503
        left, failed = await admin.explain("q1"), await admin.explain("q2")
        assert left.summary.state == pb.REQUEST_STATE_LEFT
        assert failed.summary.state == pb.REQUEST_STATE_REFUSED
        assert "starting" in seconds(failed)
        assert [start.failure for start in failed.starts] == ["OUT_OF_MEMORY"]
        async with Dialer(proxy.control_address, identity=world.identity("admin-edge"), peer="proxy") as dialer:
            listed = await dialer.stub(AdminServiceStub).ListReplicas(admin_pb.ListReplicasRequest(), timeout=5)
        assert [(f.replica.replica_id, f.replica.failure.reason) for f in listed.failures] == [
            (worker.starts[0].replica_id, "OUT_OF_MEMORY")
        ]
