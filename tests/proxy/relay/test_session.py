"""Durable requests through relay and replicas: whatever breaks off, the client has what it would have had."""

import asyncio
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from helios.mesh.errors import Bug, Draining, HeliosError, InvalidRequest, Overloaded, ReplicaLost, Unavailable
from tests.proxy.fakes import until
from tests.proxy.relay.world import complete_request, running_world

WORDS = "one two three four five six seven"
TOKENS = 12
CREATED = re.compile(rb'"created":\d+')


def undated(body: bytes) -> bytes:
    """An answer without the second in which it began."""
    return CREATED.sub(b'"created":0', body)


def request(**more: Any) -> dict[str, Any]:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": WORDS, "max_tokens": TOKENS, "temperature": 0} | stream | more


def chat(**more: Any) -> dict[str, Any]:
    document = request(messages=[{"role": "user", "content": WORDS}], **more)
    del document["prompt"]
    return document


async def answers(method: str, document: dict[str, Any], cuts: list[int]) -> tuple[bytes, bytes]:
    """The answer of an undisturbed replica, and that of replicas which break off."""
    async with running_world(cuts=cuts) as world:
        whole, error = await world.openai(method, document, direct=world.replicas[0])
        assert error is None
        broken, error = await world.openai(method, document)
        assert error is None
        assert len(set(CREATED.findall(broken))) == 1
        return undated(whole), undated(broken)


@given(cuts=st.lists(st.integers(0, TOKENS), max_size=4), stop=st.sampled_from([None, "x", "five s", "six seven one"]))
@settings(max_examples=12)
def test_a_stream_that_is_cut_anywhere_is_the_stream_without_a_cut(cuts: list[int], stop: str | None) -> None:
    # Three in a row that bring nothing are the bound.
    cuts = [cut or 1 for cut in cuts]
    whole, broken = asyncio.run(answers("CreateCompletion", request(stop=stop), cuts))
    assert broken == whole


@given(cuts=st.lists(st.integers(1, TOKENS), max_size=4))
@settings(max_examples=8)
def test_a_conversation_that_is_cut_anywhere_is_the_one_without_a_cut(cuts: list[int]) -> None:
    whole, broken = asyncio.run(answers("CreateChatCompletion", chat(), cuts))
    assert broken == whole
    assert broken.count(b'"role":"assistant"') == 1


@given(cuts=st.lists(st.integers(0, TOKENS), max_size=3))
@settings(max_examples=8)
def test_typed_tokens_are_neither_lost_nor_told_twice(cuts: list[int]) -> None:
    async def both() -> tuple[list[Any], list[Any]]:
        async with running_world(cuts=cuts) as world:
            sent = complete_request(WORDS, TOKENS)
            return await world.complete(sent, direct=world.replicas[0]), await world.complete(sent)

    whole, broken = asyncio.run(both())
    assert broken == whole


async def test_an_answer_that_is_not_streamed_is_begun_anew() -> None:
    async with running_world(cuts=[0]) as world:
        document = request(stream=False, n=2, temperature=1)
        del document["stream_options"]
        body, error = await world.openai("CreateCompletion", document)
        assert error is None
        assert body.count(b'"finish_reason":"length"') == 2
        assert world.answered == 2


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("logprobs", 1)])
async def test_what_can_not_be_continued_is_refused_before_it_begins(field: str, value: int) -> None:
    async with running_world() as world:
        body, error = await world.openai("CreateCompletion", request(temperature=1, **{field: value}))
        assert body == b""
        assert isinstance(error, InvalidRequest)
        assert error.metadata["param"] == field
        assert error.reason == "NOT_CONTINUABLE"


async def test_what_a_policy_makes_durable_is_not_refused_but_ends_with_its_replica() -> None:
    async with running_world() as world:
        document = request(temperature=1, n=2)
        body, error = await world.openai("CreateCompletion", document, durable="auto")
        assert error is None
        whole, _ = await world.openai("CreateCompletion", document, direct=world.replicas[1])
        assert undated(body) == undated(whole)
        world.cuts = [3]
        body, error = await world.openai("CreateCompletion", document, durable="auto")
        assert isinstance(error, Unavailable)
        assert body.count(b"data: {") > 3
        assert not world.picks


