"""Answers of the real engine that another replica takes up: at every token, and where a replica is killed."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import Message

from helios.api.fleet.v1 import replacement_service_pb2, replacement_service_pb2_grpc
from helios.api.inference.v1 import continuation_service_pb2 as pb
from helios.api.inference.v1 import continuation_service_pb2_grpc, openai_service_pb2_grpc
from helios.api.inference.v1 import inference_service_pb2 as native_pb
from helios.mesh import names
from helios.mesh.channel import Dialer
from helios.mesh.server import MeshServer, ServerOptions
from helios.proxy.relay.moves import MoveTeller
from helios.proxy.relay.replicas import Replicas
from helios.proxy.relay.servicer import OPENAI_SERVICE, RelayServicer
from helios.proxy.relay.session import Surroundings
from helios.proxy.replacement.servicer import REPLACEMENT_SERVICE
from helios.worker.replica.settings import EngineSettings
from tests.worker.replica.support import MODEL, REVISION, Launcher, Leaves, RunningReplica, wait_gone
from tests.worker.replica.test_replica_real import START_SECONDS, details, events, fork_real, read
from tests.worker.replica.test_settings_real import WEATHER, running

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
KV = {"kv_cache_bytes": 64 << 20, "orphan_seconds": 3600.0}
SETTINGS = EngineSettings(dtype="float32", tool_call_parser="hermes")
# A model that repeats these makes characters of several tokens each.
FOXES = "🦊 🐙 🦊 🐙 🦊 🐙 🦊 🐙"
# Without the grammar that a strict one comes with.
LOOSE = WEATHER | {"function": {**WEATHER["function"], "strict": False}}  # type: ignore[dict-item]
CREATED = re.compile(rb'"created":(\d+)')
Stub = openai_service_pb2_grpc.OpenAIServiceStub


@pytest.fixture(scope="module")
def survivor(
    launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path
) -> Iterator[RunningReplica]:
    directory = tmp_path_factory.mktemp("survivor")
    with running(launcher, leaves, directory, smollm2_directory, SETTINGS, **KV) as replica:
        yield replica


def body(**fields: Any) -> HttpBody:
    document = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0} | fields
    return HttpBody(content_type="application/json", data=orjson.dumps(document))


def completion(**fields: Any) -> HttpBody:
    return body(**{"prompt": FOXES, "max_tokens": 14, "ignore_eos": True} | fields)


def chat(**fields: Any) -> HttpBody:
    return body(**{"messages": [{"role": "user", "content": "Count from 1 to 20."}], "max_tokens": 24} | fields)


async def answer(
    replica: RunningReplica, call: pb.AnswerRequest.Call.ValueType, request: Message, progress: pb.Progress | None
) -> list[pb.AnswerResponse]:
    order = pb.AnswerRequest(call=call, request=request.SerializeToString(), progress=progress)
    async with replica.leaves.dial(replica.address, as_component="relay") as dialer:
        stub = dialer.stub(continuation_service_pb2_grpc.ContinuationServiceStub)
        metadata = ((names.REQUEST_ID_HEADER, "r-1"),)
        return [response async for response in stub.Answer(order, metadata=metadata, **OPTIONS)]


def until(responses: Sequence[pb.AnswerResponse], count: int) -> pb.Progress:
    """What a client has after so many of a replica's messages."""
    progress = pb.Progress(opening=responses[0].opening)
    for response in responses[:count]:
        progress.steps.token_ids.extend(response.steps.token_ids)
        progress.steps.sizes.extend(response.steps.sizes)
    return progress


def data_of(responses: Sequence[pb.AnswerResponse]) -> bytes:
    return b"".join(HttpBody.FromString(message).data for response in responses for message in response.messages)


