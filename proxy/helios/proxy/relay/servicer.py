"""The calls that the relay takes: those that make tokens, as bytes."""

from functools import partial
from typing import Any, Final

import grpc
import grpc.aio

from helios.api.inference.v1 import continuation_service_pb2 as pb
from helios.mesh.errors import Overloaded
from helios.proxy.relay import metrics
from helios.proxy.relay.session import Call, Session, Surroundings

OPENAI_SERVICE: Final = "helios.api.inference.v1.OpenAIService"
INFERENCE_SERVICE: Final = "helios.api.inference.v1.InferenceService"
_CALLS: Final[dict[str, dict[str, Call]]] = {
    OPENAI_SERVICE: {
        "CreateChatCompletion": pb.AnswerRequest.CALL_OPENAI_CHAT,
        "CreateCompletion": pb.AnswerRequest.CALL_OPENAI_COMPLETION,
    },
    INFERENCE_SERVICE: {"Chat": pb.AnswerRequest.CALL_CHAT, "Complete": pb.AnswerRequest.CALL_COMPLETE},
}
# What a stream's journal may grow to beside its request: a long context of tokens.
_JOURNAL_BYTES: Final = 1 << 19


class RelayServicer:
    """Takes calls, within what their memory may be."""

    def __init__(self, surroundings: Surroundings, *, max_held_bytes: int) -> None:
        self._around = surroundings
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the calls of both public services."""
        for service, calls in _CALLS.items():
            methods: dict[str, Any] = {
                # No (de)serializers: messages are passed on as they came.
                name: grpc.unary_stream_rpc_method_handler(partial(self._answer, call))
                for name, call in calls.items()
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))

    async def _answer(self, call: Call, request: bytes, context: Any) -> None:
        size = len(request) + _JOURNAL_BYTES
        if self._held_bytes + size > self._max_held_bytes:
            raise Overloaded("the relay has as many durable requests as it may remember", retry_after_seconds=1.0)
        self._held_bytes += size
        metrics.REQUESTS.inc()
        metrics.STREAMS.inc()
        try:
            await Session(call, request, context, self._around).run()
        finally:
            self._held_bytes -= size
            metrics.STREAMS.dec()
