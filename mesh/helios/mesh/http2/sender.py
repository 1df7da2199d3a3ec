"""What leaves a connection: frames of all streams, within the peer's windows, in one write a turn of the event loop.

A message that fits goes straight into what the turn will write. What does not fit waits at its stream, where the
handler waits for it too: a stream holds one message beyond its peer's window, no more.

Headers, resets and all other frames are h2's. Frames of data are made here: that a stream is open and that both windows
have room is known already, and h2's five layers to find out are a third of what a message costs. The windows themselves
are h2's, which moves them when the peer says so.
"""

import asyncio
import struct
from typing import Final, Protocol

from h2.connection import H2Connection
from h2.stream import H2Stream

# Beyond this a turn's output is written before the turn ends, so that the transport can say that its peer is slow.
_FLUSH_BYTES: Final = 64 << 10
# Peers allow frames of up to 16 MiB; one would be sixteen times what may wait for a slow peer.
_FRAME_BYTES: Final = 64 << 10
_DATA_HEAD: Final = struct.Struct(">HBBBI")


class Outbox(Protocol):
    """A stream, as far as sending goes."""

    stream_id: int
    rest: bytearray
    """What could not be sent yet."""

    def rest_sent(self) -> None:
        """Is called when ``rest`` is empty again."""
        ...


class Sender:
    """Owns the way out of one connection."""

    def __init__(self, connection: H2Connection, loop: asyncio.AbstractEventLoop, *, max_unsent_bytes: int) -> None:
        self._h2 = connection
        self._loop = loop
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        self._is_due = False
        self._is_paused = False
        self._queued_bytes = 0
        self._turn: list[bytes] = []
        self._blocked: dict[int, Outbox] = {}

    def open(self, transport: asyncio.Transport) -> None:
        """Begins to write to a transport."""
        self._transport = transport
        self.flush()

    def close(self) -> None:
        """Writes nothing more."""
        self._transport = None
        self._blocked.clear()

    def send(self, outbox: Outbox, data: bytes) -> bool:
        """Sends a framed message of a stream; returns False when some of it has to wait in ``rest``."""
        if not outbox.rest and not self._is_paused:
            stream, size = self._h2.streams[outbox.stream_id], len(data)
            if size <= min(
                stream.outbound_flow_control_window, self._h2.outbound_flow_control_window, self._frame_bytes
            ):
                self._put(stream, outbox.stream_id, data)
                return True
        outbox.rest += data
        self._blocked[outbox.stream_id] = outbox
        self.resume(outbox.stream_id)
        return not outbox.rest

    def forget(self, outbox: Outbox) -> None:
        """Drops what a stream has not sent."""
        self._blocked.pop(outbox.stream_id, None)
        outbox.rest.clear()

    def resume(self, stream_id: int = 0) -> None:
        """Sends what fits by now: of one stream, or of all of them in turns (0)."""
        if stream_id:
            blocked = self._blocked.get(stream_id)
            while blocked is not None and self._send_frame(blocked):
                pass
            return
        is_moving = True
        while is_moving:
            # One frame of each, so that a large message does not keep the others waiting.
            is_moving = any([self._send_frame(outbox) for outbox in tuple(self._blocked.values())])  # noqa: C419

    def pause_writing(self) -> None:
        """The peer reads too slowly: messages wait from now on."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._is_paused = False
        self.resume()

    def flush_soon(self) -> None:
        """Writes at the end of this turn, together with what others have to say by then."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self.flush)

    def flush(self, extra: bytes = b"") -> None:
        """Writes now. ``extra`` are frames that h2 does not make."""
        self._is_due = False
        self._queued_bytes = 0
        if self._transport is None:
            return
        turn, self._turn = self._turn, []
        data = b"".join((*turn, self._h2.data_to_send(), extra))
        if data:
            self._transport.write(data)
            if self._is_paused and self._transport.get_write_buffer_size() > self._max_unsent_bytes:
                self._transport.abort()

    @property
    def _frame_bytes(self) -> int:
        return min(self._h2.max_outbound_frame_size, _FRAME_BYTES)

    def _send_frame(self, outbox: Outbox) -> bool:
        """Sends one frame of what waits; returns whether there may be more to send now."""
        stream = self._h2.streams.get(outbox.stream_id)
        # A stream that is closed was reset in the bytes that are being read: its call hears of it next.
        if self._is_paused or outbox.stream_id not in self._blocked or stream is None or stream.closed:
            return False
        window = min(stream.outbound_flow_control_window, self._h2.outbound_flow_control_window)
        size = min(window, self._frame_bytes, len(outbox.rest))
        if size <= 0:
            return False
        self._put(stream, outbox.stream_id, bytes(memoryview(outbox.rest)[:size]))
        del outbox.rest[:size]
        if outbox.rest:
            return True
        del self._blocked[outbox.stream_id]
        outbox.rest_sent()
        return False

    def _put(self, stream: H2Stream, stream_id: int, data: bytes) -> None:
        """Adds a frame of data behind what h2 has made so far; the caller has looked at the windows."""
        size = len(data)
        stream.outbound_flow_control_window -= size
        self._h2.outbound_flow_control_window -= size
        if made := self._h2.data_to_send():
            self._turn.append(made)
        # Source: RFC 9113, 4.1 and 6.1: 24 bits of length, type 0, no flags, the stream.
        self._turn += (_DATA_HEAD.pack(size >> 8, size & 0xFF, 0, 0, stream_id), data)
        self._queued_bytes += size
        if self._queued_bytes >= _FLUSH_BYTES:
            self.flush()
        elif not self._is_due:
            self.flush_soon()
