"""What every engine promises (`helios.worker.replica.engine.Engine`), as one coroutine each.

`test_engines.py` runs them against each engine, in a process of its own that makes the engine as a replica does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from helios.mesh.errors import ContextLengthExceeded, HeliosError, InvalidRequest
from helios.worker.replica.engine import (
    Conversation,
    Engine,
    EventStream,
    FinishReason,
    JsonAnswer,
    Meter,
    OpenAICall,
    Piece,
    Prompt,
    Sampling,
    Text,
    TokenIds,
    Turn,
)

QUESTION = "What is the capital of France? Answer in one word."
TEXTS = ("The capital of France is", "One two three four", "Once upon a time there was", "def main() -> None:")
# Freeing waits for the engine's step that is under way.
FREE_SECONDS = 15.0


@dataclass(frozen=True)
class Subject:
    """An engine under test.

    Attributes:
        has_tokens: It knows its tokens: ids, log probabilities, tokenizing, limits in tokens.
        is_random: Temperature and seed change its answers.
        notes: What a contract leaves for the test, beside having held.
    """

    engine: Engine
    model: str
    has_tokens: bool = True
    is_random: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


Contract = Callable[[Subject], Awaitable[None]]
CONTRACTS: list[Contract] = []
NEEDS_TOKENS: set[str] = set()
NEEDS_CHANCE: set[str] = set()


def contract(function: Contract) -> Contract:
    """Adds a coroutine to the contracts."""
    CONTRACTS.append(function)
    return function


def needs_tokens(function: Contract) -> Contract:
    """Marks a contract that an engine without tokens of its own can't be held to."""
    NEEDS_TOKENS.add(function.__name__)
    return function


def needs_chance(function: Contract) -> Contract:
    """Marks a contract of engines that draw their tokens."""
    NEEDS_CHANCE.add(function.__name__)
    return function


def meter(name: str = "request-1") -> Meter:
    return Meter(name, time.monotonic())


async def generated(subject: Subject, prompt: Prompt, sampling: Sampling, count: Meter | None = None) -> list[Piece]:
    """Returns all pieces of a request."""
    stream = subject.engine.generate(prompt, sampling, count or meter())
    return [piece async for batch in stream for piece in batch]


def text_of(pieces: list[Piece], choice: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.choice_index == choice)


def ids_of(pieces: list[Piece], choice: int = 0) -> list[int]:
    return [token_id for piece in pieces if piece.choice_index == choice for token_id in piece.token_ids]


def chat(subject: Subject, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": QUESTION}
    return {"model": subject.model, "messages": [message], "temperature": 0, "max_tokens": 12} | fields


async def whole(subject: Subject, call: OpenAICall, body: dict[str, Any], count: Meter | None = None) -> dict[str, Any]:
    answer = await subject.engine.answer(call, body, count or meter())
    assert isinstance(answer, JsonAnswer)
    return dict(orjson.loads(answer.body))


async def streamed(
    subject: Subject, call: OpenAICall, body: dict[str, Any], count: Meter | None = None
) -> list[dict[str, Any]]:
    answer = await subject.engine.answer(call, body | {"stream": True}, count or meter())
    assert isinstance(answer, EventStream)
    events = [event async for event in answer.events]
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events[-1] == "data: [DONE]\n\n"
    return [orjson.loads(event.removeprefix("data: ")) for event in events[:-1]]


async def becomes_idle(engine: Engine) -> None:
    async with asyncio.timeout(FREE_SECONDS):
        while (load := engine.load()).running_requests or load.waiting_requests or load.kv_usage_ratio:
            await asyncio.sleep(0.01)


@contract
async def facts_are_there(subject: Subject) -> None:
    facts = subject.engine.facts
    assert facts.max_context_tokens > 0
    assert facts.vocabulary_size > 0
    assert facts.kv_cache_tokens >= 0
    assert not subject.engine.load().is_dead


@contract
async def a_whole_chat_answer_has_openais_shape(subject: Subject) -> None:
    count = meter("mine")
    document = await whole(subject, OpenAICall.CHAT_COMPLETION, chat(subject), count)
    answer = ChatCompletion.model_validate(document)
    assert (answer.object, answer.model, answer.id) == ("chat.completion", subject.model, "chatcmpl-mine")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        count.prompt_tokens,
        count.completion_tokens,
    )
    assert count.first_token_at is not None


