"""What a client says in a stream: in order, bounded, with heartbeats, and ended in two ways."""

import asyncio

import pytest

from helios.mesh.addresses import dialable
from helios.mesh.requests import StreamRequests

WAIT_SECONDS = 20.0


async def said(requests: StreamRequests[str]) -> list[str]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [message async for message in requests]


async def test_what_was_put_is_said_in_order_to_the_end() -> None:
    requests = StreamRequests("hello", max_count=3)
    assert [requests.put(message) for message in ("a", "b", "one too many")] == [True, True, False]
    requests.finish()
    assert await said(requests) == ["hello", "a", "b"]


async def test_who_closes_says_nothing_more() -> None:
    requests = StreamRequests("hello", max_count=3)
    requests.close()
    assert await said(requests) == []


@pytest.mark.parametrize("is_finished", [True, False])
async def test_who_waits_learns_of_the_end(*, is_finished: bool) -> None:
    requests: StreamRequests[str] = StreamRequests(max_count=1)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(said(requests))
        await asyncio.sleep(0)
        (requests.finish if is_finished else requests.close)()
    assert waiting.result() == []


async def test_a_heartbeat_is_said_where_there_is_nothing_else() -> None:
    requests = StreamRequests("hello", max_count=2)
    async with asyncio.timeout(WAIT_SECONDS):
        assert await anext(requests) == "hello"
        requests.beat(0.01, lambda: "beat")
        assert await anext(requests) == "beat"
        requests.put("news")
        assert await anext(requests) == "news"
        assert await anext(requests) == "beat"
    requests.close()


@pytest.mark.parametrize(
    ("listens", "dialled"),
    [
        (["unix:/run/x.sock", "127.0.0.1:7", "10.1.2.3:7"], "10.1.2.3:7"),
        (["127.0.0.1:7", "unix:/run/x.sock"], "127.0.0.1:7"),
        (["0.0.0.0:7"], ""),
        (["127.0.0.1:7", "[::]:8"], ""),
        ([], ""),
    ],
)
def test_others_dial_what_leads_here(listens: list[str], dialled: str) -> None:
    assert dialable(listens) == dialled