async def test_a_request_of_its_own_error_is_not_tried_elsewhere() -> None:
    async with running_world() as world:
        _, error = await world.openai("CreateCompletion", request(max_tokens=0))
        assert isinstance(error, InvalidRequest)
        assert world.answered == 1
        assert not world.picks


async def test_replicas_that_bring_nothing_end_the_answer() -> None:
    async with running_world(cuts=[3, *[0] * 10]) as world:
        body, error = await world.openai("CreateCompletion", request())
        assert error is not None
        assert world.answered == 5  # one brought tokens, three none, and one more is too many
        assert body.count(b"data: {") == 4
        assert b'"error"' in body.rpartition(b"data: ")[2]


async def test_what_breaks_off_behind_the_end_of_an_answer_is_nobodys_business() -> None:
    async with running_world() as world:
        world.is_cut_at_end = True
        body, error = await world.openai("CreateCompletion", request())
        assert error is None
        assert body.endswith(b"data: [DONE]\n\n")
        assert world.answered == 1
        assert not world.picks


async def test_proxies_are_told_where_an_answer_went_on() -> None:
    async with running_world(cuts=[3]) as world:
        first, second = (replica.server.address for replica in world.replicas)
        _, error = await world.openai("CreateCompletion", request())
        assert error is None
        await until(lambda: world.moves, seconds=20)
        (move,) = world.moves
        assert (move.request_id, move.left_endpoint, move.reached_endpoint) == ("r-1", first, second)
        assert (move.is_drain, move.reason, move.token_count) == (False, "UNAVAILABLE", 3)
        assert 0 <= move.waited.ToNanoseconds() <= move.first_token_ago.ToNanoseconds()


async def test_proxies_are_told_of_an_answer_that_nobody_went_on_with() -> None:
    async with running_world(cuts=[3]) as world:
        world.refusal = Overloaded("no room", retry_after_seconds=7.0)
        _, error = await world.openai("CreateCompletion", request())
        assert isinstance(error, ReplicaLost)
        await until(lambda: world.moves, seconds=20)
        (move,) = world.moves
        assert (move.reached_endpoint, move.reason) == ("", "UNAVAILABLE, OVERLOADED")


async def test_an_answer_that_has_begun_goes_on_where_the_proxy_says() -> None:
    async with running_world(cuts=[3]) as world:
        first, second = (replica.server.address for replica in world.replicas)
        # The rest of what was picked when the answer began may be long gone.
        world.picked = [first, "127.0.0.1:1"]
        _, error = await world.openai("CreateCompletion", request())
        assert error is None
        assert [list(asked.failed_endpoints) for asked in world.picks] == [[first]]
        assert world.answered == 2
        world.picked = ["127.0.0.1:1", second]
        _, error = await world.openai("CreateCompletion", request())
        assert error is None
        assert len(world.picks) == 1, "where nothing is out, the rest of the list is tried"


async def test_without_another_replica_the_client_is_told_in_band() -> None:
    async with running_world(cuts=[3]) as world:
        world.refusal = Overloaded("no room", retry_after_seconds=7.0)
        body, error = await world.openai("CreateCompletion", request())
        assert isinstance(error, ReplicaLost)
        assert error.metadata == {"tokens": "3", "cause": "OVERLOADED"}
        assert error.retry_after_seconds == 7.0
        assert len(world.picks) == 1
        assert body.count(b"data: {") == 4
        assert b"no room" in body


async def test_a_proxy_that_restarts_is_waited_for() -> None:
    async with running_world(cuts=[3]) as world:
        world.refusal = Draining("the gateway's control process restarts")
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            asking = group.create_task(world.openai("CreateCompletion", request()), name="ask")
            while len(world.picks) < 2 and not asking.done():
                await asyncio.sleep(0.01)
            world.refusal = None
        body, error = asking.result()
        assert error is None
        assert body.endswith(b"data: [DONE]\n\n")


