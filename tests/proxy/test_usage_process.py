"""Usage through a whole proxy: what a worker tells reaches the registry, also after a restart; advice is followed."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration

from helios.api.catalog.v1 import model_service_pb2 as catalog_pb
from helios.api.catalog.v1.model_service_pb2_grpc import ModelServiceStub
from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.registry.v1 import usage_service_pb2 as usage_pb
from helios.mesh.channel import Dialer
from helios.proxy.scaling.forecast import WarmPoolMode
from helios.proxy.settings import UsageSettings
from tests.proxy.fakes import FakeWorker, until
from tests.proxy.harness import World, small_world

OFTEN = UsageSettings(report_interval_seconds=0.2)


def end(worker: FakeWorker, request_id: str) -> None:
    finished = types_pb2.RequestFinished(
        request_id=request_id, prompt_tokens=11, completion_tokens=5, duration=Duration(seconds=2)
    )
    (replica_id,) = worker.replicas
    delta = types_pb2.LoadDelta(replica_id=replica_id, finished=[finished])
    worker.say(load=fleet_pb.LoadReport(deltas=[delta]))


async def test_what_was_asked_for_reaches_the_registry_and_so_does_what_runs_over_a_restart(world: World) -> None:
    world.registry.put("m")

    def counts() -> usage_pb.UsageCounts:
        return world.usage.counts("m")

    async with small_world(world, usage=OFTEN) as (_, envoy, worker):
        for request_id in ("over", "running"):
            assert (await envoy.ask("m", headers={"x-request-id": request_id})).status == 200
        (replica_id,) = worker.replicas
        worker.report(replica_id, started=("another proxy's", "over", "running"))
        end(worker, "another proxy's")
        end(worker, "over")
        await until(lambda: counts().completion_tokens == 5)
        assert (counts().requests, counts().prompt_tokens, counts().busy_ms, counts().cold_starts) == (2, 11, 2000, 1)
    async with small_world(world, worker=worker, usage=OFTEN) as (_, envoy, worker):
        end(worker, "running")
        await until(lambda: counts().completion_tokens == 10)
        assert counts().requests == 2


async def test_a_model_that_is_to_be_ready_is_started_without_a_request(world: World) -> None:
    world.registry.put("m")
    target = usage_pb.WarmTarget(model="m", rung=usage_pb.WARM_RUNG_READY, replica_count=1, reason="mornings")
    target.expires_at.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    world.usage.targets = [target]
    async with small_world(world, usage=UsageSettings(warm_pool=WarmPoolMode.ON)) as (proxy, _, worker):
        await until(lambda: worker.starts)
        assert worker.starts[0].model == "m"
        async with Dialer(proxy.control_address, identity=world.identity("edge"), peer="proxy") as dialer:
            told = await dialer.stub(ModelServiceStub).GetModel(catalog_pb.GetModelRequest(model="m"), timeout=10)
        shown = told.warm_target
        assert (shown.rung, shown.replica_count, shown.reason, shown.is_followed) == ("ready", 1, "mornings", True)
