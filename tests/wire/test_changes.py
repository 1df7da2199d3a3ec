"""What changes while the gateway runs: endpoints, certificates, the proxy itself."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helios.mesh.envoy.settings import Limits
from helios.mesh.errors import Unavailable
from helios.mesh.xds.server import XdsServer
from tests.wire.fakes import FakeReplica
from tests.wire.gateway import Gateway, running_envoy, running_gateway

CHAT = "/v1/chat/completions"


@pytest.fixture
async def changing(tmp_path: Path) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    # Connections live for a second: a renewed certificate is seen soon.
    async with (
        running_gateway(tmp_path, limits=Limits(connection_age_seconds=1)) as gateway,
        httpx.AsyncClient(base_url=f"http://{gateway.edge}", timeout=20, trust_env=False) as client,
    ):
        yield gateway, client


Changing = tuple[Gateway, httpx.AsyncClient]


async def test_the_first_request_after_the_acknowledgement_arrives_200_times(changing: Changing) -> None:
    gateway, client = changing
    async with gateway.serve_replica(FakeReplica("other")) as other:
        addresses = {"replica": gateway.replica_address, "other": other}
        waits = []
        for index in range(200):
            name = "other" if index % 2 == 0 else "replica"
            began = time.monotonic()
            await gateway.xds.wait_acked(gateway.xds.publish([addresses[name]]), began + 10, node="edge-under-test")
            waits.append(time.monotonic() - began)
            gateway.picker.endpoints = [addresses[name]]
            answer = await client.post(CHAT, json={"model": "m"})
            assert (answer.status_code, answer.json().get("replica")) == (200, name), answer.text
    assert sorted(waits)[100] < 0.5


async def test_an_envoy_that_hangs_has_acknowledged_nothing(changing: Changing) -> None:
    gateway, client = changing
    assert gateway.envoy is not None
    gateway.envoy.process.send_signal(signal.SIGSTOP)
    try:
        version = gateway.xds.publish([gateway.replica_address, "127.0.0.1:1"])
        with pytest.raises(Unavailable) as caught:
            await gateway.xds.wait_acked(version, time.monotonic() + 0.5)
    finally:
        gateway.envoy.process.send_signal(signal.SIGCONT)
    assert caught.value.metadata["lagging"] == "edge-under-test"
    await gateway.xds.wait_acked(version, time.monotonic() + 10)
    assert (await client.post(CHAT, json={"model": "m"})).status_code == 200


async def test_a_stream_survives_the_removal_of_its_endpoint(changing: Changing) -> None:
    gateway, client = changing
    body = {"model": "m", "stream": True, "chunks": 20, "pause": 0.02}
    async with client.stream("POST", CHAT, json=body) as answer:
        chunks = answer.aiter_raw()
        text = await anext(chunks)
        await gateway.publish()
        refused = await client.post(CHAT, json={"model": "m"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        async for chunk in chunks:
            text += chunk
    assert text.endswith(b"data: [DONE]\n\n")
    assert text.count(b'"index"') == 20


async def test_certificates_rotate_under_load_without_a_failed_call(changing: Changing) -> None:
    gateway, client = changing
    failures: list[str] = []
    count = 0
    is_over = False

    async def load() -> None:
        nonlocal count
        while not is_over:
            path, method = (CHAT, "POST") if count % 2 else ("/v1/models", "GET")
            answer = await client.request(method, path, json={"model": "m"} if method == "POST" else None)
            count += 1
            if answer.status_code != 200:
                failures.append(answer.text)

    async with asyncio.TaskGroup() as group:
        for index in range(4):
            group.create_task(load(), name=f"load {index}")
        for _ in range(5):
            for component in ("edge", "admin-edge", "worker", "proxy", "registry"):
                gateway.authority.issue(component, gateway.directory / "pki" / component)
            await asyncio.sleep(1.2)
        is_over = True
    assert failures == []
    assert count > 100
    assert len(gateway.replica.peer_certificates) >= 3, "Envoy took up its new certificates"


async def test_a_drain_ends_while_clients_go_on_to_come_and_cuts_no_request(changing: Changing) -> None:
    gateway, client = changing
    assert gateway.envoy is not None
    body = {"model": "m", "stream": True, "chunks": 40, "pause": 0.1}
    async with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == 'data: {"index":0}'
        began = time.monotonic()
        await gateway.envoy.admin.drain()
        while await _is_let_in(gateway):
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.02)
        assert "data: [DONE]" in [line async for line in lines]


async def _is_let_in(gateway: Gateway) -> bool:
    """Whether a client that comes now is served; with any other answer than 200 the test fails."""
    seen = len(gateway.replica.calls)
    async with httpx.AsyncClient(base_url=f"http://{gateway.edge}", trust_env=False) as client:
        try:
            answer = await client.post(CHAT, json={"model": "m"})
        except httpx.ConnectError:
            return False
        except httpx.ReadError:
            # The kernel had taken the connection for a listener that closed: nobody has seen the request.
            assert len(gateway.replica.calls) == seen
            return False
    assert answer.status_code == 200
    return True


async def test_a_held_request_is_answered_later(changing: Changing) -> None:
    gateway, client = changing
    released = asyncio.Event()

    async def hold(_: object) -> None:
        await released.wait()

    gateway.picker.hold = hold
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(client.post(CHAT, json={"model": "m"}), name="held")
        await asyncio.sleep(1)
        assert not waiting.done()
        released.set()
    assert waiting.result().status_code == 200


async def test_a_client_that_gives_up_ends_its_hold(changing: Changing) -> None:
    gateway, client = changing
    held, ended = asyncio.Event(), asyncio.Event()

    async def hold(_: object) -> None:
        held.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    gateway.picker.hold = hold
    with pytest.raises(httpx.ReadTimeout):
        await client.post(CHAT, json={"model": "m"}, timeout=0.5)
    assert held.is_set()
    async with asyncio.timeout(5):
        await ended.wait()


async def test_a_hold_survives_a_restart_of_the_proxy(changing: Changing) -> None:
    gateway, client = changing
    held = asyncio.Event()

    async def hold(_: object) -> None:
        held.set()
        await asyncio.Event().wait()

    gateway.picker.hold = hold
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(client.post(CHAT, json={"model": "m"}), name="held")
        await held.wait()
        await gateway.stop_proxy()
        gateway.picker.hold = None
        arriving = group.create_task(client.post(CHAT, json={"model": "m"}), name="arrives while there is no proxy")
        await asyncio.sleep(0.5)
        await gateway.start_proxy()
    assert [waiting.result().status_code, arriving.result().status_code] == [200, 200]


async def test_a_killed_envoy_starts_again_on_what_it_left(changing: Changing) -> None:
    gateway, client = changing
    assert gateway.envoy is not None
    socket = Path(gateway.settings.envoy_admin.removeprefix("unix:"))
    assert socket.stat().st_mode & 0o077 == 0, "nobody else may administrate"
    gateway.envoy.process.kill()
    await gateway.envoy.process.wait()
    assert socket.exists()
    async with running_envoy(gateway.settings):
        assert (await client.post(CHAT, json={"model": "m"})).status_code == 200


async def test_envoy_keeps_its_endpoints_while_the_proxy_restarts(changing: Changing) -> None:
    gateway, client = changing
    await gateway.stop_proxy()
    assert (await client.post(CHAT, json={"model": "m"})).status_code == 503
    await _until(client, status=503)

    gateway.xds = XdsServer()
    await gateway.start_proxy()
    await _until(client, status=200)
    # The new proxy has published nothing yet; what the one before it said still holds.
    assert (await client.post(CHAT, json={"model": "m"})).status_code == 200

    version = gateway.xds.publish([gateway.replica_address, "127.0.0.1:1"])
    assert not gateway.xds.is_acked(version), "nothing is sent before open()"
    gateway.xds.open()
    # However long the proxy was away: Envoy asks anew each second.
    await gateway.xds.wait_acked(version, time.monotonic() + 3, node="edge-under-test")
    assert (await client.post(CHAT, json={"model": "m"})).status_code == 200


async def test_an_envoy_without_memory_says_so(tmp_path: Path) -> None:
    # One byte is less than Envoy needs to be there at all; the monitor looks once a second.
    async with (
        running_gateway(tmp_path, limits=Limits(max_heap_bytes=1)) as gateway,
        httpx.AsyncClient(base_url=f"http://{gateway.edge}", timeout=20, trust_env=False) as client,
    ):
        async with asyncio.timeout(15):
            while (answer := await client.post(CHAT, json={"model": "m"})).status_code == 200:
                await asyncio.sleep(0.1)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"] == "5"
        async with grpc.aio.insecure_channel(gateway.edge) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "{" not in (caught.value.details() or "")


async def test_metrics_are_there_and_the_filters_had_no_error(changing: Changing) -> None:
    gateway, client = changing
    for path in (CHAT, "/v1/nothing", "/v1/models"):
        await client.post(path, json={"model": "m"})
    assert gateway.envoy is not None
    text = await gateway.envoy.admin.prometheus()
    values = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in text.splitlines() if line[:1] != "#"}
    lua_errors = [value for name, value in values.items() if "lua" in name and "errors" in name]
    assert lua_errors
    assert set(lua_errors) == {"0"}


async def _until(client: httpx.AsyncClient, *, status: int) -> None:
    """Waits until /healthz answers with a status."""
    async with asyncio.timeout(15):
        while (await client.get("/healthz")).status_code != status:
            await asyncio.sleep(0.05)
