"""The protocol without a socket: h2 is the peer, what the server was told is the measure."""

from contextlib import suppress
from itertools import pairwise

import hpack
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamReset, TrailersReceived
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest
from helios.mesh.http2.headers import HeaderReader, encode
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.protocol import PREFACE, BrokenError, ErrorCode, RequestOutcome, ServerProtocol
from helios.mesh.http2.wire import Header, RequestHead

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"x"),
    (b":path", b"/s/m"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


class Told:
    """Remembers what it was told; a call for each kind, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def on_request(self, stream_id: int, outcome: RequestOutcome, *, is_whole: bool) -> None:
        """Remembers it."""
        self.calls.append(("request", stream_id, outcome, is_whole))

    def on_data(self, stream_id: int, data: bytes, size: int, *, is_last: bool) -> None:
        """Remembers it."""
        self.calls.append(("data", stream_id, data, size, is_last))

    def on_received(self, size: int) -> None:
        """Remembers it."""
        self.calls.append(("received", size))

    def on_end(self, stream_id: int) -> None:
        """Remembers it."""
        self.calls.append(("end", stream_id))

    def on_reset(self, stream_id: int) -> None:
        """Remembers it."""
        self.calls.append(("reset", stream_id))

    def on_window(self, stream_id: int) -> None:
        """Remembers it."""
        self.calls.append(("window", stream_id))

    def on_idle_frame(self) -> None:
        """Remembers it."""
        self.calls.append(("idle",))

    def on_goaway(self, code: int) -> None:
        """Remembers it."""
        self.calls.append(("goaway", code))

    def of(self, kind: str) -> list[tuple[object, ...]]:
        """Returns what it was told of a kind."""
        return [call[1:] for call in self.calls if call[0] == kind]


class Pair:
    """A server's protocol and h2 as its client."""

    def __init__(self, limits: Limits | None = None, *, is_settled: bool = True) -> None:
        self.told = Told()
        self.server = ServerProtocol(self.told, limits or Limits())
        self.client = H2Connection(
            H2Configuration(header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        self.server.open()
        self.client.initiate_connection()
        if is_settled:
            self.exchange()

    def exchange(self) -> list[object]:
        """Carries bytes both ways until nobody says anything; returns the client's events."""
        events: list[object] = []
        while True:
            sent = self.client.data_to_send()
            if sent:
                self.server.receive(sent)
            answer = b"".join(self.server.outgoing)
            self.server.outgoing.clear()
            if not sent and not answer:
                return events
            events += self.client.receive_data(answer) if answer else []

    def request(self, headers: list[Header] = REQUEST, *, end_stream: bool = False) -> int:
        """Begins a stream."""
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, headers, end_stream=end_stream)
        return stream_id

    def frames(self, *frames: Frame) -> None:
        """Gives the server frames that h2 would not make."""
        self.server.receive(b"".join(frame.serialize() for frame in frames))


def test_a_conversation_with_trailers() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.client.send_data(stream_id, b"question", end_stream=True)
    pair.exchange()
    head = RequestHead("/s/m", (), None)
    assert pair.told.of("request") == [(stream_id, head, False)]
    assert pair.told.of("data") == [(stream_id, b"question", 8, True)]
    assert pair.told.of("end") == [(stream_id,)]
    pair.server.send_headers(stream_id, [(b":status", b"200"), (b"content-type", b"application/grpc")], is_end=False)
    pair.server.put_data(stream_id, pair.server.streams[stream_id], b"answer")
    pair.server.send_headers(stream_id, [(b"grpc-status", b"0")], is_end=True)
    events = pair.exchange()
    received = [
        [(bytes(name), bytes(value)) for name, value in event.headers or ()]
        for event in events
        if isinstance(event, ResponseReceived | TrailersReceived)
    ]
    assert received == [
        [(b":status", b"200"), (b"content-type", b"application/grpc")],
        [(b"grpc-status", b"0")],
    ]
    assert [event.data for event in events if isinstance(event, DataReceived)] == [b"answer"]
    assert not pair.server.streams


TEXT = st.binary(max_size=400)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=20))
def test_what_is_encoded_is_what_is_decoded(headers: list[Header]) -> None:
    assert list(hpack.Decoder(max_header_list_size=1 << 20).decode(encode(headers), raw=True)) == headers


