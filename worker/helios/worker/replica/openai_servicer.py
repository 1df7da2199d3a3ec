"""OpenAIService: OpenAI's bodies in and out, byte for byte what the engine's own serving code made."""

import contextlib
from typing import Any, Final

from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.mesh.errors import HeliosError
from helios.mesh.status import openai_body
from helios.worker.replica.body import parse_body
from helios.worker.replica.continuation import CONTINUATION, only_new, with_created
from helios.worker.replica.engine import Engine, EventStream, JsonAnswer, OpenAICall
from helios.worker.replica.gate import CallGate
from helios.worker.replica.ready import ReadyTogether
from helios.worker.replica.tier import event_with_tier, with_tier

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
# A message of the mesh has at most 33 MiB, and the vectors of a thousand texts are more.
_PART_BYTES: Final = 16 << 20


class OpenAIServicer(openai_service_pb2_grpc.OpenAIServiceServicer):
    """Handlers are coroutines that write to the context, not generators: a client's cancel then reaches the engine's
    wait directly. Nothing is written before the first byte of an answer, so that an error until then is a status of
    the call.
    """

    def __init__(self, engine: Engine, gate: CallGate) -> None:
        self._engine = engine
        self._gate = gate

    async def CreateChatCompletion(self, request: HttpBody, context: Any) -> None:  # type: ignore[override]
        """Answers a conversation."""
        await self._answer(OpenAICall.CHAT_COMPLETION, request, context)

    async def CreateCompletion(self, request: HttpBody, context: Any) -> None:  # type: ignore[override]
        """Continues a text."""
        await self._answer(OpenAICall.COMPLETION, request, context)

    async def CreateEmbedding(self, request: HttpBody, context: Any) -> None:  # type: ignore[override]
        """Turns texts into vectors."""
        await self._answer(OpenAICall.EMBEDDING, request, context)

    async def _answer(self, operation: OpenAICall, request: HttpBody, context: Any) -> None:
        with self._gate.admit(context, operation.value) as call:
            document = dict(parse_body(request.content_type, request.data))
            self._gate.check_model(document["model"], call)
            document["model"] = self._gate.engine_name(document["model"])
            answer = await self._engine.answer(operation, document, call.meter)
            # OpenAI's vectors have none.
            tier = call.tier if operation is not OpenAICall.EMBEDDING else ""
            if isinstance(answer, JsonAnswer):
                body = with_tier(answer.body, tier) if tier else answer.body
                for begin in range(0, max(1, len(body)), _PART_BYTES):
                    part = body[begin : begin + _PART_BYTES]
                    await context.write(HttpBody(content_type=_JSON, data=part))
            else:
                await _stream(answer, tier, context)


async def _stream(answer: EventStream, tier: str, context: Any) -> None:
    """Writes events, those that are ready together in one message; an error after the first one travels in band."""
    is_begun = False
    continuation = CONTINUATION.get()
    created = continuation.progress.created if continuation is not None and continuation.progress is not None else 0
    async with contextlib.aclosing(ReadyTogether(only_new(answer.events))) as batches:
        try:
            async for batch in batches:
                events = [with_created(event, created) for event in batch] if created else batch
                events = [event_with_tier(event, tier) for event in events] if tier else events
                await context.write(HttpBody(content_type=_EVENTS, data="".join(events).encode()))
                is_begun = True
        except HeliosError as error:
            # Of a durable request the relay is told, which may go on elsewhere.
            if not is_begun or continuation is not None:
                raise
            await context.write(HttpBody(content_type=_EVENTS, data=b"data: " + openai_body(error) + b"\n\n"))
            # REST callers have read the event; gRPC callers and the account get the status as well.
            raise
