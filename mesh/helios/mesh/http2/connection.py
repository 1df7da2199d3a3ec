"""One HTTP/2 connection: streams become calls, and the connection lives only as long as its peer is well.

`ServerProtocol` knows HTTP/2; this class gives it bytes, tells calls what happened, and keeps the bounds that HTTP/2
has no opinion on. An error of the protocol ends the connection with GOAWAY; an error of one call ends that call.
"""

import asyncio
from typing import Any, Final, Protocol, cast

import structlog

from helios.mesh.errors import HeliosError, QuotaExceeded, Unavailable
from helios.mesh.http2.call import Call
from helios.mesh.http2.limits import IdleFrames, Limits
from helios.mesh.http2.protocol import BrokenError, ErrorCode, RequestOutcome, ServerProtocol
from helios.mesh.http2.question import Question
from helios.mesh.http2.sender import Outbox, Sender
from helios.mesh.http2.tls import AuthContext, auth_context
from helios.mesh.http2.wire import Header, NotGrpcError, RequestHead
from helios.mesh.interceptors import Answer

log = structlog.get_logger()

_PING: Final = b"helios\x00\x00"
# Answers that are made at once leave two at a time and not all of a read together: else the peer, which asks for many
# at once, waits until the last one is made, and then this side for the peer; it cost a fifth of the requests a second.
_ANSWERS_PER_WRITE: Final = 2


class Host(Protocol):
    """What a connection needs of its server."""

    is_draining: bool
    answers: dict[str, Answer]
    """Of the methods that are answered at once, by path."""

    def opened(self, connection: "Connection") -> None:
        """A connection stands."""
        ...

    def start_call(self, call: Call) -> asyncio.Task[None]:
        """Runs a call in a task of its own."""
        ...

    def closed(self, connection: "Connection") -> None:
        """A connection is gone."""
        ...