@pytest.mark.parametrize(
    ("call", "request_body", "every"),
    [
        pytest.param(pb.AnswerRequest.CALL_OPENAI_COMPLETION, completion(), 4, id="some cuts"),
        pytest.param(pb.AnswerRequest.CALL_OPENAI_COMPLETION, completion(), 1, id="every cut", marks=pytest.mark.soak),
        pytest.param(
            pb.AnswerRequest.CALL_OPENAI_COMPLETION,
            completion(stop=["🐙 🦊 🐙 🦊"], min_tokens=4),
            1,
            id="text held back",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            pb.AnswerRequest.CALL_OPENAI_CHAT,
            chat(stop=["7"], repetition_penalty=1.1),
            7,
            id="conversation",
        ),
        pytest.param(pb.AnswerRequest.CALL_OPENAI_CHAT, chat(tools=[LOOSE]), 2, id="tools", marks=pytest.mark.soak),
    ],
)
async def test_taken_up_after_any_message_an_answer_is_the_same(
    survivor: RunningReplica, call: pb.AnswerRequest.Call.ValueType, request_body: HttpBody, every: int
) -> None:
    whole = await answer(survivor, call, request_body, None)
    created = CREATED.search(data_of(whole))
    assert created is not None
    assert len(whole) > 3
    assert whole[-1].is_finished
    for count in range(1, len(whole) - 1, every):
        rest = await answer(survivor, call, request_body, until(whole, count))
        assert told(data_of(whole[:count]) + data_of(rest)) == told(data_of(whole))
        assert until([*whole[:count], *rest], 99).steps.token_ids == until(whole, 99).steps.token_ids
        assert set(CREATED.findall(data_of(rest))) == {created[1]}


async def test_a_typed_answer_is_the_same_too(survivor: RunningReplica) -> None:
    sampling = native_pb.SamplingParameters(temperature=0, max_tokens=9, ignore_eos=True)
    request = native_pb.CompleteRequest(model=MODEL, text=FOXES, sampling=sampling)
    whole = await answer(survivor, pb.AnswerRequest.CALL_COMPLETE, request, None)
    for count in (1, 5):
        rest = await answer(survivor, pb.AnswerRequest.CALL_COMPLETE, request, until(whole, count))
        assert typed([*whole[:count], *rest]) == typed(whole)


def typed(responses: Sequence[pb.AnswerResponse]) -> tuple[str, list[int], list[int], Any]:
    """Text, tokens, and their places in the answer; what it ended with."""
    messages = [native_pb.CompleteResponse.FromString(each) for response in responses for each in response.messages]
    deltas = [message.delta for message in messages if message.HasField("delta")]
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    places = [delta.output_index + at for delta in deltas for at in range(len(delta.token_ids))]
    return "".join(delta.text for delta in deltas), token_ids, places, messages[-1].finished


async def test_cuts_within_a_character_were_among_these(survivor: RunningReplica) -> None:
    whole = await answer(survivor, pb.AnswerRequest.CALL_OPENAI_COMPLETION, completion(), None)
    texts = [event["choices"][0]["text"] for event in parsed(data_of(whole)) if event["choices"]]
    assert "" in texts
    assert "🐙" in "".join(texts)


def parsed(data: bytes) -> list[Any]:
    return events([HttpBody(content_type="text/event-stream", data=data)])


def told(data: bytes) -> tuple[str, list[Any]]:
    """What an answer says, however its tokens were joined in events: its texts in a row, and all the rest."""
    texts, rest = [], []
    for event in parsed(data):
        for choice in event["choices"]:
            part = choice.get("delta", choice)
            for place in (part, *(call["function"] for call in part.get("tool_calls", ()))):
                texts += [place.pop(name, None) or "" for name in ("text", "content", "arguments")]
            for tool_call in part.get("tool_calls", ()):
                # Each is named anew by the replica that begins with it.
                tool_call.pop("id", None)
        if event not in rest:
            rest.append(event)
    return "".join(texts), rest


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2, "temperature": 1.0}, "n"),
        ({"seed": 7, "temperature": 1.0}, "seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": 2}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "response_format"),
        ({"prompt": [FOXES, FOXES]}, "prompt"),
        ({"bad_words": ["fox"]}, "bad_words"),
    ],
)
async def test_what_an_engine_keeps_for_itself_is_refused_from_the_start(
    survivor: RunningReplica, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(survivor, pb.AnswerRequest.CALL_OPENAI_COMPLETION, completion(**fields), None)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value).reason == "NOT_CONTINUABLE"
    assert details(caught.value).metadata["param"] == param


async def test_nobody_but_a_relay_is_answered(survivor: RunningReplica) -> None:
    async with survivor.leaves.dial(survivor.address) as edge:
        stub = edge.stub(continuation_service_pb2_grpc.ContinuationServiceStub)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(stub.Answer(pb.AnswerRequest(), **OPTIONS))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@dataclass
