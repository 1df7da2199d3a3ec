"""Calls that are answered at once: what grpc.aio's clients get of them over mTLS, and what peers with frames of their
own may do to them. Whatever ends a question, all that it held is free again, and not more than that.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.connection
import h2.events
import h2.settings
import pytest
from h2.errors import ErrorCodes

from helios.api.catalog.v1 import model_service_pb2 as pb
from helios.mesh import errors
from helios.mesh.channel import Dialer
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.wire import frame
from helios.mesh.identity import CertificateAuthority
from helios.mesh.server import MeshServer, ServerOptions, peer_component
from helios.mesh.status import OPENAI_ERROR_TRAILER, error_from_rpc
from tests.mesh.http2.echo import SERVICE, Echo
from tests.mesh.http2.peer import Peer, plain_server
from tests.mesh.http2.test_contract import both, failure, nothing, unary

MEBIBYTE = 1 << 20
# Small windows and little room, so that questions of hundreds of KB need both back.
LIMITS = Limits(max_streams=8, stream_window_bytes=64 << 10, max_held_bytes=MEBIBYTE)
LONG = bytes(300_000)
"""Needs the stream's window several times; three may be held at once."""
GOAWAY = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(7)
"""But for the code in its last byte."""


def fail(message: bytes, _: Any) -> bytes:
    """Raises an error of the mesh."""
    raise errors.Draining(message[:100].decode(), retry_after_seconds=3)


def size_of_answer(message: bytes, _: Any) -> Any:
    """Answers with so many bytes; with a number, which is no message, for one below zero."""
    size = int(message)
    return bytes(size) if size >= 0 else size


ANSWERS: dict[str, Callable[[bytes, Any], Any]] = {
    "Ask": lambda message, _: message,
    "AskFailing": fail,
    "AskBroken": lambda _, __: 1 // 0,
    "AskParsed": lambda message, _: pb.GetModelRequest.FromString(message).model.encode(),
    "AskWho": lambda _, caller: str(peer_component(caller)).encode(),
    "AskSize": size_of_answer,
    "Count": lambda message, _: b"%d" % len(message),
    "Grow": lambda _, __: bytes(40_000),
}


def add_answers(server: MeshServer) -> None:
    for name, answer in ANSWERS.items():
        server.answer_at_once(f"/{SERVICE}/{name}", answer)


# Real clients, real mTLS.


@pytest.fixture
async def server(authority: CertificateAuthority, tmp_path: Path) -> AsyncIterator[MeshServer]:
    made = MeshServer(
        listen="127.0.0.1:0",
        identity=authority.issue("worker", tmp_path / "worker"),
        policy={SERVICE: frozenset({"edge"})},
        options=ServerOptions(drain_seconds=0.0, transport="http2"),
    )
    Echo().add_to(made)
    add_answers(made)
    made.serve(SERVICE)
    async with made:
        yield made


@pytest.fixture
async def edge(server: MeshServer, authority: CertificateAuthority, tmp_path: Path) -> AsyncIterator[Dialer]:
    async with Dialer(server.address, identity=authority.issue("edge", tmp_path / "edge"), peer="worker") as dialer:
        yield dialer


