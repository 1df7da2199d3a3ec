"""The ``Engine`` protocol on a LitAPI: OpenAI bodies in, what its hooks give as OpenAI answers out."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import orjson

from helios.mesh.errors import Bug, InvalidRequest, Unsupported
from helios.worker.engines.custom.lit_runner import Exchange, LitRunner
from helios.worker.engines.custom.loading import LitOptions
from helios.worker.engines.custom.outputs import Output, as_chunk, read_output
from helios.worker.engines.endings import AnswerEnd
from helios.worker.engines.openai_requests import OpenAIRequest
from helios.worker.engines.openai_shapes import DONE, Pieces, event, shape_answer
from helios.worker.replica.engine import (
    Conversation,
    EngineFacts,
    EngineHooks,
    EngineLoad,
    EventStream,
    FinishReason,
    JsonAnswer,
    Meter,
    OpenAICall,
    Piece,
    Prompt,
    Sampling,
    Text,
    Tokenized,
)
from helios.worker.replica.spec import ReplicaSpec

# Not known, so nothing is refused for it.
_CONTEXT_TOKENS: Final = 1 << 24
_VOCABULARY_SIZE: Final = (1 << 31) - 1

Outputs = AsyncGenerator[Output, None]


class LitEngine:
    """One LitAPI. Made in any thread; used in one event loop."""

    def __init__(self, api: Any, options: LitOptions, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Runs ``setup``. Raises what it failed with."""
        self._name = spec.model
        self._is_streaming: bool = api.stream
        self._on_load = hooks.on_load
        self._open_count = 0
        self._facts = EngineFacts(spec.max_context_tokens or _CONTEXT_TOKENS, _VOCABULARY_SIZE, 0)
        with hooks.phase("engine"):
            self._runner = LitRunner(api, options.device)
        with hooks.phase("load"):
            self._runner.start()

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        return self._facts

    def load(self) -> EngineLoad:
        """Returns how many requests there are; a class does not say how much memory they take."""
        waiting = min(self._runner.waiting_count, self._open_count)
        return EngineLoad(self._open_count - waiting, waiting, is_dead=self._runner.is_dead)

    def close(self) -> None:
        """Ends the class's thread."""
        self._runner.close()

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers with what the class makes of the body."""
        request = _read(call, document)
        outputs = self._outputs(dict(document), meter)
        first = await anext(outputs, None)
        if call is OpenAICall.EMBEDDING:
            await outputs.aclose()
            return _vectors(first)
        if first is None or first.document is None or (self._is_streaming and not request.is_stream):
            pieces = _pieces(first, outputs, request.sampling)
            return await shape_answer(call, request, pieces, meter=meter, model=self._name)
        if request.is_stream:
            return EventStream(_Documents(first, outputs, is_whole=not self._is_streaming))
        await outputs.aclose()
        return JsonAnswer(orjson.dumps(first.document, option=orjson.OPT_SERIALIZE_NUMPY))

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Yields the texts that the class makes; their tokens are not known."""
        outputs = self._outputs(_document(self._name, prompt, sampling), meter)
        try:
            async for pieces in _pieces(None, outputs, sampling):
                yield pieces
        finally:
            await outputs.aclose()

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Refuses: a LitAPI has no hook for it."""
        del prompt
        raise Unsupported("the class of this model has no tokenizer")

    async def _outputs(self, document: dict[str, Any], meter: Meter) -> Outputs:
        """Yields what the class gives for a request, and counts it."""
        exchange = Exchange(document)
        self._runner.submit(exchange)
        self._open_count += 1
        self._on_load()
        try:
            while (item := await exchange.read()) is not None:
                output = read_output(item[0])
                meter.first_token_at = meter.first_token_at or time.monotonic()
                meter.completion_tokens += 1
                if output.usage is not None:
                    meter.prompt_tokens = int(output.usage.get("prompt_tokens") or 0)
                    meter.completion_tokens = int(output.usage.get("completion_tokens") or 0)
                yield output
        finally:
            self._runner.forget(exchange)
            self._open_count -= 1
            self._on_load()


class _Documents:
    """OpenAI's own documents as events; not a generator, so that closing it always closes the outputs."""

    def __init__(self, first: Output, outputs: Outputs, *, is_whole: bool) -> None:
        """``is_whole``: the first is all there is, and not in the form of a stream."""
        self._first: Output | None = first
        self._outputs = outputs
        self._is_whole = is_whole
        self._is_done = False

    def __aiter__(self) -> "_Documents":
        return self

    async def __anext__(self) -> str:
        if self._is_done:
            raise StopAsyncIteration
        output, self._first = self._first or await anext(self._outputs, None), None
        if output is None:
            self._is_done = True
            return DONE
        document = output.document or {"choices": [{"index": 0, "delta": {"content": output.text}}]}
        return event(as_chunk(document) if self._is_whole else document)

    async def aclose(self) -> None:
        """Gives the request up, where it is not over."""
        self._is_done = True
        await self._outputs.aclose()