def test_headers_that_exceed_a_frame_continue() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=True)
    pair.exchange()
    details = b"d" * 50_000
    pair.server.send_headers(stream_id, [(b":status", b"200"), (b"grpc-message", details)], is_end=True)
    (event,) = [event for event in pair.exchange() if isinstance(event, ResponseReceived)]
    assert dict(event.headers or ())[b"grpc-message"] == details


@given(st.lists(st.integers(1, 30_000), max_size=12), st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_reads_may_be_cut_anywhere(cuts: list[int], padding: int) -> None:
    def talk(pair: Pair) -> bytes:
        first = pair.request()
        pair.client.send_data(first, b"x" * 300, pad_length=padding or None)
        second = pair.request([*REQUEST, (b"x-long", b"~" * 20_000)], end_stream=True)
        pair.client.send_data(first, b"", end_stream=True)
        pair.client.reset_stream(second)
        pair.client.ping(b"12345678")
        return pair.client.data_to_send()

    whole, cut = Pair(), Pair()
    whole.server.receive(talk(whole))
    sent = talk(cut)
    points = sorted({0, *(point % len(sent) for point in cuts), len(sent)})
    for begin, end in pairwise(points):
        cut.server.receive(sent[begin:end])
    assert cut.told.calls == whole.told.calls
    assert cut.server.outgoing == whole.server.outgoing


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_broken_bytes_break_the_connection_and_nothing_else(data: st.DataObject) -> None:
    pair = Pair(is_settled=data.draw(st.booleans()))
    first = pair.request()
    pair.client.send_data(first, b"x" * 20)
    pair.client.increment_flow_control_window(5, first)
    pair.client.ping(b"12345678")
    sent = bytearray(pair.client.data_to_send())
    for _ in range(data.draw(st.integers(1, 6))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BrokenError):
        pair.server.receive(bytes(sent))
    # Whatever it was: what the server holds belongs to streams that it told of.
    begun = {call[0] for call in pair.told.of("request")}
    assert set(pair.server.streams) <= begun


@pytest.mark.parametrize(
    "headers",
    [
        REQUEST[1:],
        [*REQUEST[:3], *REQUEST[4:]],
        [*REQUEST, (b":path", b"/late")],
        [REQUEST[0], *REQUEST],
        [(b":unknown", b"1"), *REQUEST],
        [*REQUEST, (b"X-Capital", b"1")],
        [*REQUEST, (b"connection", b"close")],
        [*REQUEST, (b"te", b"gzip")],
    ],
)
def test_what_is_no_request_is_reset_and_the_connection_goes_on(headers: list[Header]) -> None:
    pair = Pair()
    bad = pair.request(headers)
    (event,) = [event for event in pair.exchange() if isinstance(event, StreamReset)]
    assert (event.stream_id, event.error_code) == (bad, ErrorCode.PROTOCOL_ERROR)
    good = pair.request()
    pair.exchange()
    assert [call[0] for call in pair.told.of("request")] == [good]


def test_a_mistake_in_metadata_is_told_as_the_callers() -> None:
    pair = Pair()
    pair.request([*REQUEST, (b"grpc-timeout", b"soon")])
    pair.exchange()
    ((_, outcome, _),) = pair.told.of("request")
    assert isinstance(outcome, InvalidRequest)


def test_padding_is_paid_for_and_not_delivered() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.client.send_data(stream_id, b"x" * 10, pad_length=20)
    pair.exchange()
    assert pair.told.of("data") == [(stream_id, b"x" * 10, 31, False)]
    assert pair.told.of("received") == [(31,)]


def test_an_empty_frame_that_ends_a_stream_is_not_for_nothing() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.exchange()
    idle = len(pair.told.of("idle"))
    pair.client.send_data(stream_id, b"")
    pair.exchange()
    assert len(pair.told.of("idle")) == idle + 1
    pair.client.send_data(stream_id, b"", end_stream=True)
    pair.exchange()
    assert len(pair.told.of("idle")) == idle + 1


@pytest.mark.parametrize("between", [DataFrame(1, b"x"), HeadersFrame(3, b"", flags=["END_HEADERS"])])
def test_headers_are_not_broken_off(between: Frame) -> None:
    pair = Pair()
    with pytest.raises(BrokenError, match="broken off"):
        pair.frames(HeadersFrame(1, b"\x83"), between, ContinuationFrame(1, b"", flags=["END_HEADERS"]))


def test_more_than_the_streams_window_resets_the_stream() -> None:
    pair = Pair(Limits(stream_window_bytes=1000))
    stream_id = pair.request()
    pair.exchange()
    pair.frames(DataFrame(stream_id, bytes(1001)))
    assert pair.told.of("reset") == [(stream_id,)]
    assert pair.told.of("data") == []


def test_more_than_the_connections_window_breaks_it() -> None:
    pair = Pair(Limits(stream_window_bytes=1 << 20, connection_window_bytes=70_000))
    stream_id = pair.request()
    pair.exchange()
    frames = [DataFrame(stream_id, bytes(16_384)) for _ in range(5)]
    with pytest.raises(BrokenError) as caught:
        pair.frames(*frames)
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


def test_a_smaller_first_window_counts_for_streams_that_run() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.exchange()
    pair.server.put_data(stream_id, pair.server.streams[stream_id], bytes(1000))
    pair.frames(SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 400}))
    assert pair.server.streams[stream_id].send_bytes == -600


