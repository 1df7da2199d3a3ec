"""Answers that are odd, slow, large or silent, and replicas that are dead: what gateways are known to break.

The experiments that need time run at once, on two gateways: one as users have it, one whose limits are seconds. Each
test then looks at what came of one of them.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
from google.api import httpbody_pb2

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.mesh.envoy.settings import Limits
from tests.wire.fakes import FakeReplica
from tests.wire.gateway import Gateway, running_gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
CHAT = "/v1/chat/completions"
IDLE_SECONDS = 5.0
STEP_SECONDS = 0.5
# Longer than every limit of the gateway that it goes through.
STREAM_SECONDS = 6.5
# Far above every limit, so that who hangs is told apart from who is ended; and what a slow machine may take to end one.
CLIENT_SECONDS = 60
SPARE_SECONDS = 20
TIGHT = Limits(stream_idle_seconds=IDLE_SECONDS - 1, upload_seconds=3, connection_age_seconds=1, hold_limit_seconds=1)
EVENTS = (
    "".join(f'data: {{"index":{index},"text":"é—\U0001f600\\n\\n"}}\n\n' for index in range(40)) + "data: [DONE]\n\n"
)


@dataclass
class OddReplica(FakeReplica):
    """Answers as the body says: ``cut`` bytes a message, ``large`` bytes in all, or ``steps`` events and then silence.

    ``{"never": true}`` answers nothing.
    """

    async def CreateChatCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        body = json.loads(request.data)
        if "cut" in body:
            data = EVENTS.encode()
            for begin in range(0, len(data), body["cut"]):
                yield _events(data[begin : begin + body["cut"]])
        elif "large" in body:
            part = b"x" * body["part"]
            for _ in range(body["large"] // body["part"]):
                yield httpbody_pb2.HttpBody(content_type="application/json", data=part)
        elif "never" in body:
            await asyncio.Event().wait()
        else:
            for index in range(body["steps"]):
                yield _events(b'data: {"index":%d}\n\n' % index)
                await asyncio.sleep(STEP_SECONDS)
            if body.get("falls_silent"):
                await asyncio.Event().wait()
            yield _events(b"data: [DONE]\n\n")


def _events(data: bytes) -> httpbody_pb2.HttpBody:
    return httpbody_pb2.HttpBody(content_type="text/event-stream", data=data)


@dataclass(frozen=True)
class Outcome:
    """What a client saw: a status where there was an answer, the text, how it ended, and after how long."""

    status: int
    text: str
    error: httpx.TransportError | None
    seconds: float

    def was_ended_after(self, limit_seconds: float) -> bool:
        """Whether the gateway ended it by its limit; no client that gave up did, whose patience is longer."""
        is_patient = not isinstance(self.error, httpx.TimeoutException)
        return is_patient and limit_seconds <= self.seconds < limit_seconds + SPARE_SECONDS


@dataclass(frozen=True)
class Outcomes:
    """What came of the experiments."""

    long: Outcome
    silent: Outcome
    unanswered: Outcome
    unsent: Outcome
    dead: Outcome
    others: list[float]


async def ask(gateway: Gateway, **body: Any) -> Outcome:
    return await _outcome(gateway, json.dumps({"model": "m"} | body).encode())


async def _outcome(gateway: Gateway, content: bytes | AsyncIterator[bytes]) -> Outcome:
    began, text, status = time.monotonic(), "", 0
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"http://{gateway.edge}", timeout=CLIENT_SECONDS, trust_env=False) as client:
        try:
            async with client.stream("POST", CHAT, content=content, headers=headers) as answer:
                status = answer.status_code
                async for piece in answer.aiter_text():
                    text += piece
        except httpx.TransportError as error:
            return Outcome(status, text, error, time.monotonic() - began)
    return Outcome(status, text, None, time.monotonic() - began)


async def _never_ending_body() -> AsyncIterator[bytes]:
    yield b'{"model": "m", "messages": ["'
    while True:
        await asyncio.sleep(0.2)
        yield b"a"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def odd_address(shared_gateway: Gateway) -> AsyncIterator[str]:
    async with shared_gateway.serve_replica(OddReplica()) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def usual(gateway: Gateway, odd_address: str) -> Gateway:
    """A gateway as users have it, with an odd replica."""
    await gateway.publish(odd_address)
    gateway.picker.endpoints = [odd_address]
    return gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outcomes(shared_gateway: Gateway, odd_address: str, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory: Path = tmp_path_factory.mktemp("tight")
    async with running_gateway(directory, limits=TIGHT) as tight, tight.serve_replica(OddReplica()) as odd:
        await tight.publish(odd)
        tight.picker.endpoints = [odd]
        async with asyncio.TaskGroup() as group:
            dead = group.create_task(_beside_a_dead_one(shared_gateway, odd_address))
            long = group.create_task(ask(tight, steps=int(STREAM_SECONDS / STEP_SECONDS)))
            silent = group.create_task(ask(tight, steps=1, falls_silent=True))
            unanswered = group.create_task(ask(tight, never=True))
            unsent = group.create_task(_outcome(tight, _never_ending_body()))
        return Outcomes(long.result(), silent.result(), unanswered.result(), unsent.result(), *dead.result())


async def _beside_a_dead_one(gateway: Gateway, good: str) -> tuple[Outcome, list[float]]:
    """Asks a replica that takes connections and says nothing, with a good one behind it; meanwhile the good one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        dead = f"127.0.0.1:{listener.getsockname()[1]}"
        await gateway.publish(good, dead)
        gateway.picker.pick = lambda request: [dead, good] if request.model == "dead" else [good]
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ask(gateway, model="dead", steps=0))
            others = []
            while not waiting.done():
                one = await ask(gateway, steps=0)
                assert (one.status, one.error) == (200, None), one
                others.append(one.seconds)
                await asyncio.sleep(0.1)
        return waiting.result(), others


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 100, 1 << 20])
async def test_events_arrive_byte_for_byte_wherever_they_are_cut(usual: Gateway, cut: int) -> None:
    outcome = await ask(usual, cut=cut)
    assert (outcome.status, outcome.error) == (200, None)
    assert outcome.text == EVENTS