async def test_an_answer_is_what_the_function_returns(edge: Dialer) -> None:
    # Up to and beyond one frame, the first window of a stream, and the server's window.
    for size in (0, 1, 16_379, 16_380, 65_530, 65_531, 5 * MEBIBYTE):
        message = bytes(range(256)) * (size // 256) + bytes(size % 256)
        call = unary(edge, "Ask")(message, timeout=10)
        assert await call == message
        assert await call.code() is grpc.StatusCode.OK


async def test_a_raised_error_keeps_reason_and_details(edge: Dialer) -> None:
    error = await failure(unary(edge, "AskFailing")("ümlaut, 100 %\nnew line".encode(), timeout=5))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    arrived = error_from_rpc(error)
    assert (type(arrived), arrived.reason) == (errors.Draining, errors.Draining.default_reason)
    assert (arrived.message, arrived.retry_after_seconds) == ("ümlaut, 100 %\nnew line", 3)
    trailers = dict(error.trailing_metadata() or ())
    assert (trailers["retry-after"], trailers["x-should-retry"]) == ("3", "true")
    assert OPENAI_ERROR_TRAILER in trailers


@pytest.mark.parametrize(("name", "message"), [("AskBroken", b""), ("AskSize", b"-1")])
async def test_what_nobody_foresaw_is_a_bug_of_its_call(edge: Dialer, name: str, message: bytes) -> None:
    # Of a connection that ended this call would hear as well.
    running = both(edge, "Both")(timeout=10)
    await running.write(b"1")
    assert await running.read() == b"1"
    error = await failure(unary(edge, name)(message, timeout=5))
    assert type(error_from_rpc(error)) is errors.Bug
    assert OPENAI_ERROR_TRAILER in dict(error.trailing_metadata() or ())
    await running.write(b"2")
    assert await running.read() == b"2"
    await running.done_writing()


@pytest.mark.parametrize("message", [b"\x0a\x01\xff", b"\xff\xff\xff"], ids=["invalid UTF-8", "no protobuf"])
async def test_a_message_that_cant_be_parsed_is_the_callers_mistake(edge: Dialer, message: bytes) -> None:
    error = await failure(unary(edge, "AskParsed")(message, timeout=5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    good = pb.GetModelRequest(model="m").SerializeToString()
    assert await unary(edge, "AskParsed")(good, timeout=5) == b"m"


async def test_a_question_is_one_message(edge: Dialer) -> None:
    async def two() -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"

    for requests in (nothing(), two()):
        error = await failure(both(edge, "Ask")(requests, timeout=5).read())
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_compressed_question_is_unimplemented(edge: Dialer) -> None:
    call = unary(edge, "Ask")(bytes(1000), timeout=5, compression=grpc.Compression.Gzip)
    assert (await failure(call)).code() is grpc.StatusCode.UNIMPLEMENTED
    assert await unary(edge, "Ask")(b"plain", timeout=5) == b"plain"


async def test_a_question_above_the_limit_ends_its_call_alone(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge").read()
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
    options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "worker.helios.internal")]
    async with grpc.aio.secure_channel(server.address, credentials, options=options) as channel:
        method: Callable[..., Any] = channel.unary_unary(f"/{SERVICE}/Ask")
        error = await failure(method(bytes(34 * MEBIBYTE), timeout=30))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await method(b"the connection is well", timeout=5) == b"the connection is well"


async def test_an_answer_above_the_limit_ends_its_call_alone(edge: Dialer) -> None:
    error = await failure(unary(edge, "AskSize")(b"%d" % (34 * MEBIBYTE), timeout=30))
    # The server's word: clients refuse it by themselves, too.
    assert error_from_rpc(error).reason == "MESSAGE_TOO_LARGE"
    assert len(await unary(edge, "AskSize")(b"10", timeout=5)) == 10


async def test_the_function_sees_who_asks_and_the_policy_does_not(
    server: MeshServer, edge: Dialer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    assert await unary(edge, "AskWho")(b"", timeout=5) == b"edge"
    identity = authority.issue("storage", tmp_path / "storage")
    async with Dialer(server.address, identity=identity, peer="worker") as dialer:
        assert await unary(dialer, "AskWho")(b"", timeout=5) == b"storage"
        error = await failure(unary(dialer, "Unary")(b"", timeout=5))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_thousand_questions_among_ordinary_calls_get_their_own_answers(edge: Dialer) -> None:
    async def ask(name: str, number: int) -> bool:
        # Some need several frames.
        message = b"%s %d " % (name.encode(), number) + bytes(20_000 if number % 20 == 0 else 10)
        answer: bytes = await unary(edge, name)(message, timeout=60)
        return answer == message

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(ask(name, number), name=f"{name} {number}")
            for number in range(1000)
            for name in (("Ask", "Unary") if number % 4 == 0 else ("Ask",))
        ]
    assert all(task.result() for task in tasks)
    assert len(tasks) == 1250


async def test_grpcs_own_transport_does_not_answer_at_once() -> None:
    server = MeshServer(listen="127.0.0.1:0", identity=None, policy={})
    with pytest.raises(errors.Bug):
        server.answer_at_once(f"/{SERVICE}/Ask", ANSWERS["Ask"])


# Peers with frames of their own.


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[MeshServer]:
    made = plain_server(Echo(), tmp_path, LIMITS)
    add_answers(made)
    async with made:
        yield made


@pytest.fixture
async def address(plain: MeshServer) -> str:
    return plain.address


async def ask(peer: Peer, method: str, data: bytes, *, is_whole: bool = True) -> int:
    """Sends bytes of a question, prefix included, as the server's window allows."""
    stream_id = await peer.call(method, is_whole=False)
    await peer.send(stream_id, data)
    if is_whole:
        await end(peer, stream_id)
    return stream_id


async def end(peer: Peer, stream_id: int) -> None:
    peer.http2.end_stream(stream_id)
    await peer.flush()


async def narrow(peer: Peer, size_bytes: int) -> None:
    """Lets the server send so much on each stream, and any amount on all."""
    peer.http2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size_bytes})
    peer.http2.increment_flow_control_window(64 * MEBIBYTE)
    await peer.flush()
    await peer.until(h2.events.SettingsAcknowledged)