@contract
async def a_streamed_chat_is_the_whole_one_in_parts(subject: Subject) -> None:
    body = chat(subject)
    document = await whole(subject, OpenAICall.CHAT_COMPLETION, body)
    count = meter("mine")
    events = await streamed(
        subject, OpenAICall.CHAT_COMPLETION, body | {"stream_options": {"include_usage": True}}, count
    )
    *chunks, last = [ChatCompletionChunk.model_validate(event) for event in events]
    assert {(chunk.object, chunk.id, chunk.model) for chunk in chunks} == {
        ("chat.completion.chunk", "chatcmpl-mine", subject.model)
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == document["choices"][0]["message"]["content"]
    assert len([part for part in parts if part]) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == document["choices"][0]["finish_reason"]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == count.completion_tokens > 0


@contract
async def a_completion_whole_and_streamed(subject: Subject) -> None:
    body = {"model": subject.model, "prompt": TEXTS[1], "temperature": 0, "max_tokens": 8}
    document = await whole(subject, OpenAICall.COMPLETION, body)
    answer = Completion.model_validate(document)
    assert (answer.object, answer.model) == ("text_completion", subject.model)
    assert answer.choices[0].text
    events = await streamed(subject, OpenAICall.COMPLETION, body)
    assert "".join(event["choices"][0]["text"] for event in events) == answer.choices[0].text
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == answer.choices[0].finish_reason


@contract
async def pieces_come_in_order_and_end_once(subject: Subject) -> None:
    count = meter()
    position, ends, text = 0, 0, ""
    stream = subject.engine.generate(Text(TEXTS[0]), Sampling(temperature=0, max_tokens=10), count)
    async for batch in stream:
        for piece in batch:
            assert not ends
            assert (piece.choice_index, piece.output_index) == (0, position)
            position += len(piece.token_ids)
            # Counted before it is handed out.
            assert count.completion_tokens >= position
            assert count.first_token_at is not None
            ends += piece.finish is not None
            text += piece.text
    assert ends == 1
    assert text
    if subject.has_tokens:
        assert count.prompt_tokens > 0
        assert position == count.completion_tokens == 10


@contract
async def a_conversation_is_answered(subject: Subject) -> None:
    prompt = Conversation((Turn("system", "Be brief."), Turn("user", QUESTION)))
    pieces = await generated(subject, prompt, Sampling(temperature=0, max_tokens=12))
    assert text_of(pieces).strip()
    assert pieces[-1].finish in {FinishReason.STOP, FinishReason.LENGTH}


@contract
async def concurrent_calls_get_their_own_answers(subject: Subject) -> None:
    sampling = Sampling(temperature=0, max_tokens=6)
    alone = [text_of(await generated(subject, Text(text), sampling)) for text in TEXTS]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(generated(subject, Text(text), sampling, meter(f"r{index}")))
            for index, text in enumerate(TEXTS)
        ]
    together = [text_of(task.result()) for task in tasks]
    # A batch is computed in another order than one row: where two tokens are all but equal, the other one may win.
    agreeing = sum(one == other for one, other in zip(alone, together, strict=True))
    assert agreeing >= len(TEXTS) - 1
    assert len(set(together)) == len(TEXTS)


@contract
async def closing_an_iterator_frees_everything(subject: Subject) -> None:
    stream: Any = subject.engine.generate(Text(TEXTS[2]), Sampling(temperature=0, max_tokens=400), meter())
    await anext(stream)
    assert subject.engine.load().running_requests + subject.engine.load().waiting_requests >= 0
    await stream.aclose()
    await becomes_idle(subject.engine)


