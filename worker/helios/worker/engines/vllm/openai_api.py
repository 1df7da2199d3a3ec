"""OpenAI's calls on vLLM's own serving classes: those that make text, and the one that makes vectors.

A model has one kind or the other. What both give back is read here, so that the engine only sees answers and errors.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any, Final, Protocol

import orjson

from helios.mesh.errors import Bug, HeliosError, InvalidRequest
from helios.worker.engines.vllm import compat, compat_pooling, errors
from helios.worker.replica.engine import EventStream, JsonAnswer, OpenAICall
from helios.worker.replica.settings import EngineSettings

WRONG_KIND_OF_MODEL: Final = "WRONG_KIND_OF_MODEL"
# OpenAI's own bound. Each input is a request of its own in the engine.
_INPUT_LIMIT: Final = 2048
_TRANSFER_FIELD: Final = "kv_transfer_params"
_ENCODINGS: Final = (None, "float", "base64")
_ERROR_EVENT: Final = 'data: {"error"'


class OpenAIApi(Protocol):
    """Answers the calls that a model of one kind can answer."""

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], request_id: str) -> JsonAnswer | EventStream:
        """Answers an OpenAI body. Raises HeliosErrors, and what ``errors.REQUEST_ERRORS`` lists."""
        ...

    def check_makes_text(self) -> None:
        """Raises InvalidRequest (WRONG_KIND_OF_MODEL) where the model makes vectors."""
        ...


class TextApi:
    """Chat and completions."""

    def __init__(
        self, llm: Any, models: Any, renderer: Any, *, model: str, chat_template: str | None, settings: EngineSettings
    ) -> None:
        self._model = model
        self._chat = compat.OpenAIServingChat(
            llm,
            models,
            "assistant",
            online_renderer=renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            enable_prompt_tokens_details=True,
            reasoning_parser=settings.reasoning_parser,
            enable_auto_tools=bool(settings.tool_call_parser),
            tool_parser=settings.tool_call_parser or None,
        )
        self._completion = compat.OpenAIServingCompletion(
            llm, models, online_renderer=renderer, request_logger=None, enable_prompt_tokens_details=True
        )

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], request_id: str) -> JsonAnswer | EventStream:
        """Answers with text."""
        _refuse_transfers(document)
        http = _http(request_id)
        if call is OpenAICall.CHAT_COMPLETION:
            chat = compat.ChatCompletionRequest.model_validate(document)
            result = await self._chat.create_chat_completion(chat, http)
        elif call is OpenAICall.COMPLETION:
            completion = compat.CompletionRequest.model_validate(document)
            result = await self._completion.create_completion(completion, http)
        else:
            raise _wrong_kind(f"{self._model} makes text, not vectors; POST /v1/chat/completions asks for text")
        if isinstance(result, compat.ErrorResponse):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                # vLLM's serving code turns a cancel into an answer ("Client disconnected") and goes on.
                raise asyncio.CancelledError
            raise errors.from_response(result, self._model)
        if isinstance(result, compat.ChatCompletionResponse | compat.CompletionResponse):
            return JsonAnswer(result.model_dump_json().encode())
        return await _open(result)

    def check_makes_text(self) -> None:
        """It does."""


class VectorApi:
    """Embeddings."""

    def __init__(self, llm: Any, models: Any, *, model: str, chat_template: str | None) -> None:
        self._model = model
        self._embedding = compat_pooling.ServingEmbedding(
            llm,
            models,
            request_logger=None,
            chat_template_config=compat_pooling.ChatTemplateConfig(chat_template=chat_template),
        )

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], request_id: str) -> JsonAnswer | EventStream:
        """Answers with vectors."""
        if call is not OpenAICall.EMBEDDING:
            self.check_makes_text()
        inputs = document.get("input")
        if isinstance(inputs, list) and len(inputs) > _INPUT_LIMIT and not isinstance(inputs[0], int):
            raise InvalidRequest(
                f"input: {len(inputs)} texts, at most {_INPUT_LIMIT} in one request", metadata={"param": "input"}
            )
        if document.get("encoding_format") not in _ENCODINGS:
            raise InvalidRequest("encoding_format: float or base64", metadata={"param": "encoding_format"})
        request = compat_pooling.EmbeddingCompletionRequest.model_validate(document)
        result = await self._embedding(request, _http(request_id))
        return JsonAnswer(bytes(result.body))

    def check_makes_text(self) -> None:
        """It does not. Raises InvalidRequest."""
        raise _wrong_kind(f"{self._model} makes vectors, not text; POST /v1/embeddings asks for vectors")


def _refuse_transfers(document: Mapping[str, Any]) -> None:
    """Refuses what vLLM takes from a router that it trusts: where in the mesh a KV cache is to be fetched from.

    Raises:
        InvalidRequest: A client says so.
    """
    arguments = document.get("vllm_xargs")
    if document.get(_TRANSFER_FIELD) is not None or (isinstance(arguments, dict) and _TRANSFER_FIELD in arguments):
        raise InvalidRequest(f"{_TRANSFER_FIELD}: not for clients", metadata={"param": _TRANSFER_FIELD})


def _http(request_id: str) -> Any:
    """What vLLM's serving code reads of an HTTP request: the id that its answers and its engine carry."""
    return SimpleNamespace(headers={"X-Request-Id": request_id}, state=SimpleNamespace())


def _wrong_kind(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason=WRONG_KIND_OF_MODEL, metadata={"param": "model"})


async def _open(events: AsyncGenerator[str, None]) -> EventStream:
    """Waits for the first event; where that is an error, the call fails with it instead of streaming it."""
    try:
        first = await anext(events)
    except StopAsyncIteration as error:
        raise Bug("the engine ended a stream before its first event") from error
    if first.startswith(_ERROR_EVENT):
        await events.aclose()
        raise _read_error(first)
    return EventStream(_rest(first, events))


async def _rest(first: str, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            if event.startswith(_ERROR_EVENT):
                raise _read_error(event)
            yield event


def _read_error(event: str) -> HeliosError:
    return errors.from_document(orjson.loads(event.removeprefix("data: "))["error"])
