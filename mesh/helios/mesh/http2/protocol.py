"""The server's side of one HTTP/2 connection (RFC 9113), without I/O: bytes in, calls of its user and bytes out.

Only what gRPC needs: no push, no priorities, no upgrade. A mistake of the peer in one stream resets that stream; one in
the connection raises, and the connection is over. A GOAWAY, sent or received, ends nothing that runs.
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, Protocol

import hpack

from helios.mesh.errors import InvalidRequest
from helios.mesh.http2.headers import DEFAULT_TABLE_BYTES, NO_TABLE, HeaderReader, encode
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.wire import Header, MalformedError, NotGrpcError, RequestHead

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD: Final = struct.Struct(">HBBBI")
HEAD_BYTES: Final = 9
_FRAME_BYTES: Final = 16_384
_LARGEST_FRAME_BYTES: Final = (1 << 24) - 1
_LARGEST_WINDOW_BYTES: Final = (1 << 31) - 1
_WINDOW_BYTES: Final = 65_535
_ID: Final = (1 << 31) - 1

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM: Final = 0x1
_ACK: Final = 0x1
_END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_WITH_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5

_HEADER_TABLE_SIZE: Final = 1
_ENABLE_PUSH: Final = 2
_MAX_CONCURRENT_STREAMS: Final = 3
_INITIAL_WINDOW_SIZE: Final = 4
_MAX_FRAME_SIZE: Final = 5
_MAX_HEADER_LIST_SIZE: Final = 6
_SETTING: Final = struct.Struct(">HI")

# What a request's headers turned out to be: a head, or why there is none.
RequestOutcome = RequestHead | InvalidRequest | NotGrpcError


class ErrorCode(IntEnum):
    """Why a stream or a connection ended. Source: RFC 9113, 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class BrokenError(Exception):
    """The peer broke the protocol, and the connection with it; ``code`` is for its GOAWAY."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class User(Protocol):
    """What is told of a connection. Streams are known by number, those that are over are not mentioned again."""

    def on_request(self, stream_id: int, outcome: RequestOutcome, *, is_whole: bool) -> None:
        """A stream begins; ``is_whole``: nothing follows, and `on_end` comes next."""
        ...

    def on_data(self, stream_id: int, data: bytes, size: int, *, is_last: bool) -> None:
        """Data of a stream that goes on or, with ``is_last``, ends; ``size`` is what its window paid."""
        ...

    def on_received(self, size: int) -> None:
        """So much was paid from the connection's window, also for streams that are over."""
        ...

    def on_end(self, stream_id: int) -> None:
        """The peer sends nothing more on this stream."""
        ...

    def on_reset(self, stream_id: int) -> None:
        """A stream is over, by the peer's wish or its mistake."""
        ...

    def on_window(self, stream_id: int) -> None:
        """There is more room to send: on a stream, or on all (0)."""
        ...

    def on_idle_frame(self) -> None:
        """A frame that carries nothing."""
        ...

    def on_goaway(self, code: int) -> None:
        """The peer opens no more streams; with another code than 0 it has given up those that run."""
        ...


class Stream:
    """One stream that is not over on both sides."""

    __slots__ = ("is_half_closed", "receive_bytes", "send_bytes")

    def __init__(self, send_bytes: int, receive_bytes: int) -> None:
        self.send_bytes = send_bytes
        """How much the peer takes, as it stands; below zero after the peer has made its windows smaller."""
        self.receive_bytes = receive_bytes
        self.is_half_closed = False
        """The peer sends nothing more."""


