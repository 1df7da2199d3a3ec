"""A whole proxy over real gRPC: what Envoy, workers and operators see."""

import asyncio

import grpc.aio
import orjson
import pytest
from google.api import httpbody_pb2
from google.protobuf.duration_pb2 import Duration

from helios.api.catalog.v1 import model_service_pb2 as catalog_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.mesh.channel import Dialer
from helios.proxy.settings import HoldSettings
from tests.proxy.fakes import FakeEnvoy, FakeWorker, until
from tests.proxy.harness import World, small_world

CHAT = "/helios.api.inference.v1.InferenceService/Chat"


def frame(message: bytes) -> bytes:
    """One gRPC frame."""
    return b"\0" + len(message).to_bytes(4, "big") + message


async def test_a_request_at_zero_is_held_starts_the_model_and_is_released(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    async with small_world(world) as (_, envoy, worker):
        answer = await envoy.ask("alias")
        (replica,) = worker.replicas.values()
        assert answer.headers == {
            "x-helios-endpoint": replica.address,
            "x-helios-route-model": "alias",
            "x-helios-route-revision": "sha256:1",
            "x-envoy-max-retries": "0",
        }
        # The release waited for Envoy to know the endpoint.
        assert envoy.endpoints == {replica.address}
        again = await envoy.ask("m")
        assert again.endpoint == replica.address
        assert len(worker.starts) == 1


async def test_many_first_requests_start_one_replica(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, worker):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(envoy.ask("m")) for _ in range(50)]
        assert {task.result().endpoint for task in tasks} == {next(iter(worker.replicas.values())).address}
        assert len(worker.starts) == 1


async def test_an_unknown_model_is_404_with_openais_body(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, _):
        answer = await envoy.ask("nope")
        assert (answer.status, answer.grpc_status) == (404, 5)
        error = orjson.loads(answer.headers["x-openai-error"])["error"]
        assert error["code"] == "model_not_found"
        assert "nope" in error["message"]


async def test_header_and_body_that_differ_are_refused(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, _):
        answer = await envoy.ask("m", header="n")
        assert (answer.status, answer.grpc_status) == (400, 3)
        assert orjson.loads(answer.headers["x-openai-error"])["error"]["code"] == "model_mismatch"
        assert (await envoy.ask("m", header="m")).status == 200


async def test_native_grpc_without_the_header_is_routed_by_its_message(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, _):
        body = frame(inference_pb.ChatRequest(model="m").SerializeToString())
        answer = await envoy.ask(None, path=CHAT, body=body)
        assert answer.asked_body
        assert answer.endpoint
        chat = httpbody_pb2.HttpBody(content_type="application/json", data=b'{"model": "m"}')
        assert (await envoy.ask(None, body=frame(chat.SerializeToString()))).endpoint == answer.endpoint


@pytest.mark.parametrize(
    ("data", "content_type", "message"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"{}", "application/json", "you must provide a model parameter"),
        (b'{"model": 3}', "application/json", "must be a string"),
        (b"[]", "application/json", "JSON object"),
        (b"model=m", "text/plain", "content type"),
    ],
)
async def test_a_body_that_names_no_model_is_400(world: World, data: bytes, content_type: str, message: str) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, _):
        http = httpbody_pb2.HttpBody(content_type=content_type, data=data)
        answer = await envoy.ask(None, body=frame(http.SerializeToString()))
        assert (answer.status, answer.grpc_status) == (400, 3)
        assert message in answer.body


async def test_a_hold_that_expires_is_503_with_retry_after(world: World) -> None:
    world.registry.put("m")
    slow = FakeWorker(start_seconds=30)
    async with small_world(world, worker=slow, hold=HoldSettings(limit_seconds=0.5)) as (_, envoy, _):
        answer = await envoy.ask("m")
        assert (answer.status, answer.grpc_status) == (503, 14)
        assert int(answer.headers["retry-after"]) >= 1
        assert orjson.loads(answer.headers["x-openai-error"])["error"]["code"] == "hold_expired"