async def widen(peer: Peer, stream_id: int) -> None:
    peer.http2.increment_flow_control_window(16 * MEBIBYTE, stream_id)
    await peer.flush()


def received(peer: Peer, stream_id: int) -> bytes:
    """Returns what has come on a stream."""
    events = [event for event in peer.events if isinstance(event, h2.events.DataReceived)]
    return b"".join(event.data or b"" for event in events if event.stream_id == stream_id)


async def received_some(peer: Peer, stream_id: int, size_bytes: int) -> None:
    async with asyncio.timeout(5):
        while len(received(peer, stream_id)) < size_bytes:
            await peer.read()


async def reset_code(peer: Peer, stream_id: int) -> int | None:
    event = await peer.until(h2.events.StreamReset, stream_id)
    assert isinstance(event, h2.events.StreamReset)
    return event.error_code


async def goaway(peer: Peer) -> None:
    """Waits for the server's GOAWAY, after which h2, unlike real clients, would let nothing run."""
    await peer.until(h2.events.ConnectionTerminated)
    peer.http2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN


async def test_a_long_question_gets_its_window_back(peer: Peer) -> None:
    stream_id = await ask(peer, "Count", frame(LONG))
    assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(b"%d" % len(LONG))


async def test_questions_that_arrive_in_turns_get_their_own_answers(peer: Peer) -> None:
    messages = [frame(b"%d" % number * 5000) for number in range(8)]
    await narrow(peer, MEBIBYTE)
    streams = [await peer.call("Ask", is_whole=False) for _ in messages]
    for start in range(0, len(messages[0]), 500):
        for stream_id, message in zip(streams, messages, strict=True):
            peer.http2.send_data(stream_id, message[start : start + 500])
        await peer.flush()
    for stream_id in reversed(streams):
        await end(peer, stream_id)
    for stream_id, message in zip(streams, messages, strict=True):
        assert await peer.status(stream_id) == "0"
        assert received(peer, stream_id) == message


async def test_trailers_end_a_question_as_well(peer: Peer) -> None:
    stream_id = await ask(peer, "Ask", frame(b"x"), is_whole=False)
    peer.http2.send_headers(stream_id, [("x-late", "1")], end_stream=True)
    await peer.flush()
    assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(b"x")


async def test_nothing_is_answered_before_the_question_ends(peer: Peer) -> None:
    stream_id = await ask(peer, "Ask", frame(b"x"), is_whole=False)
    assert await peer.status(await ask(peer, "Unary", frame(b""))) == "0"
    assert not received(peer, stream_id)
    await end(peer, stream_id)
    assert await peer.status(stream_id) == "0"


async def test_headers_alone_are_no_question(peer: Peer) -> None:
    stream_id = peer.http2.get_next_available_stream_id()
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", f"/{SERVICE}/Ask")]
    peer.http2.send_headers(stream_id, [*headers, ("content-type", "application/grpc")], end_stream=True)
    await peer.flush()
    assert await peer.status(stream_id) == "3"


@pytest.mark.parametrize("data", [b"", frame(b"short")[:3], frame(b"short")[:-1]], ids=["none", "prefix", "message"])
async def test_a_question_that_stops_short_is_the_callers_mistake(peer: Peer, data: bytes) -> None:
    assert await peer.status(await ask(peer, "Ask", data)) == "3"


