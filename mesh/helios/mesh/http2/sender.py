"""What leaves a connection: frames of all streams, within the peer's windows, in one write a turn of the event loop.

A message that fits goes straight into what the turn will write. What does not fit waits at its stream, where the
handler waits for it too: a stream holds one message beyond its peer's window, no more.
"""

import asyncio
from typing import Final, Protocol

from helios.mesh.http2.protocol import HEAD_BYTES, ServerProtocol, Stream

# Beyond this a turn's output is written before the turn ends, so that the transport can say that its peer is slow.
_FLUSH_BYTES: Final = 64 << 10
# Peers allow frames of up to 16 MiB; one would be sixteen times what may wait for a slow peer.
_FRAME_BYTES: Final = 64 << 10


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

    def __init__(self, protocol: ServerProtocol, loop: asyncio.AbstractEventLoop, *, max_unsent_bytes: int) -> None:
        self._protocol = protocol
        self._loop = loop
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        self._is_due = False
        self._is_paused = False
        self._queued_bytes = 0
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
            stream = self._protocol.streams[outbox.stream_id]
            if len(data) <= min(stream.send_bytes, self._protocol.send_bytes, self._frame_bytes):
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

    def flush(self) -> None:
        """Writes now."""
        self._is_due = False
        self._queued_bytes = 0
        if self._transport is None:
            return
        outgoing = self._protocol.outgoing
        if outgoing:
            self._transport.write(b"".join(outgoing))
            outgoing.clear()
            if self._is_paused and self._transport.get_write_buffer_size() > self._max_unsent_bytes:
                self._transport.abort()

    @property
    def _frame_bytes(self) -> int:
        return min(self._protocol.max_frame_bytes, _FRAME_BYTES)

    def _send_frame(self, outbox: Outbox) -> bool:
        """Sends one frame of what waits; returns whether there may be more to send now."""
        stream = self._protocol.streams.get(outbox.stream_id)
        if self._is_paused or outbox.stream_id not in self._blocked or stream is None:
            return False
        size = min(stream.send_bytes, self._protocol.send_bytes, self._frame_bytes, len(outbox.rest))
        if size <= 0:
            return False
        self._put(stream, outbox.stream_id, bytes(memoryview(outbox.rest)[:size]))
        del outbox.rest[:size]
        if outbox.rest:
            return True
        del self._blocked[outbox.stream_id]
        outbox.rest_sent()
        return False

    def _put(self, stream: Stream, stream_id: int, data: bytes) -> None:
        """Adds a frame of data; the caller has looked at the windows."""
        self._protocol.put_data(stream_id, stream, data)
        self._queued_bytes += len(data) + HEAD_BYTES
        if self._queued_bytes >= _FLUSH_BYTES:
            self.flush()
        elif not self._is_due:
            self.flush_soon()
