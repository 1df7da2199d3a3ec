"""An engine without weights: echoes the prompt, token by token, at a set pace.

For tests of everything around an engine, for scale and chaos tests, and for users' load tests: it starts at once and
its answers are known. A token is a word; the model's directory is not read. It says nothing of any engine's speed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import orjson

from helios.mesh.errors import ContextLengthExceeded, InvalidRequest
from helios.worker.replica.engine import (
    Conversation,
    Engine,
    EngineFacts,
    EngineHooks,
    EngineLoad,
    EventStream,
    FinishReason,
    JsonAnswer,
    Logprob,
    Meter,
    OpenAICall,
    Piece,
    Prompt,
    Sampling,
    Text,
    TokenIds,
    Tokenized,
    TokenLogprobs,
)
from helios.worker.replica.spec import ReplicaSpec

_TOKEN_SECONDS: Final = 0.005
_CONTEXT_TOKENS: Final = 4096
_VOCABULARY_SIZE: Final = 1 << 16
_DEFAULT_MAX_TOKENS: Final = 16
_DONE: Final = "data: [DONE]\n\n"


def preload() -> None:
    """There is nothing to import."""


def build(spec: ReplicaSpec, hooks: EngineHooks) -> Engine:
    """Makes the engine."""
    return SimulatedEngine(spec, hooks)


class SimulatedEngine:
    """Answers a prompt with its own words, again and again, until max_tokens."""

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        self._model = spec.model
        self._on_load = hooks.on_load
        self._running_count = 0
        self._facts = EngineFacts(spec.max_context_tokens or _CONTEXT_TOKENS, _VOCABULARY_SIZE, _CONTEXT_TOKENS * 4)
        hooks.on_forked()

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        return self._facts

    def load(self) -> EngineLoad:
        """Returns the requests that run now."""
        return EngineLoad(self._running_count, 0, self._running_count * _CONTEXT_TOKENS / self._facts.kv_cache_tokens)

    def close(self) -> None:
        """There is nothing to end."""

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers with an echo of the prompt or the last message."""
        is_chat = call is OpenAICall.CHAT_COMPLETION
        prompt = Text(_last_text(document["messages"]) if is_chat else str(document["prompt"]))
        pieces = self.generate(prompt, Sampling(max_tokens=document.get("max_tokens")), meter)
        if document.get("stream"):
            return EventStream(self._events(call, pieces, meter))
        text = "".join([piece.text async for batch in pieces for piece in batch])
        choice = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"prompt_tokens": meter.prompt_tokens, "completion_tokens": meter.completion_tokens}
        return JsonAnswer(orjson.dumps(self._body(call, meter) | {"choices": [choice], "usage": usage}))

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Yields one token at a time, for each of the n answers."""
        words = _words(prompt)
        budget = self._budget(len(words), sampling)
        meter.prompt_tokens = len(words)
        self._running_count += 1
        self._on_load()
        try:
            for index in range(budget):
                await asyncio.sleep(_TOKEN_SECONDS)
                meter.first_token_at = meter.first_token_at or time.monotonic()
                meter.completion_tokens += sampling.n
                word = words[index % len(words)]
                finish = FinishReason.LENGTH if index == budget - 1 else None
                yield [_piece(choice, index, word, sampling.logprobs, finish) for choice in range(sampling.n)]
        finally:
            self._running_count -= 1
            self._on_load()

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Splits into words."""
        words = _words(prompt)
        return Tokenized(tuple(map(_token_id, words)), tuple(words))

    def _budget(self, prompt_tokens: int, sampling: Sampling) -> int:
        room = self._facts.max_context_tokens - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens, the context {self._facts.max_context_tokens}"
            )
        wanted = _DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        if wanted < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {wanted}", metadata={"param": "max_tokens"})
        return min(room, wanted)

    async def _events(
        self, call: OpenAICall, pieces: AsyncIterator[Sequence[Piece]], meter: Meter
    ) -> AsyncIterator[str]:
        async for batch in pieces:
            for piece in batch:
                reason = None if piece.finish is None else piece.finish.value
                choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
                choice |= (
                    {"delta": {"content": piece.text}} if call is OpenAICall.CHAT_COMPLETION else {"text": piece.text}
                )
                yield f"data: {orjson.dumps(self._body(call, meter) | {'choices': [choice]}).decode()}\n\n"
        yield _DONE

    def _body(self, call: OpenAICall, meter: Meter) -> dict[str, Any]:
        return {"id": meter.request_id, "object": call.value, "created": 0, "model": self._model}


def _last_text(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages: at least one", metadata={"param": "messages"})
    return str(messages[-1].get("content", ""))


def _words(prompt: Prompt) -> list[str]:
    if isinstance(prompt, Conversation):
        text = " ".join(turn.content for turn in prompt.turns)
    elif isinstance(prompt, TokenIds):
        text = " ".join(map(str, prompt.ids))
    else:
        text = prompt.text
    return [f"{word} " for word in text.split()] or [" "]


def _token_id(word: str) -> int:
    return sum(word.encode()) % _VOCABULARY_SIZE


def _piece(choice: int, index: int, word: str, logprobs: int | None, finish: FinishReason | None) -> Piece:
    entry = Logprob(_token_id(word), word, 0.0)
    entries = () if logprobs is None else (TokenLogprobs(entry, (entry,)),)
    return Piece(choice, index, word, [_token_id(word)], entries, finish)