async def test_a_clients_own_deadline_bounds_its_hold(world: World) -> None:
    world.registry.put("m")
    async with small_world(world, worker=FakeWorker(start_seconds=30)) as (_, envoy, _):
        async with asyncio.timeout(3):
            answer = await envoy.ask("m", headers={"grpc-timeout": "300m"})
        assert answer.status == 503


async def test_a_hold_is_counted_from_the_requests_own_start(world: World) -> None:
    """It may have waited at another proxy before."""
    world.registry.put("m")
    limits = HoldSettings(limit_seconds=20)
    async with small_world(world, worker=FakeWorker(start_seconds=30), hold=limits) as (_, envoy, _):
        async with asyncio.timeout(3):
            answer = await envoy.ask("m", age_seconds=19.7)
        assert orjson.loads(answer.headers["x-openai-error"])["error"]["code"] == "hold_expired"


async def test_full_holds_shed(world: World) -> None:
    world.registry.put("m")
    limits = HoldSettings(limit_seconds=5, model_count=2)
    async with small_world(world, worker=FakeWorker(start_seconds=0.5), hold=limits) as (_, envoy, _):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(envoy.ask("m")) for _ in range(4)]
        statuses = sorted(task.result().status for task in tasks)
        assert statuses == [200, 200, 503, 503]
        shed = next(task.result() for task in tasks if task.result().status == 503)
        assert orjson.loads(shed.headers["x-openai-error"])["error"]["code"] == "overloaded"
        assert "retry-after" in shed.headers


async def test_a_client_that_leaves_frees_its_hold(world: World) -> None:
    world.registry.put("m")
    limits = HoldSettings(limit_seconds=10, model_count=1)
    worker = FakeWorker(start_seconds=0.6)
    async with small_world(world, worker=worker, hold=limits) as (_, envoy, _), asyncio.TaskGroup() as group:
        leaving = group.create_task(envoy.ask("m"))
        await asyncio.sleep(0.2)
        assert (await envoy.ask("m")).status == 503
        leaving.cancel()
        await asyncio.sleep(0.1)
        assert (await envoy.ask("m")).status == 200


async def test_a_failed_start_tells_everyone_who_waits_why(world: World) -> None:
    world.registry.put("m")
    async with small_world(world, worker=FakeWorker(fail="ENGINE_DIED")) as (proxy, envoy, worker):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(envoy.ask("m")) for _ in range(3)]
        for task in tasks:
            assert task.result().status == 503
            assert "ENGINE_DIED" in task.result().body
            assert "retry-after" in task.result().headers
        async with world.admin(proxy) as (_, models):
            assert "ENGINE_DIED" in (await models.get_model("m")).failure
        worker.fail = ""
        await asyncio.sleep(1.0)
        assert (await envoy.ask("m")).status == 200


async def test_a_broken_session_is_resynchronised_without_a_second_start(world: World) -> None:
    world.registry.put("m")
    worker = FakeWorker()
    async with world.running_registry(), world.running_proxy() as proxy, world.envoy(proxy) as envoy:
        async with world.worker(proxy, worker):
            first = await envoy.ask("m")
        async with asyncio.TaskGroup() as group:
            held = group.create_task(envoy.ask("m"))
            await asyncio.sleep(0.3)
            # Unreachable: held, and its endpoint stays.
            assert not held.done()
            assert envoy.endpoints == {first.endpoint}
            async with world.worker(proxy, worker):
                assert (await held).endpoint == first.endpoint
        assert len(worker.starts) == 1