@contract
async def cancelling_a_call_frees_everything(subject: Subject) -> None:
    body = chat(subject, max_tokens=400, ignore_eos=True)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(whole(subject, OpenAICall.CHAT_COMPLETION, body, meter(f"r{index}")))
            for index in range(3)
        ]
        async with asyncio.timeout(FREE_SECONDS):
            while not subject.engine.load().running_requests:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
    await becomes_idle(subject.engine)
    assert (await whole(subject, OpenAICall.CHAT_COMPLETION, chat(subject)))["choices"]


@contract
async def closing_a_stream_frees_everything(subject: Subject) -> None:
    body = chat(subject, max_tokens=400, ignore_eos=True, stream=True)
    answer = await subject.engine.answer(OpenAICall.CHAT_COMPLETION, body, meter())
    assert isinstance(answer, EventStream)
    events: Any = answer.events
    await anext(events)
    await events.aclose()
    await becomes_idle(subject.engine)


@contract
async def wrong_requests_are_refused_by_field(subject: Subject) -> None:
    wrongs: list[dict[str, Any]] = [{"messages": "hello"}, {"messages": []}]
    for wrong in wrongs:
        with pytest.raises(InvalidRequest) as caught:
            await whole(subject, OpenAICall.CHAT_COMPLETION, chat(subject, **wrong))
        assert caught.value.metadata.get("param", "messages").startswith("messages"), wrong


@contract
@needs_tokens
async def sampling_out_of_range_is_refused_by_field(subject: Subject) -> None:
    for field_name, value in (("temperature", -1), ("top_p", 2), ("max_tokens", "many"), ("n", 0)):
        for is_stream in (False, True):
            with pytest.raises(InvalidRequest) as caught:
                await subject.engine.answer(
                    OpenAICall.CHAT_COMPLETION, chat(subject, **{field_name: value, "stream": is_stream}), meter()
                )
            said = caught.value
            assert field_name in said.message or said.metadata.get("param") == field_name, (field_name, said)


@contract
@needs_tokens
async def a_prompt_that_does_not_fit_is_refused(subject: Subject) -> None:
    ids = TokenIds((5,) * (subject.engine.facts.max_context_tokens + 1))
    with pytest.raises(ContextLengthExceeded):
        await generated(subject, ids, Sampling(max_tokens=1))
    body = {"model": subject.model, "prompt": list(ids.ids), "max_tokens": 1}
    with pytest.raises(ContextLengthExceeded):
        await whole(subject, OpenAICall.COMPLETION, body)
    await becomes_idle(subject.engine)


@contract
@needs_tokens
async def an_answer_ends_at_its_length(subject: Subject) -> None:
    count = meter()
    sampling = Sampling(temperature=0, max_tokens=7, ignore_eos=True)
    pieces = await generated(subject, Text(TEXTS[0]), sampling, count)
    assert len(ids_of(pieces)) == count.completion_tokens == 7
    assert (pieces[-1].finish, pieces[-1].stop) == (FinishReason.LENGTH, None)


@contract
async def a_stop_text_ends_an_answer_and_is_not_part_of_it(subject: Subject) -> None:
    sampling = Sampling(temperature=0, max_tokens=12)
    everything = text_of(await generated(subject, Text(TEXTS[1]), sampling))
    middle = len(everything) // 2
    stop = everything[middle : middle + 3]
    assert stop
    pieces = await generated(subject, Text(TEXTS[1]), Sampling(temperature=0, max_tokens=12, stop=(stop,)))
    assert text_of(pieces) == everything[: everything.index(stop)]
    assert (pieces[-1].finish, pieces[-1].stop) == (FinishReason.STOP, stop)


@contract
@needs_tokens
async def a_stop_token_ends_an_answer(subject: Subject) -> None:
    ids = ids_of(await generated(subject, Text(TEXTS[1]), Sampling(temperature=0, max_tokens=8)))
    stop = ids[3]
    pieces = await generated(subject, Text(TEXTS[1]), Sampling(temperature=0, max_tokens=8, stop_token_ids=(stop,)))
    assert ids_of(pieces) == ids[: ids.index(stop) + 1]
    assert (pieces[-1].finish, pieces[-1].stop) == (FinishReason.STOP, stop)