@pytest.mark.parametrize("data", [frame(b"2"), frame(b"")[:1], frame(LONG)], ids=["message", "byte", "long"])
async def test_more_than_one_message_is_refused_as_it_comes(peer: Peer, data: bytes) -> None:
    # In one frame and in two; nobody waits for the end, which may be beyond the window.
    for parts in ([frame(b"1") + data], [frame(b"1"), data]):
        stream_id = await peer.call("Ask", is_whole=False)
        for part in parts:
            peer.http2.send_data(stream_id, part[:16_000])
            await peer.flush()
        assert await peer.status(stream_id) == "3"
        assert await reset_code(peer, stream_id) == ErrorCodes.NO_ERROR


@pytest.mark.parametrize(
    ("prefix", "status"), [(b"\x00\xff\xff\xff\xff", "8"), (b"\x01\x00\x00\x00\x02", "12")], ids=["large", "compressed"]
)
async def test_a_question_is_refused_by_its_prefix(peer: Peer, prefix: bytes, status: str) -> None:
    stream_id = await ask(peer, "Ask", prefix, is_whole=False)
    assert await peer.status(stream_id) == status
    assert await reset_code(peer, stream_id) == ErrorCodes.NO_ERROR


async def test_an_answer_waits_for_the_window_and_holds_up_nobody(peer: Peer) -> None:
    await narrow(peer, 1000)
    stream_id = await ask(peer, "AskSize", frame(b"50000"))
    await received_some(peer, stream_id, 1000)
    assert await peer.status(await ask(peer, "Ask", frame(b"small"))) == "0"
    assert len(received(peer, stream_id)) == 1000
    await widen(peer, stream_id)
    assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(bytes(50_000))


async def test_an_answer_waits_for_a_peer_that_does_not_read(peer: Peer) -> None:
    await narrow(peer, 16 * MEBIBYTE)
    stream_id = await ask(peer, "AskSize", frame(b"%d" % (8 * MEBIBYTE)))
    # The socket takes a part of it; the rest waits in the server, which serves others.
    await asyncio.sleep(0.2)
    async with asyncio.timeout(30):
        assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(bytes(8 * MEBIBYTE))


async def test_half_asked_questions_count_as_streams_before_the_settings_are_seen(raw: Peer) -> None:
    # This peer reads nothing yet, so acknowledges nothing.
    raw.http2.initiate_connection()
    streams = [await raw.call("Ask", is_whole=False) for _ in range(LIMITS.max_streams + 1)]
    assert await reset_code(raw, streams[-1]) == ErrorCodes.REFUSED_STREAM
    await end(raw, streams[0])
    assert await raw.status(streams[0]) == "3"


# Each ends a question of LONG in another way.


async def _answered(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "Count", frame(LONG))) == "0"


async def _answered_in_frames(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "Grow", frame(LONG))) == "0"


async def _failed(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "AskFailing", frame(LONG))) == "14"


async def _broken(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "AskBroken", frame(LONG))) == "13"


async def _unreadable(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "AskParsed", frame(LONG))) == "3"


async def _doubled(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "Count", frame(LONG) + b"\x00", is_whole=False)) == "3"


async def _cut_short(peer: Peer) -> None:
    assert await peer.status(await ask(peer, "Count", frame(LONG)[:-1])) == "3"


async def _refused_by_a_prefix(peer: Peer) -> None:
    messages = frame(LONG[:-70_000]) + b"\x01" + bytes(4)
    assert await peer.status(await ask(peer, "Count", messages, is_whole=False)) == "12"


async def _ended_by_trailers(peer: Peer) -> None:
    stream_id = await ask(peer, "Count", frame(LONG), is_whole=False)
    peer.http2.send_headers(stream_id, [("x-late", "1")], end_stream=True)
    await peer.flush()
    assert await peer.status(stream_id) == "0"


async def _reset_half_way(peer: Peer) -> None:
    stream_id = await ask(peer, "Count", frame(LONG)[:200_000], is_whole=False)
    peer.http2.reset_stream(stream_id, ErrorCodes.CANCEL)
    await peer.flush()


async def _reset_after_a_part_of_the_answer(peer: Peer) -> None:
    peer.http2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    stream_id = await ask(peer, "Grow", frame(LONG))
    await received_some(peer, stream_id, 1000)
    peer.http2.reset_stream(stream_id, ErrorCodes.CANCEL)
    await peer.flush()


