"""Bodies of the largest size, many at a time."""

import asyncio
import json
import time
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.api import httpbody_pb2

from helios.api.inference.v1 import openai_service_pb2_grpc
from tests.wire.gateway import Gateway
from tests.wire.late_replica import LateReplica

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
# 15,000 frames of 16 KiB; Envoy's own limit of frames in a queue is 10,000.
COUNT = 8
BODY = json.dumps({"model": "m", "text": "a" * ((32 << 20) - 1000)}).encode()


async def test_large_bodies_wait_for_a_replica_that_reads_late(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    replica = LateReplica()
    async with replica.serve(gateway.authority.issue("worker", gateway.directory / "pki" / "late")) as address:
        await gateway.publish(address)
        gateway.picker.endpoints = [address]
        async with asyncio.TaskGroup() as group:
            requests = [group.create_task(_post(rest)) for _ in range(COUNT)]
            await _sent(gateway, COUNT)
            replica.may_read.set()
        assert [request.result() for request in requests] == [(200, b"{}")] * COUNT
        assert replica.received_bytes > COUNT * len(BODY)


async def test_large_bodies_at_once_pass_through_the_picker(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(gateway.edge) as channel, asyncio.TaskGroup() as group:
        calls = [group.create_task(_call(channel)) for _ in range(COUNT)]
    assert [call.result() for call in calls] == [len(BODY)] * COUNT
    assert len(gateway.picker.bodies) == COUNT


async def _post(rest: httpx.AsyncClient) -> tuple[int, bytes]:
    answer = await rest.post(
        "/v1/chat/completions", content=BODY, headers={"content-type": "application/json"}, timeout=60
    )
    return answer.status_code, answer.content


async def _call(channel: grpc.aio.Channel) -> int:
    stub = openai_service_pb2_grpc.OpenAIServiceStub(channel)
    body = httpbody_pb2.HttpBody(content_type="application/json", data=BODY)
    answer: Any = await stub.CreateChatCompletion(body, timeout=60).read()
    return int(json.loads(answer.data)["size"])


async def _sent(gateway: Gateway, count: int) -> None:
    """Waits until Envoy has given so many requests to the replica's connection, or broken it."""
    assert gateway.envoy is not None
    name = 'envoy_cluster_upstream_rq_total{envoy_cluster_name="replicas"}'
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = await gateway.envoy.admin.prometheus()
        if any(line.startswith(name) and int(line.split()[-1]) >= count for line in text.splitlines()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("Envoy never sent the requests")