async def test_a_newer_session_takes_over(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (proxy, envoy, worker):
        await envoy.ask("m")
        newer = FakeWorker(incarnation="2", replicas=dict(worker.replicas))
        async with world.worker(proxy, newer):
            answer = await envoy.ask("m")
            assert answer.endpoint == next(iter(newer.replicas.values())).address
            before = newer.heartbeats
            await until(lambda: newer.heartbeats > before)


async def test_a_restarted_proxy_holds_until_its_workers_are_back(world: World) -> None:
    world.registry.put("m")
    worker = FakeWorker()
    async with world.running_registry():
        async with world.running_proxy() as proxy, world.envoy(proxy) as envoy, world.worker(proxy, worker):
            first = await envoy.ask("m")
        async with world.running_proxy() as proxy, world.envoy(proxy) as envoy, asyncio.TaskGroup() as group:
            held = group.create_task(envoy.ask("m"))
            await asyncio.sleep(0.5)
            assert not held.done()
            assert envoy.endpoints == set()
            async with world.worker(proxy, worker):
                assert (await held).endpoint == first.endpoint
    assert len(worker.starts) == 1


async def test_a_restarted_proxy_knows_its_models_with_the_registry_down(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    async with small_world(world) as (_, envoy, _):
        await envoy.ask("m")
        await until((world.directory / "proxy" / "catalogue.json").exists)
    async with world.running_proxy() as proxy, world.envoy(proxy) as envoy, world.worker(proxy):
        assert (await envoy.ask("alias")).endpoint
        unknown = await envoy.ask("other")
        assert (unknown.status, orjson.loads(unknown.headers["x-openai-error"])["error"]["code"]) == (
            503,
            "registry_unavailable",
        )


async def test_a_model_that_the_watch_missed_is_asked_for(world: World) -> None:
    world.registry.is_watch_broken = True
    world.registry.put("late")
    async with small_world(world) as (_, envoy, _):
        assert (await envoy.ask("late")).status == 200
        assert (await envoy.ask("never")).status == 404


async def test_a_new_revision_is_served_by_a_new_replica(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, worker):
        await envoy.ask("m")
        world.registry.put("m", revision="sha256:2")
        await until(lambda: len(worker.starts) == 2)
        answer = await envoy.ask("m")
        assert answer.headers["x-helios-route-revision"] == "sha256:2"
        await until(lambda: len(envoy.endpoints) == 1)


async def test_the_breaker_opens_on_unavailable_answers(world: World) -> None:
    world.registry.put("m")
    async with small_world(world, hold=HoldSettings(limit_seconds=0.3)) as (_, envoy, worker):
        await envoy.ask("m")
        (replica_id,) = worker.replicas
        worker.report(replica_id, finished=[("a", 14), ("b", 14), ("c", 14)])
        await asyncio.sleep(0.1)
        assert (await envoy.ask("m")).status == 503


async def test_a_model_shows_how_far_its_weights_are_and_is_not_promised_before_them(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (proxy, _, worker), world.admin(proxy) as (admin, models):
        worker.start_seconds = 60.0
        await admin.preload("m")
        await until(lambda: bool(worker.replicas))
        (replica_id,) = worker.replicas
        worker.replicas[replica_id].fetch.CopyFrom(
            types_pb2.FetchProgress(
                done_bytes=10, total_bytes=10_000, bytes_per_second=2.0, remaining=Duration(seconds=4_995)
            )
        )
        worker.change(replica_id, state=types_pb2.REPLICA_STATE_FETCHING)

        async def fetched() -> int:
            return (await models.get_model("m")).fetch.done_bytes

        async with asyncio.timeout(20):
            while await fetched() != 10:
                await asyncio.sleep(0.02)
        model = await models.get_model("m")
        assert (model.fetch.total_bytes, model.fetch.bytes_per_second) == (10_000, 2.0)
        assert model.fetch.remaining_seconds == 4_995
        assert model.estimated_ready_seconds >= 4_995
        worker.replicas[replica_id].ClearField("fetch")
        worker.change(replica_id, state=types_pb2.REPLICA_STATE_LOADING)
        async with asyncio.timeout(20):
            while (await models.get_model("m")).HasField("fetch"):
                await asyncio.sleep(0.02)


async def test_operators_preload_scale_list_and_evict(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    async with small_world(world) as (proxy, envoy, worker), world.admin(proxy) as (admin, models):
        (model,) = await models.list_models()
        assert (model.id, model.object, model.state, list(model.aliases)) == ("m", "model", 1, ["alias"])
        assert model.estimated_ready_seconds > 0
        assert (model.start.rung, model.start.scored_count) == (catalog_pb.START_RUNG_CLOUD, 0)
        assert model.start.seconds == pytest.approx(model.estimated_ready_seconds, abs=0.1)
        assert sum(model.resources.memory_items.values()) == model.resources.memory_bytes
        assert len(await admin.preload("alias")) == 1
        await until(lambda: len(envoy.endpoints) == 1)
        model = await models.get_model("alias")
        assert (model.state, model.replicas.on_disk, model.HasField("start")) == (3, 1, False)
        assert (await admin.scale("m", 2)).desired_count == 2
        await until(lambda: len(worker.starts) == 2)
        await until(lambda: len(envoy.endpoints) == 2)
        assert (await envoy.ask("m")).headers["x-envoy-max-retries"] == "1"
        (listed,) = await admin.list_workers()
        assert (listed.worker_id, listed.replica_count) == ("w1", 2)
        assert len(await admin.list_replicas("m")) == 2
        with pytest.raises(Exception, match="scale it to 0"):
            await admin.evict("m")
        assert (await admin.scale("m", 0)).desired_count == 0
        await until(lambda: not envoy.endpoints)
        assert worker.replicas == {}
        await admin.evict("m")
        await until(lambda: worker.commands[-1].WhichOneof("command") == "evict")
        assert (await envoy.ask("m")).status == 200


async def test_a_long_prompt_goes_where_there_is_room_for_it(world: World) -> None:
    world.registry.put("m", min_replicas=2)
    async with small_world(world) as (_, envoy, worker):
        await until(lambda: len(envoy.endpoints) == 2)
        short, long = worker.replicas
        at_short, at_long = (worker.replicas[replica_id].address for replica_id in (short, long))
        worker.change(short, max_context_tokens=4096)
        worker.change(long, max_context_tokens=131_072)

        async def picked(body_bytes: int) -> set[str]:
            """The first choices of some requests, which load alone would spread."""
            asked = [await envoy.ask("m", headers={"content-length": str(body_bytes)}) for _ in range(4)]
            return {answer.headers["x-helios-endpoint"].partition(",")[0] for answer in asked}

        async with asyncio.timeout(20):
            while await picked(300_000) != {at_long}:
                await asyncio.sleep(0.05)
        assert at_short in await picked(100)
        # What fits into neither is a replica's to refuse.
        assert await picked(3_000_000)


async def test_preload_without_a_worker_says_so(world: World) -> None:
    world.registry.put("m")
    async with world.running_registry(), world.running_proxy() as proxy, world.admin(proxy) as (admin, models):
        await models.get_model("m")
        with pytest.raises(Exception, match="no worker") as caught:
            await admin.preload("m")
        assert getattr(caught.value, "reason", "") == "NO_WORKER"


async def test_only_the_admin_edge_may_use_admin_and_only_the_edge_may_pick(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (proxy, _, _):
        async with world.admin(proxy, "edge") as (admin, models):
            assert len(await models.list_models()) == 1
            with pytest.raises(Exception, match="edge may not call"):
                await admin.list_workers()
        async with FakeEnvoy.connected(proxy.picker_address, world.identity("edge")) as envoy:
            assert (await envoy.ask("m")).status == 200
        async with Dialer(proxy.picker_address, identity=world.identity("worker"), peer="proxy") as dialer:
            with pytest.raises(grpc.aio.AioRpcError, match="worker may not call"):
                await FakeEnvoy(dialer).ask("m")


async def test_no_request_is_released_before_envoy_knows_the_endpoint(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (_, envoy, worker), asyncio.TaskGroup() as group:
        envoy.acking.clear()
        held = group.create_task(envoy.ask("m"))
        await until(lambda: any(replica.address for replica in worker.replicas.values()))
        await asyncio.sleep(0.3)
        assert not held.done()
        envoy.acking.set()
        assert (await held).endpoint
