"""ContinuationService: answers for the relay, which another replica can take up. Protos end here.

The answers are those of the two public services, whose handlers write to a context that keeps messages together with
the tokens that they stand for.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import DecodeError, Message

from helios.api.inference.v1 import continuation_service_pb2 as pb
from helios.api.inference.v1 import continuation_service_pb2_grpc
from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.names import DURABLE_AUTO, DURABLE_HEADER
from helios.mesh.tasks import task_scope
from helios.worker.replica.continuation import CONTINUATION, Continuation, Progress, created_of
from helios.worker.replica.inference_servicer import InferenceServicer
from helios.worker.replica.openai_servicer import OpenAIServicer

Handler = Callable[[Any, Any], Awaitable[None]]
# An event's `created` stands behind its id and its kind.
_EVENT_HEAD_BYTES: Final = 512


class ContinuationServicer(continuation_service_pb2_grpc.ContinuationServiceServicer):
    """Answers durable requests with the handlers of the two public services."""

    def __init__(self, openai: OpenAIServicer, inference: InferenceServicer) -> None:
        self._calls: dict[int, tuple[type[Message], Handler]] = {
            pb.AnswerRequest.CALL_OPENAI_CHAT: (HttpBody, openai.CreateChatCompletion),
            pb.AnswerRequest.CALL_OPENAI_COMPLETION: (HttpBody, openai.CreateCompletion),
            pb.AnswerRequest.CALL_CHAT: (inference_pb.ChatRequest, inference.Chat),
            pb.AnswerRequest.CALL_COMPLETE: (inference_pb.CompleteRequest, inference.Complete),
        }

    async def Answer(self, request: pb.AnswerRequest, context: Any) -> None:  # type: ignore[override]
        """Answers one request."""
        call = self._calls.get(request.call)
        if call is None:
            raise InvalidRequest("call: required")
        kind, handler = call
        try:
            message = kind.FromString(request.request)
        except DecodeError as error:
            raise InvalidRequest("the request message can't be parsed") from error
        progress = progress_from_proto(request.progress) if request.HasField("progress") else None
        is_auto = (DURABLE_HEADER, DURABLE_AUTO) in (context.invocation_metadata() or ())
        continuation = Continuation(progress, is_strict=not is_auto)
        CONTINUATION.set(continuation)
        capture = _Capture(context, continuation)
        async with task_scope() as group:
            group.create_task(_tell_leaving(continuation, context), name="tell that the replica leaves")
            try:
                await handler(message, capture)
            except HeliosError as error:
                raise continuation.refusal or error from error
        await capture.finish()


class _Capture:
    """The context that the handlers see: what they write goes out with the tokens that it stands for."""

    def __init__(self, context: Any, continuation: Continuation) -> None:
        self._context = context
        self._continuation = continuation
        self._messages: list[bytes] = []
        self._steps: list[tuple[int, ...]] = []
        self._is_opened = continuation.progress is not None
        self._created = 0

    def invocation_metadata(self) -> Any:
        """Returns the call's."""
        return self._context.invocation_metadata()

    async def write(self, message: Message) -> None:
        """Sends a message, once all of the portions that it is of are out; what ends the answer waits for its end."""
        continuation = self._continuation
        self._messages.append(message.SerializeToString())
        self._note(message)
        if continuation.is_ordinary:
            self._steps.clear()
            await self._send(is_finished=False)
        elif continuation.is_begun and continuation.is_between and not continuation.is_finishing:
            await self._send(is_finished=False)

    async def finish(self) -> None:
        """Sends what waits: the end of the answer."""
        await self._send(is_finished=True)

    def _note(self, message: Message) -> None:
        if isinstance(message, HttpBody):
            self._steps += self._continuation.take()
            if not self._is_opened and not self._created:
                self._created = created_of(message.data[:_EVENT_HEAD_BYTES].decode(errors="replace"))
        elif isinstance(message, inference_pb.ChatResponse | inference_pb.CompleteResponse):
            # Portions that were ready together come as messages of their own, which say their tokens.
            token_ids = message.delta.token_ids
            self._steps += [tuple(token_ids)] if token_ids else []

    async def _send(self, *, is_finished: bool) -> None:
        response = pb.AnswerResponse(messages=self._messages, is_finished=is_finished)
        if self._steps:
            response.steps.CopyFrom(steps_to_proto(self._steps))
            if not self._is_opened:
                self._is_opened = True
                response.opening.prompt_token_ids.extend(self._continuation.prompt)
                response.opening.cached_prompt_tokens = self._continuation.cached_prompt_tokens
                response.opening.created = self._created
        self._messages, self._steps = [], []
        await self._context.write(response)


async def _tell_leaving(continuation: Continuation, context: Any) -> None:
    await continuation.leaving.wait()
    await context.write(pb.AnswerResponse(is_leaving=True))


def steps_to_proto(steps: Sequence[Sequence[int]]) -> pb.Steps:
    """Returns portions of tokens on the wire."""
    return pb.Steps(token_ids=[token_id for step in steps for token_id in step], sizes=[len(step) for step in steps])


def progress_from_proto(message: pb.Progress) -> Progress:
    """Reads what a client has of an answer. Raises InvalidRequest where it does not add up."""
    token_ids, sizes = message.steps.token_ids, message.steps.sizes
    if not sizes or sum(sizes) != len(token_ids) or not message.opening.prompt_token_ids:
        raise InvalidRequest("progress: needs a prompt, and portions that add up to the tokens")
    steps, at = [], 0
    for size in sizes:
        steps.append(tuple(token_ids[at : at + size]))
        at += size
    opening = message.opening
    return Progress(tuple(opening.prompt_token_ids), tuple(steps), opening.cached_prompt_tokens, opening.created)