class Connection(asyncio.Protocol):
    """The protocol of one accepted socket."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self.peer = ""
        self.auth: AuthContext = {}
        self._host = host
        self._limits = limits
        self.loop = asyncio.get_running_loop()
        self._protocol = ServerProtocol(self, limits)
        self.sender = Sender(self._protocol, self.loop, max_unsent_bytes=limits.max_unsent_bytes)
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Call | Question] = {}
        self._running_count = 0
        self._answered_count = 0
        self._question_count = 0
        self._held_bytes = 0
        self._owed_bytes = 0
        self._owed_by_stream: dict[int, int] = {}
        self._idle_frames = IdleFrames(limits.idle_frames_per_period, limits.keepalive_seconds)
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_leaving = False
        self._is_ending = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is accepted, its TLS handshake done."""
        self._transport = cast("asyncio.Transport", transport)
        self.auth = auth_context(transport.get_extra_info("ssl_object"))
        self.peer = _peer_name(transport.get_extra_info("peername"))
        self._heard_at = self.loop.time()
        self._timer = self.loop.call_later(self._limits.keepalive_seconds, self._look_after)
        self._protocol.open()
        self.sender.open(self._transport)
        self._host.opened(self)
        if self._host.is_draining:
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone: every handler is cancelled."""
        self._transport = None
        self._is_ending = True
        self.sender.close()
        if self._timer is not None:
            self._timer.cancel()
        for call in tuple(self._calls.values()):
            call.cut()
        self._host.closed(self)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._heard_at = self.loop.time()
        try:
            self._protocol.receive(data)
        except BrokenError as error:
            log.warning("http2 connection ended: the peer broke the protocol", peer=self.peer, error=str(error))
            self._protocol.goaway(error.code)
            self._close()
            return
        if self._protocol.outgoing:
            self.sender.flush_soon()

    def eof_received(self) -> None:
        """The peer sends nothing more; a connection that goes one way is of no use and is closed."""

    def pause_writing(self) -> None:
        """The peer reads too slowly."""
        self.sender.pause_writing()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.sender.resume_writing()

    # What calls say (Link).

    def send_headers(self, stream_id: int, headers: list[Header], *, is_end: bool) -> None:
        """Sends headers or trailers."""
        self._protocol.send_headers(stream_id, headers, is_end=is_end)
        self.sender.flush_soon()

    def consumed(self, stream_id: int, size_bytes: int, *, is_open: bool) -> None:
        """Gives bytes back to the stream's window, in halves of it."""
        if not is_open:
            self._owed_by_stream.pop(stream_id, None)
            return
        owed = self._owed_by_stream.get(stream_id, 0) + size_bytes
        if owed >= self._limits.stream_window_bytes // 2:
            self._protocol.widen(stream_id, owed)
            self.sender.flush_soon()
            owed = 0
        self._owed_by_stream[stream_id] = owed

    def released(self, size_bytes: int) -> None:
        """Frees room for what the connection may hold."""
        self._held_bytes -= size_bytes

    def call_over(self, call: Outbox, reset: ErrorCode | None) -> None:
        """Forgets an ended call, and resets its stream where it is not closed on both sides."""
        ended = self._calls.pop(call.stream_id, None)
        if isinstance(ended, Question):
            self._question_count -= 1
        if ended is None or self._is_ending:
            return
        if reset is not None:
            self._reset(call.stream_id, reset)
        self._close_if_done()

    # What the server says.

    def drain(self) -> None:
        """Lets running calls end, takes no new ones, then closes."""
        if not self._is_ending:
            self._protocol.goaway(ErrorCode.NO_ERROR)
            self.sender.flush()
            self._close_if_done()

    def end(self) -> None:
        """Ends what still runs, and closes."""
        for call in tuple(self._calls.values()):
            call.refuse(Unavailable("the server is shutting down; try again", retry_after_seconds=1.0))
        self._close()

    def abort(self) -> None:
        """Closes without a word."""
        if self._transport is not None:
            self._transport.abort()

    # What the protocol says (User).

    def on_request(self, stream_id: int, outcome: RequestOutcome, *, is_whole: bool) -> None:
        """A stream begins."""
        # Questions have no task, but a peer that has not seen the settings may leave any number of them half asked.
        count = self._running_count + self._question_count
        if self._host.is_draining or self._is_ending or count >= self._limits.max_streams:
            self._reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        if isinstance(outcome, NotGrpcError):
            self.send_headers(stream_id, [(b":status", b"%d" % outcome.http_status)], is_end=True)
            if not is_whole:
                self._reset(stream_id, ErrorCode.NO_ERROR)
            return
        if isinstance(outcome, RequestHead) and (answer := self._host.answers.get(outcome.path)) is not None:
            self._question_count += 1
            self._calls[stream_id] = Question(self, stream_id, answer, self._limits.max_message_bytes)
            return
        head = RequestHead("", (), None) if isinstance(outcome, HeliosError) else outcome
        call = self._calls[stream_id] = Call(self, stream_id, head, self._limits.max_message_bytes)
        if isinstance(outcome, HeliosError):
            call.is_half_closed = is_whole
            call.refuse(outcome)
            return
        self._running_count += 1
        call.task = self._host.start_call(call)
        call.task.add_done_callback(self._task_done)

    def on_received(self, size: int) -> None:
        """The connection's window comes back at once: a handler that does not read stalls its own stream only."""
        self._owed_bytes += size
        if self._owed_bytes >= self._limits.connection_window_bytes // 2:
            self._protocol.widen(0, self._owed_bytes)
            self._owed_bytes = 0

    def on_data(self, stream_id: int, data: bytes, size: int, *, is_last: bool) -> None:
        """A part of a request is here."""
        call = self._calls.get(stream_id)
        if call is None:
            return
        if size > len(data):
            self.consumed(stream_id, size - len(data), is_open=not is_last)
        self._held_bytes += len(data)
        call.receive(data)
        if self._held_bytes > self._limits.max_held_bytes and not call.is_over:
            call.refuse(QuotaExceeded("too much is waiting on this connection; try again", retry_after_seconds=1.0))

    def on_end(self, stream_id: int) -> None:
        """A request is whole."""
        call = self._calls.get(stream_id)
        if call is None:
            return
        call.half_close()
        if isinstance(call, Question):
            self._answered_count += 1
            if self._answered_count % _ANSWERS_PER_WRITE == 0:
                self.sender.flush()

    def on_reset(self, stream_id: int) -> None:
        """A stream is gone."""
        call = self._calls.get(stream_id)
        if call is not None:
            call.cut()

    def on_window(self, stream_id: int) -> None:
        """The peer takes more."""
        self.sender.resume(stream_id)

    def on_idle_frame(self) -> None:
        """The peer sent something for nothing. Raises BrokenError when it was once too often."""
        if not self._idle_frames.add(self.loop.time()):
            raise BrokenError(ErrorCode.ENHANCE_YOUR_CALM, "too many frames for nothing")

    def on_goaway(self, code: int) -> None:
        """The peer opens no more streams, but those that run go on, unless it names an error."""
        self._is_leaving = True
        if code == ErrorCode.NO_ERROR:
            self._close_if_done()
        else:
            self._close()

    # The rest.

    def _task_done(self, _: asyncio.Task[None]) -> None:
        self._running_count -= 1

    def _reset(self, stream_id: int, code: ErrorCode) -> None:
        self._protocol.reset(stream_id, code)
        self.sender.flush_soon()

    def _close_if_done(self) -> None:
        if not self._calls and (self._host.is_draining or self._is_leaving):
            self._close()

    def _close(self) -> None:
        self._is_ending = True
        self.sender.flush()
        if self._transport is not None:
            self._transport.close()
            self.sender.close()
        for call in tuple(self._calls.values()):
            call.cut()

    def _look_after(self) -> None:
        """Asks a silent peer for a sign of life, and cuts one that gave none."""
        limits, silent_seconds = self._limits, self.loop.time() - self._heard_at
        if silent_seconds >= limits.keepalive_seconds + limits.keepalive_timeout_seconds:
            log.info("http2 connection ended: the peer is silent", peer=self.peer, seconds=round(silent_seconds))
            self.abort()
            return
        delay = limits.keepalive_seconds - silent_seconds
        if delay <= 0:
            delay += limits.keepalive_timeout_seconds
            if not self._is_ending:
                self._protocol.ping(_PING)
                self.sender.flush_soon()
        self._timer = self.loop.call_later(delay, self._look_after)


def _peer_name(address: Any) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
    return f"unix:{address or ''}"