@pytest.mark.parametrize(
    "ending",
    [
        _answered,
        _answered_in_frames,
        _failed,
        _broken,
        _unreadable,
        _doubled,
        _cut_short,
        _refused_by_a_prefix,
        _ended_by_trailers,
        _reset_half_way,
        _reset_after_a_part_of_the_answer,
    ],
)
async def test_what_a_question_held_is_free_again_and_once(
    peer: Peer, ending: Callable[[Peer], Awaitable[None]]
) -> None:
    await narrow(peer, MEBIBYTE)
    for _ in range(12):
        await ending(peer)
    # Exactly what there was before: so much fits, and not a byte more.
    streams = [await ask(peer, "Count", frame(LONG), is_whole=False) for _ in range(3)]
    room_bytes = LIMITS.max_held_bytes - 3 * len(frame(LONG))
    last = await ask(peer, "Count", frame(LONG)[:room_bytes], is_whole=False)
    peer.http2.ping(b"all seen")
    await peer.flush()
    await peer.until(h2.events.PingAckReceived)
    assert not [event for event in peer.events if isinstance(event, h2.events.StreamReset) and event.stream_id == last]
    await peer.send(last, b"x")
    assert await peer.status(last) == "8"
    for stream_id in streams:
        await end(peer, stream_id)
        assert await peer.status(stream_id) == "0"


async def test_an_answer_that_waits_holds_no_question(peer: Peer) -> None:
    await narrow(peer, 1000)
    waiting = [await ask(peer, "Grow", frame(LONG)) for _ in range(6)]
    for stream_id in waiting:
        await widen(peer, stream_id)
        assert await peer.status(stream_id) == "0"


# The ends of connection and server.


async def test_a_question_goes_on_when_the_peer_opens_no_more(peer: Peer) -> None:
    stream_id = await ask(peer, "Ask", frame(b"last")[:6], is_whole=False)
    peer.writer.write(GOAWAY + b"\x00")
    await peer.send(stream_id, frame(b"last")[6:])
    await end(peer, stream_id)
    assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(b"last")
    await peer.closed()


async def test_an_answer_that_waits_goes_on_when_the_peer_opens_no_more(peer: Peer) -> None:
    await narrow(peer, 1000)
    stream_id = await ask(peer, "AskSize", frame(b"50000"))
    peer.writer.write(GOAWAY + b"\x00")
    await received_some(peer, stream_id, 1000)
    await widen(peer, stream_id)
    assert await peer.status(stream_id) == "0"
    assert received(peer, stream_id) == frame(bytes(50_000))
    await peer.closed()


async def test_a_goaway_that_names_an_error_ends_the_questions(peer: Peer) -> None:
    await narrow(peer, 1000)
    await ask(peer, "Ask", frame(b"half")[:6], is_whole=False)
    await received_some(peer, await ask(peer, "AskSize", frame(b"50000")), 1000)
    peer.writer.write(GOAWAY + b"\x02")
    await peer.closed()


async def test_a_drain_waits_for_a_question_under_way_and_takes_no_new_one(plain: MeshServer, peer: Peer) -> None:
    await narrow(peer, 1000)
    half = await ask(peer, "Ask", frame(b"half")[:6], is_whole=False)
    waiting = await ask(peer, "AskSize", frame(b"50000"))
    await received_some(peer, waiting, 1000)
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(plain.drain(10.0), name="drain")
        await goaway(peer)
        late = await peer.call("Ask")
        assert await reset_code(peer, late) == ErrorCodes.REFUSED_STREAM
        assert not drain.done()
        await peer.send(half, frame(b"half")[6:])
        await end(peer, half)
        assert await peer.status(half) == "0"
        assert not drain.done()
        await widen(peer, waiting)
        assert await peer.status(waiting) == "0"
    assert received(peer, half) == frame(b"half")
    assert received(peer, waiting) == frame(bytes(50_000))
    await peer.closed()


async def test_a_drain_ends_in_time_whatever_is_half_asked(plain: MeshServer, peer: Peer) -> None:
    await narrow(peer, 1000)
    half = await ask(peer, "Ask", frame(b"half")[:6], is_whole=False)
    waiting = await ask(peer, "AskSize", frame(b"50000"))
    await received_some(peer, waiting, 1000)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(plain.drain(0.3), name="drain")
        await goaway(peer)
        code = await reset_code(peer, waiting)
    # Well below what a call has to end (0.3 s) and the peer to say goodbye (1 s), were it not for a noisy machine.
    assert time.monotonic() - began < 3.0
    # No status can follow half an answer.
    assert code == ErrorCodes.CANCEL
    assert await peer.status(half) == "14"
