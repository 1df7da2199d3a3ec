"""OpenAIService over a real server, with engines that fail on purpose."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, InvalidRequest, ReplicaLost
from helios.mesh.names import ROUTE_ADAPTER_HEADER, ROUTE_MODEL_HEADER, TIER_HEADER, kept_header
from helios.mesh.server import MeshServer
from helios.mesh.status import error_from_rpc
from helios.worker.replica.engine import (
    EngineFacts,
    EngineLoad,
    EventStream,
    JsonAnswer,
    Meter,
    OpenAICall,
    Piece,
    Prompt,
    Sampling,
    Tokenized,
)
from helios.worker.replica.gate import CallGate
from helios.worker.replica.ledger import RequestLedger
from helios.worker.replica.openai_servicer import OpenAIServicer
from helios.worker.replica.tier import with_tier

SERVICE = "helios.api.inference.v1.OpenAIService"


class FailingEngine:
    """Streams ``events`` and then raises; with no events it raises at once."""

    def __init__(self, events: Sequence[str], error: HeliosError) -> None:
        self._events = events
        self._error = error
        self.facts = EngineFacts(100, 100, 100)

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        if not self._events:
            raise self._error
        return EventStream(self._stream())

    async def _stream(self) -> AsyncIterator[str]:
        for event in self._events:
            yield event
        raise self._error

    def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        raise NotImplementedError

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        raise NotImplementedError

    def load(self) -> EngineLoad:
        return EngineLoad()

    def close(self) -> None:
        pass


async def ask(
    engine: FailingEngine, ledger: RequestLedger, metadata: tuple[tuple[str, str], ...] = ()
) -> tuple[list[HttpBody], HeliosError | None]:
    gate = CallGate(names=("m",), revision="sha256:0", ledger=ledger, on_change=lambda: None)
    server = MeshServer(listen="127.0.0.1:0", identity=None, policy={SERVICE: frozenset({"*"})})
    openai_service_pb2_grpc.add_OpenAIServiceServicer_to_server(OpenAIServicer(engine, gate), server.grpc)
    server.serve(SERVICE)
    messages: list[HttpBody] = []
    async with server, Dialer(server.address, identity=None, peer="worker") as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        body = HttpBody(content_type="application/json", data=b'{"model":"m"}')
        try:
            async for message in stub.CreateCompletion(body, timeout=10, metadata=metadata):
                messages.append(message)  # noqa: PERF401  what came before an error is kept
        except grpc.aio.AioRpcError as error:
            return messages, error_from_rpc(error)
    return messages, None


async def test_an_error_before_the_first_event_is_the_status_of_the_call() -> None:
    ledger = RequestLedger()
    messages, error = await ask(FailingEngine([], InvalidRequest("no", metadata={"param": "prompt"})), ledger)
    assert messages == []
    assert isinstance(error, InvalidRequest)
    assert error.metadata == {"param": "prompt"}
    assert [finished.status_code for finished in ledger.take().finished] == [3]


async def test_an_error_after_the_first_event_travels_in_band_and_ends_the_stream() -> None:
    ledger = RequestLedger()
    messages, status = await ask(FailingEngine(["data: 1\n\n", "data: 2\n\n"], ReplicaLost("the engine died")), ledger)
    *events, last = b"".join(message.data for message in messages).decode().split("\n\n")[:-1]
    assert events == ["data: 1", "data: 2"]
    error = orjson.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("replica_lost", "the engine died")
    # The HTTP status is 200 by now; gRPC callers and the account get the status that REST callers can't.
    assert isinstance(status, ReplicaLost)
    assert [finished.status_code for finished in ledger.take().finished] == [grpc.StatusCode.UNAVAILABLE.value[0]]


FLEX = ((kept_header(TIER_HEADER), "flex"),)


async def test_every_event_says_the_tier_that_was_given_where_one_was_asked_for() -> None:
    text = json.dumps({"text": 'he said "service_tier":null'}, separators=(",", ":"))
    events = [f'data: {{"id":"1",{text[1:]}\n\n', 'data: {"id":"1","choices":[]}\n\n', "data: [DONE]\n\n"]
    plain, _ = await ask(FailingEngine(events, ReplicaLost("over")), RequestLedger())
    assert b"".join(message.data for message in plain).decode().startswith("".join(events))
    told, _ = await ask(FailingEngine(events, ReplicaLost("over")), RequestLedger(), FLEX)
    *found, last, _error, _ = b"".join(message.data for message in told).decode().split("\n\n")
    documents = [orjson.loads(event.removeprefix("data: ")) for event in found]
    assert [document["service_tier"] for document in documents] == ["flex", "flex"]
    assert documents[0]["text"] == json.loads(text)["text"]
    assert last == "data: [DONE]"


@pytest.mark.parametrize("body", [b'{"id":"1","service_tier":null,"choices":[]}', b'{"id":"1","choices":[]}'])
def test_an_answer_says_the_tier_once(body: bytes) -> None:
    pairs = json.loads(with_tier(body, "priority"), object_pairs_hook=list)
    assert sorted(name for name, _ in pairs) == ["choices", "id", "service_tier"]
    assert dict(pairs)["service_tier"] == "priority"
    assert with_tier(b"[]", "flex") == b"[]"


class VectorEngine(FailingEngine):
    """Answers with one document of so many bytes."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__([], InvalidRequest("never raised"))
        self._size_bytes = size_bytes

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        return JsonAnswer(b"x" * self._size_bytes)


async def test_an_answer_that_is_longer_than_a_message_comes_in_parts() -> None:
    """Vectors of a thousand texts are: refused, the work would be done and thrown away."""
    messages, error = await ask(VectorEngine(40 << 20), RequestLedger())
    assert error is None
    assert sum(len(message.data) for message in messages) == 40 << 20
    assert {message.content_type for message in messages} == {"application/json"}
    messages, error = await ask(VectorEngine(1 << 20), RequestLedger())
    assert [len(message.data) for message in messages] == [1 << 20]


@pytest.mark.parametrize(
    ("metadata", "model", "error"),
    [
        ({}, "pirate", None),
        ({ROUTE_MODEL_HEADER: "pirate", ROUTE_ADAPTER_HEADER: "pirate"}, "pirate", None),
        # On its way here, or gone meanwhile: it must not answer as the model alone.
        ({ROUTE_MODEL_HEADER: "poet", ROUTE_ADAPTER_HEADER: "poet"}, "poet", "ADAPTER_NOT_LOADED"),
        ({}, "poet", "MODEL_NOT_FOUND"),
    ],
)
def test_only_a_replica_that_has_an_adapter_answers_for_it(
    metadata: dict[str, str], model: str, error: str | None
) -> None:
    gate = CallGate(names=("m",), revision="sha256:0", ledger=RequestLedger(), on_change=lambda: None)
    gate.set_adapters(["pirate"])
    context = SimpleNamespace(invocation_metadata=lambda: tuple(metadata.items()))
    expected = contextlib.nullcontext() if error is None else pytest.raises(HeliosError)
    with expected as caught, gate.admit(context, "chat") as call:
        gate.check_model(model, call)
        assert (gate.engine_name(model), gate.adapter_of(model), gate.adapter_of("m")) == ("pirate", "pirate", "")
    assert (caught.value.reason if caught is not None else None) == error
