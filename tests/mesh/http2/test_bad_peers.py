"""Peers that break the protocol or the peace: each ends its own connection, or its own stream, and nobody else's."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    WindowUpdateFrame,
)

from helios.mesh.channel import Dialer
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.wire import frame
from tests.mesh.http2.echo import SERVICE, Echo
from tests.mesh.http2.peer import Peer, plain_server
from tests.mesh.http2.test_contract import unary

LIMITS = Limits(
    max_streams=8,
    max_held_bytes=1 << 20,
    max_unsent_bytes=1 << 20,
    keepalive_seconds=0.4,
    keepalive_timeout_seconds=0.3,
    idle_frames_per_period=500,
)


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def address(echo: Echo, tmp_path: Path) -> AsyncIterator[str]:
    async with plain_server(echo, tmp_path, LIMITS) as server:
        yield server.address
        # Whatever the peer did: others are served.
        async with Dialer(server.address, identity=None, peer="worker") as dialer:
            assert await unary(dialer, "Unary")(b"well", timeout=5) == b"well"
    assert echo.running_count == 0


async def test_a_well_behaved_peer(peer: Peer) -> None:
    assert await peer.status(await peer.call("Unary", b"x")) == "0"


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(100), bytes(64)])
async def test_garbage_instead_of_the_preface_is_closed(raw: Peer, garbage: bytes) -> None:
    raw.writer.write(garbage)
    await raw.closed()


async def test_a_peer_that_says_nothing_is_cut(raw: Peer) -> None:
    await raw.closed(3.0)


async def test_a_peer_that_stops_answering_is_cut_and_its_calls_end(peer: Peer, echo: Echo) -> None:
    await peer.call("Wait")
    # Reads nothing, so answers no ping: half open.
    async with asyncio.timeout(5):
        while not echo.cancelled_at:
            await asyncio.sleep(0.02)


async def test_frames_of_unknown_kinds_are_ignored(peer: Peer) -> None:
    peer.writer.write(b"\x00\x00\x04\xfa\x00\x00\x00\x00\x00what")
    assert await peer.status(await peer.call("Unary")) == "0"


async def test_headers_above_the_limit_end_the_connection(peer: Peer) -> None:
    with pytest.raises((ConnectionError, TimeoutError)):
        await peer.status(await peer.call("Unary", headers={f"x-large-{n}": "a" * 1024 for n in range(140)}))
    await peer.closed()


async def test_headers_without_an_end_are_bounded(peer: Peer) -> None:
    peer.writer.write(HeadersFrame(1, data=b"\x82").serialize())
    for _ in range(400):
        peer.writer.write(ContinuationFrame(1, data=b"\x82" * 1000).serialize())
        await asyncio.sleep(0)
    await peer.closed()


async def test_a_frame_above_the_settled_size_ends_the_connection(peer: Peer) -> None:
    peer.writer.write((1 << 20).to_bytes(3, "big") + b"\x00\x00\x00\x00\x00\x01" + bytes(1 << 20))
    assert await peer.closed() in (None, ErrorCodes.FRAME_SIZE_ERROR)


async def test_data_on_a_stream_that_never_was_ends_the_connection(peer: Peer) -> None:
    peer.writer.write(b"\x00\x00\x01\x00\x00\x00\x00\x00\x05x")
    assert await peer.closed() is not None


async def test_streams_beyond_the_bound_are_refused_unprocessed(peer: Peer) -> None:
    streams = [await peer.call("Wait") for _ in range(LIMITS.max_streams)]
    # This client knows the setting and keeps to it; one that does not is ended.
    frames = peer.http2
    frames.remote_settings = type(frames.remote_settings)(client=False)
    frames.remote_settings.acknowledge()
    await peer.call("Unary")
    await peer.closed()
    assert len(streams) == LIMITS.max_streams


async def test_a_flood_of_resets_is_ended(peer: Peer, echo: Echo) -> None:
    with suppress(ConnectionError):
        for _ in range(LIMITS.idle_frames_per_period * 2):
            stream_id = await peer.call("Wait", is_whole=False)
            peer.http2.reset_stream(stream_id, ErrorCodes.CANCEL)
            await peer.flush()
    await peer.closed()
    assert echo.running_count == 0


async def test_requests_and_resets_in_one_read_leave_nothing_running(peer: Peer, echo: Echo) -> None:
    for _ in range(100):
        stream_id = peer.http2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", f"/{SERVICE}/Wait")]
        peer.http2.send_headers(stream_id, [*headers, ("content-type", "application/grpc")])
        peer.http2.reset_stream(stream_id, ErrorCodes.CANCEL)
    await peer.flush()
    # The handlers' tasks, which count until they have ended, are gone a turn later.
    await asyncio.sleep(0.1)
    assert await peer.status(await peer.call("Unary")) == "0"
    assert echo.running_count == 0


async def test_a_flood_of_pings_is_ended(peer: Peer) -> None:
    with suppress(ConnectionError):
        for _ in range(LIMITS.idle_frames_per_period // 100 * 4):
            await peer.flush(*(PingFrame(0, b"12345678") for _ in range(100)))
    await peer.closed()


async def test_a_reset_of_a_stream_that_never_was_ends_the_connection(peer: Peer) -> None:
    await peer.flush(RstStreamFrame(99, ErrorCodes.CANCEL))
    assert await peer.closed() is not None


async def test_a_stalled_window_holds_its_own_stream_only(peer: Peer, echo: Echo) -> None:
    peer.http2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    await peer.flush()
    await peer.until(h2.events.SettingsAcknowledged)
    stalled = await peer.call("Write", b"1 50000")
    assert await peer.status(await peer.call("Unary", b"small")) == "0"
    await asyncio.sleep(0.1)
    received = [event for event in peer.events if isinstance(event, h2.events.DataReceived)]
    assert sum(len(event.data or b"") for event in received if event.stream_id == stalled) == 1000
    peer.http2.increment_flow_control_window(100_000, stalled)
    peer.http2.increment_flow_control_window(100_000)
    await peer.flush()
    assert await peer.status(stalled) == "0"


async def test_compressed_messages_are_unimplemented(peer: Peer) -> None:
    stream_id = await peer.call("Unary", is_whole=False)
    peer.http2.send_data(stream_id, b"\x01\x00\x00\x00\x01x", end_stream=True)
    await peer.flush()
    assert await peer.status(stream_id) == "12"
    (answer,) = [event for event in peer.events if isinstance(event, h2.events.ResponseReceived)]
    assert dict(answer.headers or ())[b"grpc-accept-encoding"] == b"identity"


async def test_a_length_above_the_limit_is_refused_by_its_prefix(peer: Peer) -> None:
    stream_id = await peer.call("Unary", is_whole=False)
    peer.http2.send_data(stream_id, b"\x00\xff\xff\xff\xff")
    await peer.flush()
    assert await peer.status(stream_id) == "8"
    reset = await peer.until(h2.events.StreamReset, stream_id)
    assert isinstance(reset, h2.events.StreamReset)
    assert reset.error_code == ErrorCodes.NO_ERROR


@pytest.mark.parametrize("promised_bytes", [300_000, 3_000_000])
async def test_what_waits_for_handlers_is_bounded_whole_or_not(peer: Peer, echo: Echo, promised_bytes: int) -> None:
    begun = frame(bytes(promised_bytes))[:300_005]
    streams = [await peer.call("Read", is_whole=False) for _ in range(4)]
    for stream_id in streams:
        await peer.send(stream_id, begun)
    assert await peer.status(streams[3]) == "8"
    # The others go on or are given up, and what they held is free again.
    echo.may_read.set()
    for stream_id in streams[:3]:
        if promised_bytes == 300_000:
            peer.http2.end_stream(stream_id)
            await peer.flush()
            assert await peer.status(stream_id) == "0"
        else:
            peer.http2.reset_stream(stream_id)
    last = await peer.call("Read", is_whole=False)
    await peer.send(last, frame(bytes(900_000)))
    peer.http2.end_stream(last)
    await peer.flush()
    assert await peer.status(last) == "0"


async def test_a_request_that_is_no_grpc_gets_an_http_status(peer: Peer) -> None:
    assert await peer.status(await peer.call("Unary", headers={"content-type": "application/json"})) == "415"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"grpc-timeout": "soon"}, "3"), ({"x-raw-bin": "$$$"}, "3"), ({"grpc-timeout": "0m"}, "4")],
)
async def test_headers_that_make_no_sense_are_the_callers_mistake(
    peer: Peer, headers: dict[str, str], status: str
) -> None:
    assert await peer.status(await peer.call("Wait", headers=headers)) == status


async def test_a_request_without_a_message_is_the_callers_mistake(peer: Peer) -> None:
    stream_id = await peer.call("Unary", is_whole=False)
    peer.http2.end_stream(stream_id)
    await peer.flush()
    assert await peer.status(stream_id) == "3"


async def test_calls_go_on_when_the_peer_opens_no_more(peer: Peer) -> None:
    # GOAWAY of a client that leaves, with a call still running.
    stream_id = await peer.call("Both", is_whole=False)
    peer.writer.write(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(8))
    await peer.writer.drain()
    await asyncio.sleep(0.1)
    peer.http2.send_data(stream_id, frame(b"last"), end_stream=True)
    await peer.flush()
    assert await peer.status(stream_id) == "0"
    await peer.closed()


async def test_what_comes_with_a_goaway_counts(peer: Peer) -> None:
    # One read of the server: answers to what came before must leave, and what comes after must arrive.
    stream_id = await peer.call("Both", is_whole=False)
    peer.http2.ping(b"first...")
    before = peer.http2.data_to_send()
    peer.http2.send_data(stream_id, frame(b"last"), end_stream=True)
    peer.writer.write(before + b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(8) + peer.http2.data_to_send())
    assert await peer.status(stream_id) == "0"
    assert any(isinstance(event, h2.events.PingAckReceived) for event in peer.events)
    await peer.closed()


async def test_a_goaway_that_names_an_error_ends_the_calls(peer: Peer, echo: Echo) -> None:
    await peer.until(h2.events.DataReceived, await peer.call("Wait"))
    peer.writer.write(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(7) + b"\x02")
    await peer.closed()
    assert (len(echo.cancelled_at), echo.running_count) == (1, 0)


async def test_a_silent_peer_that_answers_pings_is_kept(peer: Peer, echo: Echo) -> None:
    stream_id = await peer.call("Wait")
    for _ in range(3):
        # h2 answers while the test reads.
        await peer.until(h2.events.PingReceived)
    assert (echo.cancelled_at, echo.running_count) == ([], 1)
    peer.http2.reset_stream(stream_id, ErrorCodes.CANCEL)
    assert await peer.status(await peer.call("Unary")) == "0"


async def test_a_window_that_overflows_ends_its_own_stream(peer: Peer) -> None:
    stream_id = await peer.call("Wait")
    await peer.flush(WindowUpdateFrame(stream_id, (1 << 31) - 1))
    reset = await peer.until(h2.events.StreamReset, stream_id)
    assert isinstance(reset, h2.events.StreamReset)
    assert reset.error_code == ErrorCodes.FLOW_CONTROL_ERROR


async def test_a_window_of_the_connection_that_overflows_ends_it(peer: Peer) -> None:
    await peer.flush(WindowUpdateFrame(0, (1 << 31) - 1))
    assert await peer.closed() == ErrorCodes.FLOW_CONTROL_ERROR


async def test_trailers_and_data_after_a_reset_harm_nobody(peer: Peer) -> None:
    stream_id = await peer.call("Both", is_whole=False)
    trailers = HeadersFrame(stream_id, data=peer.http2.encoder.encode([("x-late", "1")]))
    trailers.flags |= {"END_HEADERS", "END_STREAM"}
    await peer.flush(RstStreamFrame(stream_id, ErrorCodes.CANCEL), DataFrame(stream_id, b"late"), trailers)
    assert await peer.status(await peer.call("Unary")) == "0"


async def test_data_after_the_end_of_a_stream_harms_nobody_else(peer: Peer, echo: Echo) -> None:
    stream_id = await peer.call("Wait")
    await peer.flush(DataFrame(stream_id, b"late"))
    await peer.until(h2.events.StreamReset, stream_id)
    assert await peer.status(await peer.call("Unary")) == "0"
    assert echo.running_count == 0


async def test_a_peer_that_reads_nothing_is_bounded(address: str) -> None:
    path = address.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plain, path)
        maker = h2.connection.H2Connection()
        maker.initiate_connection()
        hello = maker.data_to_send()
        with pytest.raises((ConnectionError, TimeoutError)):
            await _ping_for_ever(plain, hello)


async def _ping_for_ever(plain: socket.socket, hello: bytes) -> None:
    """Asks for answers that nobody reads, until the server is fed up or stops to read, too."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        await loop.sock_sendall(plain, hello)
        while True:
            await loop.sock_sendall(plain, PingFrame(0, b"12345678").serialize() * 50)
