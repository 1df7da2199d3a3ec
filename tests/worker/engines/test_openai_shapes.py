"""How bodies are read, how answers end, and what they look like, for engines without serving code of their own."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given

from helios.mesh.errors import Bug, ContextLengthExceeded, InvalidRequest
from helios.worker.engines.endings import AnswerEnd, answer_limit
from helios.worker.engines.openai_requests import read_request
from helios.worker.engines.openai_shapes import shape_answer
from helios.worker.replica.engine import (
    Conversation,
    EventStream,
    FinishReason,
    JsonAnswer,
    Logprob,
    Meter,
    OpenAICall,
    Piece,
    Sampling,
    Text,
    TokenIds,
    TokenLogprobs,
    Turn,
)

CHAT, COMPLETION = OpenAICall.CHAT_COMPLETION, OpenAICall.COMPLETION
LETTERS = st.text("ab", min_size=1, max_size=3)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields


def read(call: OpenAICall, document: dict[str, Any]) -> Any:
    return read_request(call, document, vocabulary_size=100)


def test_a_chat_body_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "Ann"}]
    request = read(
        CHAT,
        chat(
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=5,
            max_tokens=9,
            temperature=1,
            stop="x",
            logprobs=True,
            top_logprobs=2,
            user="somebody",
        ),
    )
    assert request.prompt == Conversation((Turn("system", "be brief"), Turn("user", "ab", "Ann")))
    assert request.sampling == Sampling(temperature=1.0, stop=("x",), max_tokens=5, logprobs=2)
    assert (request.is_stream, request.has_usage) == (True, True)


def test_a_completion_body_is_read() -> None:
    assert read(COMPLETION, {"model": "m", "prompt": "once"}).prompt == Text("once")
    assert read(COMPLETION, {"model": "m", "prompt": ["once"]}).prompt == Text("once")
    assert read(COMPLETION, {"model": "m", "prompt": [1, 2]}).prompt == TokenIds((1, 2))
    # OpenAI's default, and a zero that is refused rather than replaced.
    assert read(COMPLETION, {"model": "m", "prompt": "once"}).sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("call", "fields", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        (CHAT, {"temperature": "warm"}, "temperature"),
        (CHAT, {"temperature": -1}, "temperature"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"tools": [{}]}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"stop_token_ids": [100]}, "stop_token_ids"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETION, {"prompt": [100]}, "prompt"),
        (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETION, {"prompt": "a", "echo": True}, "echo"),
    ],
)
def test_a_refusal_names_the_field(call: OpenAICall, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(call, chat(**fields) if call is CHAT else {"model": "m"} | fields)
    assert caught.value.metadata["param"].startswith(param)
    assert param.split(".", maxsplit=1)[0] in caught.value.message


@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS, min_size=1, max_size=3), st.integers(0, 5))
def test_text_before_the_first_stop_is_handed_out_and_nothing_else(
    tokens: list[str], stops: list[str], minimum: int
) -> None:
    end = AnswerEnd(Sampling(stop=tuple(stops), min_tokens=minimum), limit=1000)
    out, seen = "", ""
    for token in tokens:
        out += end.feed(0, token)
        seen += token
        assert seen.startswith(out)
        if end.finish is not None:
            break
    out += end.flush()
    if end.finish is None:
        assert out == seen
    else:
        assert isinstance(end.stop, str)
        assert (end.finish, end.stop in stops) == (FinishReason.STOP, True)
        assert seen.startswith(out + end.stop)
    if not minimum:
        assert not any(stop in out for stop in stops)


def test_an_answer_has_room_or_is_refused() -> None:
    assert [answer_limit(6, 3, 10), answer_limit(6, None, 10), answer_limit(6, 50, 10)] == [3, 4, 4]
    with pytest.raises(ContextLengthExceeded):
        answer_limit(10, 1, 10)


class Source:
    """Pieces in given batches, and whether they were closed."""

    def __init__(self, *batches: Sequence[Piece]) -> None:
        self._batches = batches
        self.is_closed = False

    async def pieces(self) -> AsyncGenerator[Sequence[Piece], None]:
        try:
            for batch in self._batches:
                yield batch
        finally:
            self.is_closed = True


def piece(text: str, choice: int = 0, finish: FinishReason | None = None, *, has_logprobs: bool = False) -> Piece:
    entry = Logprob(1, text, -0.5)
    return Piece(choice, 0, text, [1], (TokenLogprobs(entry, (entry,)),) if has_logprobs else (), finish)


async def test_answers_are_joined_by_choice() -> None:
    source = Source(
        [piece("a"), piece("x", 1)], [piece("b", finish=FinishReason.LENGTH)], [piece("y", 1, FinishReason.STOP)]
    )
    request = read(COMPLETION, {"model": "m", "prompt": "p", "logprobs": 1})
    meter = Meter("id", 0.0, prompt_tokens=2, completion_tokens=4, cached_prompt_tokens=1)
    answer = await shape_answer(COMPLETION, request, source.pieces(), meter=meter, model="m")
    assert isinstance(answer, JsonAnswer)
    document = orjson.loads(answer.body)
    assert [(c["index"], c["text"], c["finish_reason"]) for c in document["choices"]] == [
        (0, "ab", "length"),
        (1, "xy", "stop"),
    ]
    assert document["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert source.is_closed


async def test_an_answer_without_an_end_is_a_bug() -> None:
    with pytest.raises(Bug):
        await shape_answer(CHAT, read(CHAT, chat()), Source([piece("a")]).pieces(), meter=Meter("i", 0.0), model="m")


async def test_closing_events_that_nobody_read_closes_the_pieces() -> None:
    source = Source([piece("a")], [piece("b")])
    answer = await shape_answer(CHAT, read(CHAT, chat(stream=True)), source.pieces(), meter=Meter("i", 0.0), model="m")
    assert isinstance(answer, EventStream)
    events: Any = answer.events
    await events.aclose()
    assert source.is_closed


async def test_log_probabilities_of_a_stream_have_growing_offsets() -> None:
    source = Source([piece("one ", has_logprobs=True)], [piece("two", finish=FinishReason.STOP, has_logprobs=True)])
    request = read(COMPLETION, {"model": "m", "prompt": "p", "logprobs": 1, "stream": True})
    answer = await shape_answer(COMPLETION, request, source.pieces(), meter=Meter("i", 0.0), model="m")
    assert isinstance(answer, EventStream)
    events = [orjson.loads(event[6:]) async for event in answer.events if "[DONE]" not in event]
    logprobs = [event["choices"][0]["logprobs"] for event in events]
    assert [entry["text_offset"] for entry in logprobs] == [[0], [4]]
    assert logprobs[0]["top_logprobs"] == [{"one ": -0.5}]