@contract
@needs_tokens
async def tokens_have_log_probabilities(subject: Subject) -> None:
    pieces = await generated(subject, Text(TEXTS[0]), Sampling(temperature=0, max_tokens=4, logprobs=2))
    entries = [entry for piece in pieces for entry in piece.logprobs]
    assert [entry.chosen.token_id for entry in entries] == ids_of(pieces)
    for entry in entries:
        assert entry.chosen.logprob <= 0
        values = [top.logprob for top in entry.top]
        assert values == sorted(values, reverse=True)
        # Greedy: nothing is likelier than what was drawn.
        assert entry.top[0].logprob == entry.chosen.logprob
    document = await whole(
        subject, OpenAICall.CHAT_COMPLETION, chat(subject, logprobs=True, top_logprobs=2, max_tokens=3)
    )
    content = ChatCompletion.model_validate(document).choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert len(content.content) == 3
    assert all(entry.top_logprobs for entry in content.content)


@contract
@needs_tokens
async def several_answers_each_end_once(subject: Subject) -> None:
    sampling = Sampling(temperature=1.0, seed=3, n=3, max_tokens=5, ignore_eos=True)
    count = meter()
    pieces = await generated(subject, Text(TEXTS[2]), sampling, count)
    assert sorted(piece.choice_index for piece in pieces if piece.finish is not None) == [0, 1, 2]
    assert [len(ids_of(pieces, choice)) for choice in range(3)] == [5, 5, 5]
    assert count.completion_tokens == 15


@contract
@needs_tokens
async def a_prompt_of_token_ids_is_the_text_s(subject: Subject) -> None:
    tokenized = await subject.engine.tokenize(Text(TEXTS[0]))
    assert len(tokenized.token_ids) == len(tokenized.tokens) > 0
    conversation = await subject.engine.tokenize(Conversation((Turn("user", TEXTS[0]),)))
    assert len(conversation.token_ids) >= len(tokenized.token_ids)
    count = meter()
    await generated(subject, Text(TEXTS[0]), Sampling(temperature=0, max_tokens=2), count)
    assert count.prompt_tokens == len(tokenized.token_ids)


@contract
@needs_chance
async def a_seed_gives_the_same_answer_again(subject: Subject) -> None:
    def sampling(seed: int) -> Sampling:
        return Sampling(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)

    first, again, other = [ids_of(await generated(subject, Text(TEXTS[2]), sampling(seed))) for seed in (7, 7, 8)]
    assert first == again
    assert first != other


@contract
@needs_chance
async def greedy_tokens_are_noted(subject: Subject) -> None:
    sampling = Sampling(temperature=0, max_tokens=16, logprobs=2)
    noted = []
    for text in TEXTS:
        pieces = await generated(subject, Text(text), sampling)
        entries = [entry for piece in pieces for entry in piece.logprobs]
        # How clear each choice was: between the likeliest two.
        margins = [entry.top[0].logprob - entry.top[1].logprob for entry in entries]
        noted.append({"ids": ids_of(pieces), "logprobs": [e.chosen.logprob for e in entries], "margins": margins})
    subject.notes["greedy"] = noted


@contract
async def errors_are_helios_errors(subject: Subject) -> None:
    for body in ({}, {"messages": 5}, {"messages": [5]}):
        with pytest.raises(HeliosError):
            await subject.engine.answer(OpenAICall.CHAT_COMPLETION, {"model": subject.model} | body, meter())


@contract
@needs_tokens
async def vectors_are_refused_by_a_model_that_makes_text(subject: Subject) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await subject.engine.answer(OpenAICall.EMBEDDING, {"model": subject.model, "input": "x"}, meter())
    assert (caught.value.reason, caught.value.metadata["param"]) == ("WRONG_KIND_OF_MODEL", "model")


@contract
async def it_is_idle_in_the_end_and_closes_twice(subject: Subject) -> None:
    await becomes_idle(subject.engine)
    subject.engine.close()
    subject.engine.close()
