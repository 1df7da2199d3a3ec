"""Classes of LitServe's users in Helios's engine: every kind of hook, what becomes of outputs, and what of errors."""

import asyncio
import importlib.metadata
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from helios.mesh.errors import Bug, HeliosError, InvalidRequest, Overloaded, QuotaExceeded, Unsupported
from helios.worker.engines.custom import factory, lit_runner
from helios.worker.engines.custom.outputs import read_output
from helios.worker.replica.engine import (
    Conversation,
    Engine,
    EngineHooks,
    EventStream,
    JsonAnswer,
    Meter,
    OpenAICall,
    Sampling,
    Text,
    Turn,
)
from helios.worker.replica.engines import split_engine
from helios.worker.replica.spec import ReplicaSpec
from tests.worker.engines import lit_examples

EXAMPLES = "tests.worker.engines.lit_examples"


@contextmanager
def engine(target: str, **options: str) -> Iterator[Engine]:
    """Makes the engine of a class, as a replica does."""
    reader, writer = os.pipe()
    spec = ReplicaSpec(
        replica_id="r1",
        model="mine",
        revision="sha256:" + "0" * 64,
        model_path="/weights",
        engine="custom",
        options={"class": target, **options},
        created_at=datetime.now(UTC),
    )
    hooks = EngineHooks(on_forked=lambda: None, on_load=lambda: None, phase_descriptor=writer)
    made: Engine | None = None
    try:
        made = factory.build(spec, hooks)
        yield made
    finally:
        if made is not None:
            made.close()
        os.close(reader)
        os.close(writer)


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "mine", "messages": [{"role": "user", "content": text}]} | fields


async def ask(made: Engine, text: str, meter: Meter | None = None, **fields: Any) -> dict[str, Any]:
    meter = meter or Meter("r", 0.0)
    answer = await made.answer(OpenAICall.CHAT_COMPLETION, body(text, **fields), meter)
    assert isinstance(answer, JsonAnswer)
    return dict(orjson.loads(answer.body))


async def content(made: Engine, text: str, **fields: Any) -> str:
    answer = ChatCompletion.model_validate(await ask(made, text, **fields))
    return answer.choices[0].message.content or ""


async def stream(made: Engine, text: str, **fields: Any) -> list[str]:
    """Returns the parts of a streamed answer, as openai's client reads them."""
    answer = await made.answer(OpenAICall.CHAT_COMPLETION, body(text, stream=True, **fields), Meter("r", 0.0))
    assert isinstance(answer, EventStream)
    events = [event async for event in answer.events]
    assert events[-1] == "data: [DONE]\n\n"
    chunks = [ChatCompletionChunk.model_validate(orjson.loads(event[6:])) for event in events[:-1]]
    return [part for chunk in chunks for choice in chunk.choices if (part := choice.delta.content)]


async def test_a_text_becomes_the_message_and_a_stream_of_one_part() -> None:
    with engine(f"{EXAMPLES}:Upper", device="cpu") as made:
        assert await content(made, "hello there") == "HELLO THERE"
        assert await stream(made, "hello there") == ["HELLO THERE"]
        answer = await made.answer(OpenAICall.COMPLETION, {"model": "mine", "prompt": "a b"}, Meter("r", 0.0))
        assert isinstance(answer, JsonAnswer)
        assert orjson.loads(answer.body)["choices"][0]["text"] == "A B"


async def test_a_class_may_make_vectors() -> None:
    meter = Meter("r", 0.0)
    with engine(f"{EXAMPLES}:Vectors") as made:
        answer = await made.answer(OpenAICall.EMBEDDING, {"model": "mine", "input": ["a", "abc"]}, meter)
        assert isinstance(answer, JsonAnswer)
        vectors = [entry.embedding for entry in CreateEmbeddingResponse.model_validate_json(answer.body).data]
        with pytest.raises(InvalidRequest):
            await made.answer(OpenAICall.EMBEDDING, {"model": "mine"}, Meter("r", 0.0))
    assert vectors == [[1.0], [3.0]]
    assert (meter.prompt_tokens, meter.completion_tokens) == (3, 0)
    with engine(f"{EXAMPLES}:Square") as made, pytest.raises(HeliosError):
        await made.answer(OpenAICall.EMBEDDING, {"model": "mine", "input": "4"}, Meter("r", 0.0))


