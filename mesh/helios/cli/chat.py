"""``helios chat``: a conversation on the terminal, streamed over the typed gRPC API of the public address."""

from collections.abc import Callable

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from helios.cli.edge import EdgeDialer
from helios.mesh.names import MODEL_HEADER

# A first request may start the model; the proxy's own hold limit ends before this.
_TIMEOUT_SECONDS = 900.0


class Conversation:
    """The turns so far with one model."""

    def __init__(
        self, dialer: EdgeDialer, model: str, *, max_tokens: int | None = None, temperature: float | None = None
    ) -> None:
        self._dialer = dialer
        self._model = model
        self._sampling = pb.SamplingParameters(max_tokens=max_tokens, temperature=temperature)
        self._messages: list[pb.ChatMessage] = []

    async def ask(self, text: str, write: Callable[[str], None]) -> pb.Usage:
        """Sends a turn and writes the answer as it comes; a failed turn is taken back. Raises AioRpcError."""
        self._messages.append(pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content=text))
        request = pb.ChatRequest(model=self._model, messages=self._messages, sampling=self._sampling)
        stub = self._dialer.stub(InferenceServiceStub)
        call = stub.Chat(request, timeout=_TIMEOUT_SECONDS, metadata=((MODEL_HEADER, self._model),))
        answer, usage = "", pb.Usage()
        is_complete = False
        try:
            async for response in call:
                if response.HasField("delta"):
                    answer += response.delta.text
                    write(response.delta.text)
                else:
                    usage, is_complete = response.finished.usage, True
        finally:
            if not is_complete:
                self._messages.pop()
        self._messages.append(pb.ChatMessage(role=pb.ChatMessage.ROLE_ASSISTANT, content=answer))
        return usage