async def test_a_drain_moves_a_stream_and_counts_it_once() -> None:
    async with running_world(decode_seconds_per_token="0.02") as world:
        first, second = world.replicas
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(world.openai("CreateCompletion", request(max_tokens=50)), name="ask")
            await world.wait_written(3)
            assert await first.gate.drain(20.0)
        body, error = asking.result()
        assert error is None
        whole, _ = await world.openai("CreateCompletion", request(max_tokens=50), direct=second)
        assert undated(body) == undated(whole)
        (left,) = first.finished()
        assert (left.status_code, left.prompt_tokens, left.completion_tokens) == (14, 0, 0)
        assert [end.completion_tokens for end in second.finished()] == [50, 50]
        assert len(world.picks) == 1
        await until(lambda: world.moves, seconds=20)
        (move,) = world.moves
        assert (move.left_endpoint, move.reached_endpoint) == (first.server.address, second.server.address)
        assert (move.is_drain, move.waited.ToNanoseconds()) == (True, 0)
        assert 3 <= move.token_count < 50


@pytest.mark.parametrize("failure", [Unavailable("the engine is gone"), Bug("the engine failed")])
async def test_tokens_of_a_replica_that_fails_are_counted_once(failure: HeliosError) -> None:
    async with running_world(cuts=[3]) as world:
        world.cut_error = failure
        _, error = await world.openai("CreateCompletion", request())
        assert error is None
        left, end = [finished for replica in world.replicas for finished in replica.finished()]
        assert (left.status_code, left.prompt_tokens, left.completion_tokens) == (14, 0, 0)
        assert (end.status_code, end.prompt_tokens, end.completion_tokens) == (0, 7, TOKENS)


async def test_tokens_of_an_answer_that_nobody_goes_on_with_are_counted_where_they_were_made() -> None:
    async with running_world(cuts=[3]) as world:
        _, error = await world.openai("CreateCompletion", request(temperature=1, n=2), durable="auto")
        assert isinstance(error, Unavailable)
        (end,) = world.replicas[0].finished()
        assert end.status_code == 14
        assert end.completion_tokens > 3


async def test_of_replicas_that_drain_at_once_each_is_tried_once() -> None:
    async with running_world(replica_count=3, decode_seconds_per_token="0.02") as world:
        *leaving, staying = world.replicas
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(world.openai("CreateCompletion", request(max_tokens=50)), name="ask")
            await world.wait_written(3)
            # The proxy, which names the second one first, has heard of neither.
            assert await leaving[1].gate.drain(20.0)
            assert await leaving[0].gate.drain(20.0)
        body, error = asking.result()
        assert error is None
        assert body.endswith(b"data: [DONE]\n\n")
        (end,) = staying.finished()
        assert end.completion_tokens == 50


async def test_a_replica_that_refuses_because_it_drains_is_named_to_the_proxy() -> None:
    async with running_world(cuts=[3], replica_count=3) as world:
        _, second, _ = world.replicas
        assert await second.gate.drain(20.0)
        world.named_at_once = 1
        _, error = await world.openai("CreateCompletion", request())
        assert error is None
        assert [list(asked.failed_endpoints) for asked in world.picks][1:] == [[second.server.address]]


async def test_a_drain_without_another_replica_lets_the_stream_end_where_it_is() -> None:
    async with running_world(replica_count=1, decode_seconds_per_token="0.01") as world:
        (only,) = world.replicas
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(world.openai("CreateCompletion", request(max_tokens=30)), name="ask")
            await world.wait_written(3)
            assert await only.gate.drain(20.0)
        body, error = asking.result()
        assert error is None
        assert body.endswith(b"data: [DONE]\n\n")
        assert world.answered == 1


async def test_a_client_that_leaves_ends_it_everywhere() -> None:
    async with running_world(decode_seconds_per_token="0.02") as world:
        first = world.replicas[0]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(world.openai("CreateCompletion", request(max_tokens=500)), name="ask")
            await world.wait_written(3)
            asking.cancel()
            async with asyncio.timeout(20):
                while first.ledger.running_count:
                    await asyncio.sleep(0.01)
        (end,) = first.finished()
        assert end.status_code == 1
        assert 0 < end.completion_tokens < 500