@pytest.mark.parametrize("part", [20_000_000, 1_000_000], ids=["one message", "many messages"])
async def test_an_answer_of_20_mb_arrives_whole(usual: Gateway, part: int) -> None:
    rest = await ask(usual, large=20_000_000, part=part)
    assert (rest.status, rest.error, len(rest.text)) == (200, None, 20_000_000)
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(usual.edge, options=options) as channel:
        body = json.dumps({"model": "m", "large": 20_000_000, "part": part}).encode()
        request = httpbody_pb2.HttpBody(content_type="application/json", data=body)
        stub = openai_service_pb2_grpc.OpenAIServiceStub(channel)
        messages = [message async for message in stub.CreateChatCompletion(request, timeout=60)]
    assert sum(len(message.data) for message in messages) == 20_000_000


@pytest.mark.parametrize("size", [32 << 10, 128 << 10, 220_000, 256 << 10, 20_000_000])
async def test_prompts_of_every_size_arrive_whole(gateway: Gateway, rest: httpx.AsyncClient, size: int) -> None:
    # Where others have a buffer's bound. What is in the picker's way is asked for by its length alone.
    body = json.dumps({"model": "m", "prompt": "a" * size}).encode()
    answer = await rest.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["size"]) == (200, len(body))


async def test_a_stream_lasts_longer_than_every_limit_while_it_says_something(outcomes: Outcomes) -> None:
    assert (outcomes.long.status, outcomes.long.error) == (200, None)
    assert outcomes.long.text.endswith("data: [DONE]\n\n")
    assert outcomes.long.seconds > max(IDLE_SECONDS, TIGHT.upload_seconds, TIGHT.connection_age_seconds)


async def test_a_stream_that_falls_silent_is_ended(outcomes: Outcomes) -> None:
    assert (outcomes.silent.status, outcomes.silent.text) == (200, 'data: {"index":0}\n\n')
    assert outcomes.silent.error is not None, "a client must not take it for a whole answer"
    assert outcomes.silent.was_ended_after(IDLE_SECONDS), outcomes.silent


async def test_a_request_that_nobody_answers_is_ended_with_an_error(outcomes: Outcomes) -> None:
    assert outcomes.unanswered.status in (408, 504), outcomes.unanswered
    assert outcomes.unanswered.was_ended_after(IDLE_SECONDS), outcomes.unanswered
    assert set(json.loads(outcomes.unanswered.text)["error"]) == {"message", "type", "param", "code"}


async def test_a_body_that_never_ends_is_ended(outcomes: Outcomes) -> None:
    assert outcomes.unsent.status == 408 or outcomes.unsent.error is not None, outcomes.unsent
    assert outcomes.unsent.was_ended_after(TIGHT.upload_seconds), outcomes.unsent


async def test_a_dead_replica_is_left_for_the_next_one_and_holds_up_nobody_else(outcomes: Outcomes) -> None:
    assert (outcomes.dead.status, outcomes.dead.error) == (200, None), outcomes.dead
    # One was asked after the other: had one waited for as long as the dead one was, there would be one or two.
    assert len(outcomes.others) > 2
