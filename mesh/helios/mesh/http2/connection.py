"""One HTTP/2 connection: h2's events become calls, and the connection lives only as long as its peer is well.

h2 knows the protocol; this class gives it bytes, tells calls what happened, and keeps the bounds that h2 has no opinion
on. An error of the protocol ends the connection with GOAWAY; an error of one call ends that call.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, cast

import structlog
from h2 import events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from helios.mesh.errors import HeliosError, QuotaExceeded, Unavailable
from helios.mesh.http2.call import Call
from helios.mesh.http2.limits import IdleFrames, Limits
from helios.mesh.http2.protocol import goaway, server_side
from helios.mesh.http2.sender import Sender
from helios.mesh.http2.tls import AuthContext, auth_context
from helios.mesh.http2.wire import Header, NotGrpcError, RequestHead, read_head

log = structlog.get_logger()

_PING: Final = b"helios\x00\x00"


class Host(Protocol):
    """What a connection needs of its server."""

    is_draining: bool

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
        self._loop = asyncio.get_running_loop()
        self._h2 = server_side(limits)
        self.sender = Sender(self._h2, self._loop, max_unsent_bytes=limits.max_unsent_bytes)
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Call] = {}
        self._running_count = 0
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
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(self._limits.keepalive_seconds, self._look_after)
        self._h2.initiate_connection()
        self._h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: self._limits.max_streams})
        self._h2.increment_flow_control_window(
            self._limits.connection_window_bytes - self._h2.inbound_flow_control_window
        )
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
        self._heard_at = self._loop.time()
        try:
            for event in self._h2.receive_data(data):
                handle = _HANDLERS.get(event.__class__)
                if handle is not None:
                    handle(self, event)
        except ProtocolError as error:
            # h2 has put GOAWAY into its buffer.
            log.info("http2 connection ended: the peer broke the protocol", peer=self.peer, error=str(error))
            self._close()
            return
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
        # The peer may have reset the stream in the bytes that are being read.
        with suppress(ProtocolError):
            self._h2.send_headers(stream_id, headers, end_stream=is_end)
        self.sender.flush_soon()

    def consumed(self, stream_id: int, size_bytes: int, *, is_open: bool) -> None:
        """Gives bytes back to the stream's window, in halves of it."""
        if not is_open:
            self._owed_by_stream.pop(stream_id, None)
            return
        owed = self._owed_by_stream.get(stream_id, 0) + size_bytes
        if owed >= self._limits.stream_window_bytes // 2:
            with suppress(ProtocolError):
                self._h2.increment_flow_control_window(owed, stream_id)
            self.sender.flush_soon()
            owed = 0
        self._owed_by_stream[stream_id] = owed

    def released(self, size_bytes: int) -> None:
        """Frees room for what the connection may hold."""
        self._held_bytes -= size_bytes

    def call_over(self, call: Call, reset: ErrorCodes | None) -> None:
        """Forgets an ended call, and resets its stream where it is not closed on both sides."""
        if self._calls.pop(call.stream_id, None) is None or self._is_ending:
            return
        if reset is not None:
            self._reset(call.stream_id, reset)
        self._close_if_done()

    # What the server says.

    def drain(self) -> None:
        """Lets running calls end, takes no new ones, then closes."""
        if not self._is_ending:
            self.sender.flush(goaway(self._h2.highest_inbound_stream_id))
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

    # Events of h2.

    def _on_request(self, event: Any) -> None:
        stream_id = event.stream_id
        if self._host.is_draining or self._is_ending or self._running_count >= self._limits.max_streams:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        try:
            head, problem = read_head(event.headers), None
        except NotGrpcError as error:
            self.send_headers(stream_id, [(b":status", b"%d" % error.http_status)], is_end=True)
            if event.stream_ended is None:
                self._reset(stream_id, ErrorCodes.NO_ERROR)
            return
        except HeliosError as error:
            head, problem = RequestHead("", (), None), error
        call = self._calls[stream_id] = Call(self, stream_id, head, self._limits.max_message_bytes)
        if problem is not None:
            call.is_half_closed = event.stream_ended is not None
            call.refuse(problem)
            return
        self._running_count += 1
        call.task = self._host.start_call(call)
        call.task.add_done_callback(self._task_done)

    def _on_data(self, event: Any) -> None:
        size, data = event.flow_controlled_length, event.data
        # The connection's window comes back at once: a handler that does not read stalls its own stream only.
        self._owed_bytes += size
        if self._owed_bytes >= self._limits.connection_window_bytes // 2:
            self._h2.increment_flow_control_window(self._owed_bytes)
            self._owed_bytes = 0
        call = self._calls.get(event.stream_id)
        if not data:
            self._count_idle_frame()
        if call is None:
            return
        if size > len(data):
            self.consumed(event.stream_id, size - len(data), is_open=event.stream_ended is None)
        self._held_bytes += len(data)
        call.receive(data)
        if self._held_bytes > self._limits.max_held_bytes and not call.is_over:
            call.refuse(QuotaExceeded("too much is waiting on this connection; try again", retry_after_seconds=1.0))

    def _on_half_close(self, event: Any) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.half_close()

    def _on_reset(self, event: Any) -> None:
        call = self._calls.get(event.stream_id)
        if call is not None:
            call.cut()
        self._count_idle_frame()

    def _on_window(self, event: Any) -> None:
        self.sender.resume(event.stream_id or 0)

    def _on_settings(self, _: Any) -> None:
        self.sender.resume()
        self._count_idle_frame()

    def _on_idle_frame(self, _: Any) -> None:
        self._count_idle_frame()

    def _on_goaway(self, event: Any) -> None:
        # The peer opens no more streams, but those that run go on.
        self._is_leaving = True
        if event.error_code == ErrorCodes.NO_ERROR:
            self._close_if_done()
        else:
            self._close()

    # The rest.

    def _task_done(self, _: asyncio.Task[None]) -> None:
        self._running_count -= 1

    def _count_idle_frame(self) -> None:
        if not self._idle_frames.add(self._loop.time()) and not self._is_ending:
            log.warning("http2 connection ended: too many frames for nothing", peer=self.peer)
            self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._close()

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with suppress(ProtocolError):
            self._h2.reset_stream(stream_id, code)
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
        limits, silent_seconds = self._limits, self._loop.time() - self._heard_at
        if silent_seconds >= limits.keepalive_seconds + limits.keepalive_timeout_seconds:
            log.info("http2 connection ended: the peer is silent", peer=self.peer, seconds=round(silent_seconds))
            self.abort()
            return
        delay = limits.keepalive_seconds - silent_seconds
        if delay <= 0:
            delay += limits.keepalive_timeout_seconds
            if not self._is_ending:
                self._h2.ping(_PING)
                self.sender.flush_soon()
        self._timer = self._loop.call_later(delay, self._look_after)


_HANDLERS: Final[dict[type[Any], Callable[[Connection, Any], None]]] = {
    events.RequestReceived: Connection._on_request,
    events.DataReceived: Connection._on_data,
    events.StreamEnded: Connection._on_half_close,
    events.StreamReset: Connection._on_reset,
    events.WindowUpdated: Connection._on_window,
    events.RemoteSettingsChanged: Connection._on_settings,
    events.PingReceived: Connection._on_idle_frame,
    events.PriorityUpdated: Connection._on_idle_frame,
    events.UnknownFrameReceived: Connection._on_idle_frame,
    events.ConnectionTerminated: Connection._on_goaway,
}


def _peer_name(address: Any) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
    return f"unix:{address or ''}"