async def _pieces(first: Output | None, outputs: Outputs, sampling: Sampling) -> Pieces:
    """Yields the pieces of the one answer that outputs make, and its end."""
    end = AnswerEnd(sampling, limit=0)
    try:
        output = first or await anext(outputs, None)
        while output is not None:
            if text := end.feed_text(output.text):
                yield [Piece(0, 0, text, [])]
            if end.finish is not None:
                break
            output = await anext(outputs, None)
        yield [Piece(0, 0, end.flush(), [], (), end.finish or FinishReason.STOP, end.stop)]
    finally:
        await outputs.aclose()


def _read(call: OpenAICall, document: Mapping[str, Any]) -> OpenAIRequest:
    """Reads what Helios itself needs of a body; the rest is the class's business."""
    if call is OpenAICall.EMBEDDING:
        if not isinstance(document.get("input"), str | list):
            raise InvalidRequest("input: required", metadata={"param": "input"})
        return OpenAIRequest(Text(""), Sampling(), is_stream=False, has_usage=False)
    if call is OpenAICall.CHAT_COMPLETION:
        messages = document.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise InvalidRequest("messages: at least one, each an object", metadata={"param": "messages"})
    elif not isinstance(document.get("prompt"), str | list):
        raise InvalidRequest("prompt: required", metadata={"param": "prompt"})
    is_stream: Any = document.get("stream")
    if is_stream is not None and not isinstance(is_stream, bool):
        raise InvalidRequest("stream: true or false", metadata={"param": "stream"})
    stop = document.get("stop") or ()
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest("stop: a text or several", metadata={"param": "stop"})
    options = document.get("stream_options")
    has_usage = isinstance(options, dict) and options.get("include_usage") is True
    return OpenAIRequest(Text(""), Sampling(stop=texts), is_stream is True, has_usage)


def _vectors(output: Output | None) -> JsonAnswer:
    """Returns what the class made of a request for vectors: nobody but the class knows how to."""
    if output is None or output.document is None or not isinstance(output.document.get("data"), list):
        raise Bug("the class of this model answered without OpenAI's list `data` of vectors", reason="BAD_OUTPUT")
    return JsonAnswer(orjson.dumps(output.document, option=orjson.OPT_SERIALIZE_NUMPY))


def _document(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    """Returns a typed call as the body of the OpenAI call that asks for the same."""
    document: dict[str, Any] = {"model": model, "stream": True}
    if isinstance(prompt, Conversation):
        document["messages"] = [
            {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {})
            for turn in prompt.turns
        ]
    else:
        document["prompt"] = prompt.text if isinstance(prompt, Text) else list(prompt.ids)
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if value is not None and value != field.default:
            document[field.name] = list(value) if isinstance(value, tuple) else value
    return document
