"""Reading ZMQ sockets by their descriptors: nothing is lost, doubled or read after the end."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import zmq
import zmq.asyncio

from helios.worker.engines.vllm.socket_reader import SocketReader


@dataclass
class Pair:
    """A sender and a receiver, and what was read."""

    sending: zmq.Socket[bytes]
    receiving: zmq.asyncio.Socket
    read: list[list[bytes]] = field(default_factory=list)

    def reader(self) -> SocketReader:
        return SocketReader(self.receiving, lambda frames: self.read.append([frame.bytes for frame in frames]))

    async def until(self, is_done: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not is_done():
                await asyncio.sleep(0.001)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    context = zmq.Context[zmq.Socket[bytes]]()
    receiving = zmq.asyncio.Context(context).socket(zmq.PULL)
    sending = context.socket(zmq.PUSH)
    sending.connect(f"tcp://127.0.0.1:{receiving.bind_to_random_port('tcp://127.0.0.1')}")
    yield Pair(sending, receiving)
    sending.close(0)
    receiving.close(0)
    context.term()


async def test_messages_come_in_order_whether_they_were_sent_before_or_after(pair: Pair) -> None:
    for number in range(50):
        pair.sending.send(b"%d" % number)
    await asyncio.sleep(0.05)
    with pair.reader():
        for number in range(50, 300):
            pair.sending.send(b"%d" % number)
            if number % 7 == 0:
                await asyncio.sleep(0)
        await pair.until(lambda: len(pair.read) == 300)
    assert pair.read == [[b"%d" % number] for number in range(300)]


async def test_a_message_after_a_pause_is_read_at_once(pair: Pair) -> None:
    with pair.reader():
        for count in range(1, 6):
            await asyncio.sleep(0.02)
            pair.sending.send(b"x")
            await pair.until(lambda count=count: len(pair.read) == count)  # type: ignore[misc]


async def test_parts_of_a_message_stay_together(pair: Pair) -> None:
    with pair.reader():
        pair.sending.send_multipart([b"a", b"b", b"c"])
        pair.sending.send(b"d")
        await pair.until(lambda: len(pair.read) == 2)
    assert pair.read == [[b"a", b"b", b"c"], [b"d"]]


async def test_others_have_their_turn_while_much_is_there(pair: Pair) -> None:
    for _ in range(200):
        pair.sending.send(b"x")
    await asyncio.sleep(0.05)
    with pair.reader():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(pair.read) < 200
        await pair.until(lambda: len(pair.read) == 200)


async def test_nothing_is_read_after_the_end_or_from_a_closed_socket(pair: Pair) -> None:
    with pair.reader():
        pair.sending.send(b"x")
        await pair.until(lambda: len(pair.read) == 1)
    pair.sending.send(b"y")
    await asyncio.sleep(0.05)
    assert len(pair.read) == 1
    with pair.reader():
        pair.receiving.close(0)
        await asyncio.sleep(0.05)
    assert len(pair.read) == 1