async def test_another_dict_becomes_its_json() -> None:
    with engine(f"{EXAMPLES}:Square") as made:
        assert orjson.loads(await content(made, "4")) == {"output": 16.0}


async def test_a_stream_is_streamed_and_joined() -> None:
    with engine(f"{EXAMPLES}:Echo") as made:
        assert await stream(made, "one two", max_tokens=3) == ["one ", "two ", "one "]
        assert await content(made, "one two", max_tokens=3) == "one two one "
        pieces = [
            piece
            async for batch in made.generate(
                Conversation((Turn("user", "typed call"),)), Sampling(max_tokens=2), Meter("r", 0.0)
            )
            for piece in batch
        ]
        assert "".join(piece.text for piece in pieces) == "typed call "
        assert [piece.finish is not None for piece in pieces] == [False, False, True]


async def test_openais_own_document_passes_as_it_is_and_is_counted() -> None:
    meter = Meter("r", 0.0)
    with engine(f"{EXAMPLES}:Document") as made:
        document = await ask(made, "as it is", meter)
        assert (document["id"], document["choices"][0]["message"]["content"]) == ("own", "as it is")
        assert (meter.prompt_tokens, meter.completion_tokens) == (3, 5)
        # To a client that streams, the whole answer is one chunk.
        assert await stream(made, "as it is") == ["as it is"]


async def test_requests_that_come_together_are_one_batch() -> None:
    with engine(f"{EXAMPLES}:Batched") as made:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(content(made, f"text{index}")) for index in range(3)]
        assert [task.result() for task in tasks] == [f"text{index} in 3" for index in range(3)]


async def test_a_request_that_can_not_be_decoded_fails_alone() -> None:
    with engine(f"{EXAMPLES}:Batched") as made:
        async with asyncio.TaskGroup() as group:
            good = group.create_task(content(made, "good"))
            with pytest.raises(InvalidRequest, match="bad words"):
                await ask(made, "bad")
        assert good.result() == "good in 1"


async def test_a_batch_streams_to_each_of_its_requests() -> None:
    with engine(f"{EXAMPLES}:BatchedStream") as made:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream(made, name)) for name in ("a", "b")]
        assert [task.result() for task in tasks] == [["a0 ", "a1 ", "a2 "], ["b0 ", "b1 ", "b2 "]]


async def test_coroutines_run_at_the_same_time() -> None:
    text = " ".join(["word"] * 8)
    with engine(f"{EXAMPLES}:Async") as made:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream(made, text)) for _ in range(8)]
        assert all(task.result() == ["word "] * 8 for task in tasks)
        # One after the other they would sleep for 3.2 s.
        assert time.monotonic() - started < 2.5


async def test_closing_a_stream_closes_the_user_s_generator() -> None:
    with engine(f"{EXAMPLES}:Closing") as made:
        answer = await made.answer(OpenAICall.CHAT_COMPLETION, body("endless", stream=True), Meter("r", 0.0))
        assert isinstance(answer, EventStream)
        events: Any = answer.events
        await anext(events)
        await events.aclose()
        async with asyncio.timeout(10):
            while lit_examples.Closing.closed != ["endless"]:
                await asyncio.sleep(0.01)
        assert made.load().running_requests == 0


async def test_an_error_before_the_first_part_is_the_answer_and_one_after_it_ends_the_stream() -> None:
    with engine(f"{EXAMPLES}:BrokenPredict") as made:
        for is_stream in (False, True):
            with pytest.raises(QuotaExceeded, match="come back later"):
                await made.answer(OpenAICall.CHAT_COMPLETION, body("status", stream=is_stream), Meter("r", 0.0))
            with pytest.raises(Bug, match=r"predict .* raised ValueError: out of ideas") as caught:
                await made.answer(OpenAICall.CHAT_COMPLETION, body("first", stream=is_stream), Meter("r", 0.0))
            assert caught.value.reason == "CUSTOM_CODE_FAILED"
        answer = await made.answer(OpenAICall.CHAT_COMPLETION, body("middle", stream=True), Meter("r", 0.0))
        assert isinstance(answer, EventStream)
        assert "assistant" in await anext(answer.events)
        assert "so far" in await anext(answer.events)
        with pytest.raises(Bug, match="out of ideas"):
            await anext(answer.events)
        # And it serves on.
        with pytest.raises(QuotaExceeded):
            await ask(made, "status")