class TestWithoutATable:
    """A peer that was told to do without a dynamic table."""

    def test_a_request_that_was_seen_is_not_decoded_again(self) -> None:
        pair = Pair(Limits(header_table_bytes=0))
        for headers in (REQUEST, [*REQUEST, (b"x-other", b"1")], REQUEST, [*REQUEST, (b"x-other", b"2")], REQUEST):
            pair.request(headers)
            pair.exchange()
        heads = [call[1] for call in pair.told.of("request")]
        assert [len(head.metadata) for head in heads if isinstance(head, RequestHead)] == [0, 1, 0, 1, 0]
        # The first block has the new size of the table in front, and is not kept.
        assert heads[2] is heads[4]

    def test_until_it_was_told_it_may_have_one(self) -> None:
        pair = Pair(Limits(header_table_bytes=0), is_settled=False)
        for number in range(3):
            pair.request([*REQUEST, (b"x-number", b"%d" % number)])
        pair.exchange()
        for number in range(3, 6):
            pair.request([*REQUEST, (b"x-number", b"%d" % number)])
            pair.exchange()
        heads = [call[1] for call in pair.told.of("request")]
        assert [head.metadata[0].value for head in heads if isinstance(head, RequestHead)] == list("012345")

    def test_one_that_keeps_its_table_is_ended(self) -> None:
        pair = Pair(Limits(header_table_bytes=0))
        block = hpack.Encoder().encode(REQUEST)
        with pytest.raises(BrokenError) as caught:
            pair.frames(HeadersFrame(1, block, flags=["END_HEADERS"]))
        assert caught.value.code is ErrorCode.COMPRESSION_ERROR

    def test_what_is_known_is_bounded(self) -> None:
        reader = HeaderReader(max_header_bytes=1 << 16)
        reader.bound_table(0)
        encoder = hpack.Encoder()
        encoder.header_table_size = 0
        for number in range(1000):
            reader.read_request(encoder.encode([*REQUEST, (b"x-number", b"%d" % number)]))
        assert 0 < len(reader._known) <= 64


def test_the_preface_may_come_in_pieces_and_must_be_right() -> None:
    server = ServerProtocol(Told(), Limits())
    for byte in PREFACE:
        server.receive(bytes((byte,)))
    with pytest.raises(BrokenError):
        ServerProtocol(Told(), Limits()).receive(b"PRX")