class Proxy(replacement_service_pb2_grpc.ReplacementServiceServicer):
    """Names the replica that is left."""

    endpoint: str
    asked: list[replacement_service_pb2.PickReplicaRequest] = field(default_factory=list)

    async def NoteMove(self, request: Any, context: Any) -> replacement_service_pb2.NoteMoveResponse:
        return replacement_service_pb2.NoteMoveResponse(is_noted=True)

    async def PickReplica(self, request: Any, context: Any) -> replacement_service_pb2.PickReplicaResponse:
        self.asked.append(request)
        return replacement_service_pb2.PickReplicaResponse(endpoints=[self.endpoint])


@asynccontextmanager
async def relay(proxy: Proxy, leaves: Leaves) -> AsyncIterator[Dialer]:
    options = ServerOptions(drain_seconds=0.0, transport="http2")
    async with AsyncExitStack() as stack:
        control = MeshServer(
            listen="127.0.0.1:0",
            identity=leaves.files("proxy"),
            policy={REPLACEMENT_SERVICE: frozenset({"relay"})},
            options=options,
        )
        replacement_service_pb2_grpc.add_ReplacementServiceServicer_to_server(proxy, control.grpc)
        await stack.enter_async_context(control)
        identity = leaves.files("relay")
        asking = await stack.enter_async_context(Dialer(control.address, identity=identity, peer="proxy"))
        replicas = Replicas(identity)
        stack.push_async_callback(replicas.close)
        server = MeshServer(
            listen="127.0.0.1:0", identity=identity, policy={OPENAI_SERVICE: frozenset({"edge"})}, options=options
        )
        around = Surroundings(replicas, [asking], replace_seconds=30.0, barren_limit=3, moves=MoveTeller([asking]))
        RelayServicer(around, max_held_bytes=1 << 26).add_to(server.grpc)
        await stack.enter_async_context(server)
        edge = leaves.files("edge")
        yield await stack.enter_async_context(Dialer(server.address, identity=edge, peer="relay"))


@pytest.fixture
def victim(launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path) -> Iterator[RunningReplica]:
    """A replica that the test ends."""
    replica = fork_real(launcher, leaves, tmp_path, smollm2_directory, settings=SETTINGS, **KV)
    yield replica
    with contextlib.suppress(AssertionError):
        # It is there still where the test failed before.
        for process in replica.tree():
            process.kill()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)], ids=["killed", "drained"]
)
async def test_a_replica_that_goes_is_not_seen(
    victim: RunningReplica, survivor: RunningReplica, number: signal.Signals
) -> None:
    request = chat(max_tokens=48, ignore_eos=True)
    async with survivor.leaves.dial(survivor.address) as dialer:
        whole = events(await read(dialer.stub(Stub).CreateChatCompletion(request, **OPTIONS)))
    async with victim.leaves.dial(victim.address) as dialer:
        # It takes requests.
        await read(dialer.stub(Stub).CreateCompletion(completion(max_tokens=1), **OPTIONS))
    proxy = Proxy(survivor.address)
    metadata = (
        (names.ENDPOINT_HEADER, victim.address),
        (names.ROUTE_MODEL_HEADER, MODEL),
        (names.ROUTE_REVISION_HEADER, REVISION),
        (names.REQUEST_ID_HEADER, "r-2"),
    )
    messages: list[HttpBody] = []
    processes = victim.tree()
    async with relay(proxy, victim.leaves) as dialer:
        async for message in dialer.stub(Stub).CreateChatCompletion(request, metadata=metadata, **OPTIONS):
            messages.append(message)
            if len(messages) == 12:
                os.kill(victim.pid, number)
                if number is signal.SIGKILL:
                    await asyncio.to_thread(wait_gone, processes, 10.0)
    victim.launcher.wait_exit(victim.pid, 20)
    (asked,) = proxy.asked
    assert list(asked.failed_endpoints) == [victim.address]
    assert asked.is_there_only is (number is signal.SIGTERM)
    taken_up = events(messages)
    assert len({(event["id"], event["created"]) for event in taken_up}) == 1
    assert text_of(taken_up) == text_of(whole)
    assert [event["choices"][0]["finish_reason"] for event in taken_up if event["choices"]][-1] == "length"
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [taken_up[-1]["usage"][name] for name in counts] == [whole[-1]["usage"][name] for name in counts]


def text_of(answer: Sequence[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in answer if event["choices"])