async def test_an_answer_that_nobody_reads_ends_and_the_next_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_runner, "_UNREAD_LIMIT", 100)
    with engine(f"{EXAMPLES}:Endless") as made:
        for _ in range(2):
            answer = await made.answer(OpenAICall.CHAT_COMPLETION, body("x", stream=True), Meter("r", 0.0))
            assert isinstance(answer, EventStream)
            await asyncio.sleep(0.1)
            with pytest.raises(Overloaded, match="not read as fast") as caught:
                [event async for event in answer.events]
            assert caught.value.reason == "SLOW_READER"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_outputs_that_can_not_be_are_errors_and_an_exit_is_a_death() -> None:
    with engine(f"{EXAMPLES}:Odd") as made:
        with pytest.raises(Bug, match="0 outputs for 1 requests"):
            await ask(made, "few")
        with pytest.raises(Bug, match="TypeError"):
            await ask(made, "none")
        assert await content(made, "fine") == "fine"
        assert not made.load().is_dead
        task = asyncio.ensure_future(ask(made, "exit"))  # noqa: TID251  nobody answers it
        async with asyncio.timeout(10):
            while not made.load().is_dead:
                await asyncio.sleep(0.01)
        task.cancel()


@pytest.mark.parametrize(
    ("target", "reason", "words"),
    [
        (f"{EXAMPLES}:BrokenSetup", "CUSTOM_CODE_FAILED", "setup .* raised RuntimeError: no weights for cpu"),
        (f"{EXAMPLES}:Missing", "CUSTOM_CLASS_NOT_FOUND", "has no 'Missing'"),
        ("no_such_module:Class", "CUSTOM_CLASS_NOT_FOUND", "no module 'no_such_module'"),
        ("no-such-entry-point", "CUSTOM_CLASS_NOT_FOUND", "no entry point"),
        ("", "CUSTOM_CLASS_NOT_FOUND", "which class"),
        (f"{EXAMPLES}:WithSpec", "INVALID_ENGINE_SETTINGS", "LitSpec"),
        (f"{EXAMPLES}:words", "INVALID_ENGINE_SETTINGS", "neither a litserve.LitAPI nor an engine"),
    ],
)
def test_a_start_that_fails_says_why(target: str, reason: str, words: str) -> None:
    with pytest.raises(HeliosError, match=words) as caught, engine(target):
        pass
    assert caught.value.reason == reason


def test_options_go_to_the_constructor_and_unknown_ones_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="max_batch") as caught, engine(f"{EXAMPLES}:Upper", max_batch="2"):
        pass
    assert caught.value.reason == "INVALID_ENGINE_SETTINGS"
    with engine(f"{EXAMPLES}:Upper", max_batch_size="2", batch_timeout="0.1"):
        pass


async def test_an_instance_runs_too() -> None:
    with engine(f"{EXAMPLES}:configured") as made:
        assert await content(made, "made by the module") == "MADE BY THE MODULE"


async def test_an_entry_point_names_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("loud", f"{EXAMPLES}:Upper", "helios.engines")

    def entry_points(*, group: str, name: str) -> tuple[importlib.metadata.EntryPoint, ...]:
        return (point,) if (group, name) == (point.group, point.name) else ()

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    with engine("loud") as made:
        assert await content(made, "quiet") == "QUIET"


async def test_a_lit_api_has_no_tokenizer() -> None:
    with engine(f"{EXAMPLES}:Upper") as made, pytest.raises(Unsupported):
        await made.tokenize(Text("x"))


def test_outputs_mean_what_the_package_says() -> None:
    assert read_output(b"bytes").text == "bytes"
    assert read_output({"text": "t", "usage": {"completion_tokens": 2}}).usage == {"completion_tokens": 2}
    assert read_output({"role": "assistant", "content": "c"}).text == "c"
    assert read_output([1, 2]).text == "[1,2]"
    with pytest.raises(Bug, match="object"):
        read_output(object())


def test_an_engine_s_name_may_hold_its_class() -> None:
    assert split_engine("custom:my_engine:Shouting") == ("custom", {"class": "my_engine:Shouting"})
    assert split_engine("vllm") == ("vllm", {})
