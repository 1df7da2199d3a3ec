"""OpenAI's answers, as JSON and as server-sent events, out of an engine's pieces: the one place that makes them for
engines without serving code of their own. The shapes are those of vLLM's.
"""

import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Self

import orjson

from helios.mesh.errors import Bug
from helios.worker.engines.openai_requests import OpenAIRequest
from helios.worker.replica.engine import (
    EventStream,
    JsonAnswer,
    Logprob,
    Meter,
    OpenAICall,
    Piece,
    TokenLogprobs,
)

Pieces = AsyncGenerator[Sequence[Piece], None]

DONE: Final = "data: [DONE]\n\n"


async def shape_answer(
    call: OpenAICall, request: OpenAIRequest, pieces: Pieces, *, meter: Meter, model: str
) -> JsonAnswer | EventStream:
    """Returns the answer that the pieces make; a stream when its first pieces are there. Closes ``pieces``."""
    shape = Shape(call, request_id=meter.request_id, model=model, top_count=request.sampling.logprobs or 0)
    if not request.is_stream:
        async with contextlib.aclosing(pieces):
            choices = _Choices(shape)
            async for batch in pieces:
                choices.take(batch)
        return JsonAnswer(orjson.dumps(shape.body(choices.finished()) | {"usage": usage(meter)}))
    try:
        first = await anext(pieces)
    except StopAsyncIteration as error:
        raise Bug("the engine ended a stream before its first piece") from error
    return EventStream(_Events(shape, request, first, pieces, meter))


def event(document: Any) -> str:
    """Returns one server-sent event."""
    return f"data: {orjson.dumps(document).decode()}\n\n"


def usage(meter: Meter) -> dict[str, Any]:
    """Returns OpenAI's count of a request's tokens."""
    count: dict[str, Any] = {
        "prompt_tokens": meter.prompt_tokens,
        "completion_tokens": meter.completion_tokens,
        "total_tokens": meter.prompt_tokens + meter.completion_tokens,
    }
    if meter.cached_prompt_tokens:
        count["prompt_tokens_details"] = {"cached_tokens": meter.cached_prompt_tokens}
    return count


class Shape:
    """The form of one call's answers. Pure, but for the offsets of log probabilities, which grow with the pieces."""

    def __init__(self, call: OpenAICall, *, request_id: str, model: str, top_count: int = 0) -> None:
        """``top_count`` is how many of the likeliest tokens a conversation's answer tells; an engine tells the drawn
        one too, where it is none of them.
        """
        self._top_count = top_count
        self.is_chat = call is OpenAICall.CHAT_COMPLETION
        self._offsets: dict[int, int] = {}
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(datetime.now(UTC).timestamp()),
            "model": model,
        }

    def body(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns a whole answer."""
        return self._head | {"choices": list(choices)}

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns a part of a streamed answer."""
        kind = {"object": "chat.completion.chunk"} if self.is_chat else {}
        return self._head | kind | {"choices": list(choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first choice of a streamed conversation, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Returns a choice with what is new."""
        text = {"delta": {"content": piece.text}} if self.is_chat else {"text": piece.text}
        return {"index": piece.choice_index} | text | self._end(piece, self.logprobs(piece))

    def whole(self, piece: Piece) -> dict[str, Any]:
        """Returns a choice with all of an answer, joined into one piece."""
        message = {"role": "assistant", "content": piece.text}
        text = {"message": message} if self.is_chat else {"text": piece.text}
        return {"index": piece.choice_index} | text | self._end(piece, self.logprobs(piece))

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """Returns the log probabilities of a piece; None where there are none."""
        if not piece.logprobs:
            return None
        if self.is_chat:
            return {"content": [_chat_entry(entry, self._top_count) for entry in piece.logprobs]}
        offsets = []
        for entry in piece.logprobs:
            offsets.append(self._offsets.get(piece.choice_index, 0))
            self._offsets[piece.choice_index] = offsets[-1] + len(entry.chosen.text)
        return {
            "text_offset": offsets,
            "token_logprobs": [entry.chosen.logprob for entry in piece.logprobs],
            "tokens": [entry.chosen.text for entry in piece.logprobs],
            "top_logprobs": [{top.text: top.logprob for top in entry.top} for entry in piece.logprobs],
        }

    def _end(self, piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        reason = None if piece.finish is None else piece.finish.value
        return {"logprobs": logprobs, "finish_reason": reason, "stop_reason": piece.stop}


class _Choices:
    """Joins the pieces of each answer."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._pieces: dict[int, list[Piece]] = {}

    def take(self, batch: Sequence[Piece]) -> None:
        for piece in batch:
            self._pieces.setdefault(piece.choice_index, []).append(piece)

    def finished(self) -> list[dict[str, Any]]:
        """Returns all choices. Raises Bug where one has no end."""
        return [self._shape.whole(self._joined(index)) for index in sorted(self._pieces)]

    def _joined(self, index: int) -> Piece:
        pieces = self._pieces[index]
        if pieces[-1].finish is None:
            raise Bug("the engine ended an answer without a reason")
        return Piece(
            choice_index=index,
            output_index=0,
            text="".join(piece.text for piece in pieces),
            token_ids=[],
            logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
            finish=pieces[-1].finish,
            stop=pieces[-1].stop,
        )


class _Events:
    """The events of a streamed answer.

    Not a generator: closing one that was never asked for an item would leave the pieces open.
    """

    def __init__(
        self, shape: Shape, request: OpenAIRequest, first: Sequence[Piece], pieces: Pieces, meter: Meter
    ) -> None:
        self._shape = shape
        self._has_usage = request.has_usage
        self._pieces = pieces
        self._meter = meter
        self._ready: deque[str] = deque()
        self._is_ended = False
        if shape.is_chat:
            self._put([shape.opening(index) for index in range(request.sampling.n)])
        self._take(first)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._ready:
            if self._is_ended:
                raise StopAsyncIteration
            batch = await anext(self._pieces, None)
            if batch is None:
                self._end()
            else:
                self._take(batch)
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Aborts the request, where it is not over."""
        self._is_ended = True
        self._ready.clear()
        await self._pieces.aclose()

    def _take(self, batch: Sequence[Piece]) -> None:
        for piece in batch:
            if piece.text or piece.logprobs or piece.finish is not None:
                self._put([self._shape.delta(piece)])

    def _put(self, choices: Sequence[dict[str, Any]]) -> None:
        for choice in choices:
            # OpenAI's clients know from the null that a count is to come.
            self._ready.append(event(self._shape.chunk([choice]) | ({"usage": None} if self._has_usage else {})))

    def _end(self) -> None:
        self._is_ended = True
        if self._has_usage:
            self._ready.append(event(self._shape.chunk([]) | {"usage": usage(self._meter)}))
        self._ready.append(DONE)


def _chat_entry(entry: TokenLogprobs, top_count: int) -> dict[str, Any]:
    return _chat_token(entry.chosen) | {"top_logprobs": [_chat_token(top) for top in entry.top[:top_count]]}


def _chat_token(entry: Logprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.text.encode())}


def as_generator(pieces: AsyncIterator[Sequence[Piece]]) -> Pieces:
    """Returns an engine's pieces as what they are, a generator that can be closed."""
    assert isinstance(pieces, AsyncGenerator)
    return pieces