class ServerProtocol:
    """One accepted connection. What it has to say gathers in ``outgoing``, in order."""

    def __init__(self, user: User, limits: Limits) -> None:
        self.outgoing: list[bytes] = []
        self.streams: dict[int, Stream] = {}
        self.send_bytes = _WINDOW_BYTES
        self.max_frame_bytes = _FRAME_BYTES
        self.highest_id = 0
        self._user = user
        self._limits = limits
        self._receive_bytes = limits.connection_window_bytes
        self._first_send_bytes = _WINDOW_BYTES
        self._headers = HeaderReader(max_header_bytes=limits.max_header_bytes)
        self._rest = b""
        self._is_greeted = False
        self._is_settled = False
        self._is_first_block = True
        # A block whose end has not come: its stream, the flags of its first frame, what there is of it.
        self._open_block: tuple[int, int, bytearray] | None = None

    # What the server says.

    def open(self) -> None:
        """Says what the peer may do."""
        limits = self._limits
        settings = [
            (_MAX_CONCURRENT_STREAMS, limits.max_streams),
            (_INITIAL_WINDOW_SIZE, limits.stream_window_bytes),
            (_MAX_HEADER_LIST_SIZE, limits.max_header_bytes),
            (_HEADER_TABLE_SIZE, limits.header_table_bytes),
        ]
        self._put(_SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self.widen(0, limits.connection_window_bytes - _WINDOW_BYTES)
        # A peer that has not seen these yet is within them.
        self._receive_bytes = limits.connection_window_bytes

    def send_headers(self, stream_id: int, headers: list[Header], *, is_end: bool) -> None:
        """Sends headers or, where they were sent, trailers; does nothing on a stream that is over."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        block = encode(headers)
        if self._is_first_block:
            self._is_first_block = False
            block = NO_TABLE + block
        kind, flags = _HEADERS, _END_STREAM if is_end else 0
        while len(block) > _FRAME_BYTES:
            self._put(kind, flags, stream_id, block[:_FRAME_BYTES])
            kind, flags, block = _CONTINUATION, 0, block[_FRAME_BYTES:]
        self._put(kind, flags | _END_HEADERS, stream_id, block)
        if is_end and stream.is_half_closed:
            del self.streams[stream_id]

    def put_data(self, stream_id: int, stream: Stream, data: bytes) -> None:
        """Sends a frame of data; the caller has looked at both windows and the size of frames."""
        size = len(data)
        stream.send_bytes -= size
        self.send_bytes -= size
        self.outgoing += (FRAME_HEAD.pack(size >> 8, size & 0xFF, _DATA, 0, stream_id), data)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Ends a stream; does nothing where it is over."""
        if self.streams.pop(stream_id, None) is not None:
            self._put(_RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))

    def widen(self, stream_id: int, size: int) -> None:
        """Gives bytes back to a stream's window, or the connection's (0)."""
        if stream_id:
            stream = self.streams.get(stream_id)
            if stream is None or stream.is_half_closed:
                return
            stream.receive_bytes += size
        else:
            self._receive_bytes += size
        self._put(_WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big"))

    def ping(self, data: bytes) -> None:
        """Asks for a sign of life; ``data`` has 8 bytes."""
        self._put(_PING, 0, 0, data)

    def goaway(self, code: ErrorCode) -> None:
        """Says that streams after the last one are not taken."""
        self._put(_GOAWAY, 0, 0, struct.pack(">II", self.highest_id, code))

    # What the peer says.

    def receive(self, data: bytes) -> None:
        """Takes in bytes. Raises BrokenError; frames before the broken one have been told of."""
        buffer = self._rest + data if self._rest else data
        at = 0
        if not self._is_greeted:
            if buffer[: len(PREFACE)] != PREFACE[: len(buffer)]:
                raise BrokenError(ErrorCode.PROTOCOL_ERROR, "the peer does not begin as HTTP/2 does")
            if len(buffer) < len(PREFACE):
                self._rest = buffer
                return
            self._is_greeted, at = True, len(PREFACE)
        end = len(buffer)
        while end - at >= HEAD_BYTES:
            high, low, kind, flags, stream_id = FRAME_HEAD.unpack_from(buffer, at)
            size = high << 8 | low
            if size > _FRAME_BYTES:
                raise BrokenError(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {size} bytes is above the limit")
            begin, at = at + HEAD_BYTES, at + HEAD_BYTES + size
            if at > end:
                at = begin - HEAD_BYTES
                break
            if self._open_block is not None and kind != _CONTINUATION:
                raise BrokenError(ErrorCode.PROTOCOL_ERROR, "headers were broken off")
            if kind < len(_FRAMES):
                _FRAMES[kind](self, flags, stream_id & _ID, buffer[begin:at])
            else:
                self._user.on_idle_frame()
        self._rest = buffer[at:]

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_bytes -= size
        if self._receive_bytes < 0:
            raise BrokenError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        stream = self._known(stream_id)
        self._user.on_received(size)
        if flags & _PADDED:
            payload = _unpadded(payload)
        if not payload and not flags & _END_STREAM:
            self._user.on_idle_frame()
        if stream is None:
            return
        stream.receive_bytes -= size
        if stream.is_half_closed or stream.receive_bytes < 0:
            code = ErrorCode.STREAM_CLOSED if stream.is_half_closed else ErrorCode.FLOW_CONTROL_ERROR
            self._fail(stream_id, code)
            return
        is_last = stream.is_half_closed = bool(flags & _END_STREAM)
        self._user.on_data(stream_id, payload, size, is_last=is_last)
        if is_last:
            self._end(stream_id)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _WITH_PRIORITY:
            if len(payload) < _PRIORITY_BYTES:
                raise BrokenError(ErrorCode.FRAME_SIZE_ERROR, "headers without the priority that they announce")
            payload = payload[_PRIORITY_BYTES:]
        if flags & _END_HEADERS:
            self._on_block(flags, stream_id, payload)
        else:
            self._open_block = (stream_id, flags, bytearray(payload))

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._open_block is None or self._open_block[0] != stream_id:
            raise BrokenError(ErrorCode.PROTOCOL_ERROR, "headers continue that never began")
        _, first_flags, block = self._open_block
        block += payload
        self._user.on_idle_frame()
        if len(block) > self._limits.max_header_bytes:
            raise BrokenError(ErrorCode.ENHANCE_YOUR_CALM, "headers are above the limit")
        if flags & _END_HEADERS:
            self._open_block = None
            self._on_block(first_flags, stream_id, bytes(block))

    def _on_block(self, flags: int, stream_id: int, block: bytes) -> None:
        try:
            if stream_id > self.highest_id and stream_id & 1:
                self._begin(flags, stream_id, block)
                return
            stream = self._known(stream_id)
            # Also of streams that are over: the table changes with every block.
            self._headers.read(block)
        except hpack.OversizedHeaderListError as error:
            raise BrokenError(ErrorCode.ENHANCE_YOUR_CALM, "headers are above the limit") from error
        except hpack.HPACKError as error:
            raise BrokenError(ErrorCode.COMPRESSION_ERROR, f"headers can't be read: {error}") from error
        if stream is None:
            self._user.on_idle_frame()
        elif stream.is_half_closed or not flags & _END_STREAM:
            self._fail(stream_id, ErrorCode.STREAM_CLOSED if stream.is_half_closed else ErrorCode.PROTOCOL_ERROR)
        else:
            self._end(stream_id)

    def _begin(self, flags: int, stream_id: int, block: bytes) -> None:
        self.highest_id = stream_id
        if self._is_settled and len(self.streams) >= self._limits.max_streams:
            raise BrokenError(ErrorCode.PROTOCOL_ERROR, "more streams than were settled")
        outcome: RequestOutcome | None
        try:
            outcome = self._headers.read_request(block)
        except MalformedError:
            outcome = None
        except (InvalidRequest, NotGrpcError) as error:
            outcome = error
        stream = self.streams[stream_id] = Stream(self._first_send_bytes, self._limits.stream_window_bytes)
        if outcome is None:
            self.reset(stream_id, ErrorCode.PROTOCOL_ERROR)
            self._user.on_idle_frame()
            return
        is_whole = stream.is_half_closed = bool(flags & _END_STREAM)
        self._user.on_request(stream_id, outcome, is_whole=is_whole)
        if is_whole:
            self._end(stream_id)

    def _on_priority(self, _: int, stream_id: int, payload: bytes) -> None:
        if not stream_id or len(payload) != _PRIORITY_BYTES:
            raise BrokenError(ErrorCode.PROTOCOL_ERROR, "a priority that can't be read")
        self._user.on_idle_frame()

    def _on_rst_stream(self, _: int, stream_id: int, payload: bytes) -> None:
        _check_size(payload, 4)
        stream = self._known(stream_id)
        self._user.on_idle_frame()
        if stream is not None:
            del self.streams[stream_id]
            self._user.on_reset(stream_id)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        _check_connection(stream_id)
        if flags & _ACK:
            _check_size(payload, 0)
            if not self._is_settled:
                self._is_settled = True
                if self._limits.header_table_bytes != DEFAULT_TABLE_BYTES:
                    self._headers.bound_table(self._limits.header_table_bytes)
            return
        if len(payload) % _SETTING.size:
            raise BrokenError(ErrorCode.FRAME_SIZE_ERROR, "settings that can't be read")
        for key, value in _SETTING.iter_unpack(payload):
            self._set(key, value)
        self._put(_SETTINGS, _ACK, 0, b"")
        self._user.on_idle_frame()
        self._user.on_window(0)

    def _set(self, key: int, value: int) -> None:
        if key == _ENABLE_PUSH and value > 1:
            raise BrokenError(ErrorCode.PROTOCOL_ERROR, "a switch that is neither on nor off")
        if key == _MAX_FRAME_SIZE:
            if not _FRAME_BYTES <= value <= _LARGEST_FRAME_BYTES:
                raise BrokenError(ErrorCode.PROTOCOL_ERROR, "a size of frames that is not allowed")
            self.max_frame_bytes = value
        if key == _INITIAL_WINDOW_SIZE:
            if value > _LARGEST_WINDOW_BYTES:
                raise BrokenError(ErrorCode.FLOW_CONTROL_ERROR, "a window above the largest")
            grown, self._first_send_bytes = value - self._first_send_bytes, value
            for stream in self.streams.values():
                stream.send_bytes += grown
                if stream.send_bytes > _LARGEST_WINDOW_BYTES:
                    raise BrokenError(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window grew above the largest")

    def _on_push_promise(self, _: int, __: int, ___: bytes) -> None:
        raise BrokenError(ErrorCode.PROTOCOL_ERROR, "clients can't push")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        _check_connection(stream_id)
        _check_size(payload, 8)
        if not flags & _ACK:
            self._put(_PING, _ACK, 0, payload)
            self._user.on_idle_frame()

    def _on_goaway(self, _: int, stream_id: int, payload: bytes) -> None:
        _check_connection(stream_id)
        if len(payload) < 8:
            raise BrokenError(ErrorCode.FRAME_SIZE_ERROR, "a GOAWAY that can't be read")
        self._user.on_goaway(int.from_bytes(payload[4:8], "big"))

    def _on_window_update(self, _: int, stream_id: int, payload: bytes) -> None:
        _check_size(payload, 4)
        size = int.from_bytes(payload, "big") & _ID
        if not stream_id:
            self.send_bytes += size
            if not size or self.send_bytes > _LARGEST_WINDOW_BYTES:
                raise BrokenError(_window_code(size), "the connection's window can't grow so")
        else:
            stream = self._known(stream_id)
            if stream is None:
                return
            stream.send_bytes += size
            if not size or stream.send_bytes > _LARGEST_WINDOW_BYTES:
                self._fail(stream_id, _window_code(size))
                return
        self._user.on_window(stream_id)

    # The rest.

    def _known(self, stream_id: int) -> Stream | None:
        """Returns a stream; None where it is over. Raises BrokenError where it never was."""
        stream = self.streams.get(stream_id)
        if stream is None and (stream_id > self.highest_id or not stream_id & 1):
            raise BrokenError(ErrorCode.PROTOCOL_ERROR, "a frame of a stream that never was")
        return stream

    def _end(self, stream_id: int) -> None:
        # What was told before may have ended it.
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.is_half_closed = True
            self._user.on_end(stream_id)

    def _fail(self, stream_id: int, code: ErrorCode) -> None:
        self.reset(stream_id, code)
        self._user.on_reset(stream_id)

    def _put(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self.outgoing.append(FRAME_HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload)


_FRAMES: Final[tuple[Callable[[ServerProtocol, int, int, bytes], None], ...]] = (
    ServerProtocol._on_data,
    ServerProtocol._on_headers,
    ServerProtocol._on_priority,
    ServerProtocol._on_rst_stream,
    ServerProtocol._on_settings,
    ServerProtocol._on_push_promise,
    ServerProtocol._on_ping,
    ServerProtocol._on_goaway,
    ServerProtocol._on_window_update,
    ServerProtocol._on_continuation,
)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise BrokenError(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def _window_code(size: int) -> ErrorCode:
    return ErrorCode.FLOW_CONTROL_ERROR if size else ErrorCode.PROTOCOL_ERROR


def _check_connection(stream_id: int) -> None:
    if stream_id:
        raise BrokenError(ErrorCode.PROTOCOL_ERROR, "a frame of the connection on a stream")


def _check_size(payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise BrokenError(ErrorCode.FRAME_SIZE_ERROR, "a frame of a size that its kind has not")
