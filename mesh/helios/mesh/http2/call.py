"""One stream, as the servicer context that handlers of grpc.aio know.

What a handler wrote and the status of its call go out in order; the first of status, cancel of the peer, deadline and
loss of the connection ends the call, and nothing after it counts.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn, Protocol, Self

import grpc
import grpc.aio

from helios.mesh import status
from helios.mesh.errors import HeliosError, Unavailable
from helios.mesh.http2.protocol import ErrorCode
from helios.mesh.http2.sender import Outbox, Sender
from helios.mesh.http2.wire import (
    CONTENT_TYPE,
    Header,
    MessageReader,
    Metadatum,
    RequestHead,
    frame,
    metadata_headers,
    status_headers,
    too_large,
)

Trailers = Iterable[tuple[str, str | bytes]]

# Writes that need no waiting between two looks at other tasks: a handler with much to say must not keep the loop.
_WRITES_PER_TURN: Final = 64
RESPONSE_HEADERS: Final[list[Header]] = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]
# What messages may be encoded with is said where one was refused, not in each answer: Envoy would have to take it off
# again for REST callers. Source: https://github.com/grpc/grpc/blob/master/doc/compression.md
REFUSAL_HEADERS: Final[list[Header]] = [*RESPONSE_HEADERS, (b"grpc-accept-encoding", b"identity")]


class Link(Protocol):
    """What a call needs of its connection."""

    sender: Sender
    loop: asyncio.AbstractEventLoop
    peer: str
    auth: Any

    def send_headers(self, stream_id: int, headers: list[Header], *, is_end: bool) -> None:
        """Sends headers or trailers."""
        ...

    def consumed(self, stream_id: int, size_bytes: int, *, is_open: bool) -> None:
        """Gives bytes back to the stream's window (``is_open``)."""
        ...

    def released(self, size_bytes: int) -> None:
        """Frees room for what the connection may hold."""
        ...

    def call_over(self, call: Outbox, reset: ErrorCode | None) -> None:
        """Forgets an ended call, and resets its stream where it is not closed on both sides."""
        ...


class Call:
    """A running call. One task, the handler's, reads and writes; the connection tells it what arrives."""

    def __init__(self, link: Link, stream_id: int, head: RequestHead, max_message_bytes: int) -> None:
        self.stream_id = stream_id
        self.rest = bytearray()
        self.head = head
        self.task: asyncio.Task[None] | None = None
        self.is_over = False
        self.is_half_closed = False
        self._link = link
        self._loop = link.loop
        self._max_message_bytes = max_message_bytes
        self._reader = MessageReader(max_message_bytes)
        self._messages: deque[bytes] = deque()
        self._owed_bytes = 0
        self._held_bytes = 0
        self._waiting_reader: asyncio.Future[None] | None = None
        self._waiting_writer: asyncio.Future[None] | None = None
        self._is_begun = False
        self._is_cancelled = False
        self._burst = 0
        self._code = grpc.StatusCode.OK
        self._details = ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._callbacks: list[Callable[[Any], None]] = []
        self._deserialize: Callable[[bytes], Any] | None = None
        self._serialize: Callable[[Any], bytes] | None = None
        self._expires_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_seconds is not None:
            self._expires_at = self._loop.time() + head.timeout_seconds
            self._timer = self._loop.call_at(self._expires_at, self._expire)

    def bind(self, deserialize: Callable[[bytes], Any] | None, serialize: Callable[[Any], bytes] | None) -> None:
        """Sets how messages of the method are read and written; None leaves bytes."""
        self._deserialize, self._serialize = deserialize, serialize

    # What the connection says.

    def receive(self, data: bytes) -> None:
        """Takes in bytes of the request."""
        self._owed_bytes += len(data)
        self._held_bytes += len(data)
        try:
            self._messages.extend(self._reader.feed(data))
        except HeliosError as error:
            self.refuse(error)
            return
        if self._messages:
            _wake(self._waiting_reader)
        else:
            # A message that is not complete needs the window; complete ones wait for their reader.
            self._consume()

    def half_close(self) -> None:
        """The peer sends nothing more."""
        self.is_half_closed = True
        _wake(self._waiting_reader)

    def cut(self) -> None:
        """The stream is gone: the handler is cancelled at once."""
        if not self.is_over:
            self._is_cancelled = True
            self._end(None)
        if self.task is not None:
            self.task.cancel()

    def refuse(self, error: HeliosError) -> None:
        """Ends the call with an error and cancels its handler."""
        self.finish(*status.ending(error))
        if self.task is not None:
            self.task.cancel()

    def rest_sent(self) -> None:
        """What did not fit has left."""
        _wake(self._waiting_writer)

    def finish(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers | None = None) -> None:
        """Ends the call with a status; does nothing where it has ended. Trailers only where nothing was sent."""
        if self.is_over:
            return
        self._code, self._details = code, details
        trailing = self._trailing if trailing_metadata is None else trailing_metadata
        if self.rest:
            # A part of a message is out; no status can follow it.
            self._end(ErrorCode.CANCEL)
            return
        headers = [] if self._is_begun else list(REFUSAL_HEADERS)
        headers += status_headers(code.value[0], details)
        headers += metadata_headers(trailing)
        self._link.send_headers(self.stream_id, headers, is_end=True)
        # The answer is whole, and the peer may stop sending.
        self._end(None if self.is_half_closed else ErrorCode.NO_ERROR)

    # What handlers call.

    async def read(self) -> Any:
        """Returns the next message of the request, or ``grpc.aio.EOF``. Cancel-safe."""
        while not self._messages:
            if self.is_half_closed or self.is_over:
                return grpc.aio.EOF
            self._waiting_reader = self._loop.create_future()
            await self._waiting_reader
        message = self._messages.popleft()
        if not self._messages:
            self._consume()
            self._release(self._reader.pending_bytes)
        return message if self._deserialize is None else self._deserialize(message)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The request as the iterator that handlers of streams get."""
        message = await self.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message

    async def write(self, message: Any) -> None:
        """Sends a message; returns when the peer's window has taken all of it.

        Raises:
            QuotaExceeded: The message is above the server's limit.
            Unavailable: The call has ended.
        """
        data = message if self._serialize is None else self._serialize(message)
        if len(data) > self._max_message_bytes:
            raise too_large(len(data), self._max_message_bytes)
        if self.is_over:
            raise Unavailable("the call has ended: nobody reads what is written")
        if not self._is_begun:
            self._begin(())
        if not self._link.sender.send(self, frame(data)):
            await self._wait_sent()
            return
        self._burst += 1
        if self._burst >= _WRITES_PER_TURN:
            self._burst = 0
            await asyncio.sleep(0)

    async def send_initial_metadata(self, initial_metadata: Trailers) -> None:
        """Sends the response's headers before the first message does. Raises Unavailable where they were sent."""
        if self._is_begun or self.is_over:
            raise Unavailable("initial metadata was sent before")
        self._begin(initial_metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers | None = None
    ) -> NoReturn:
        """Ends the call with an error and leaves the handler."""
        if code is grpc.StatusCode.OK:
            raise ValueError("a call can't be aborted with OK")
        self.finish(code, details, trailing_metadata or None)
        raise grpc.aio.AbortError("the call was aborted")

    def invocation_metadata(self) -> tuple[Metadatum, ...]:
        """Returns the request's metadata, without what belongs to HTTP/2 and gRPC."""
        return self.head.metadata

    def auth_context(self) -> Any:
        """Returns what the peer's certificate says, in grpcio's form."""
        return self._link.auth

    def peer(self) -> str:
        """Returns the peer's address, in grpcio's form."""
        return self._link.peer

    def set_trailing_metadata(self, trailing_metadata: Trailers) -> None:
        """Sets what goes out with the status."""
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Trailers:
        """Returns what was set."""
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status that the call ends with when the handler returns."""
        self._code = code

    def code(self) -> grpc.StatusCode:
        """Returns the status, OK until another one is set."""
        return self._code

    def set_details(self, details: str) -> None:
        """Sets the message of the status."""
        self._details = details

    def details(self) -> str:
        """Returns the message of the status."""
        return self._details

    def cancelled(self) -> bool:
        """Whether the peer, the deadline or the loss of the connection ended the call."""
        return self._is_cancelled

    def done(self) -> bool:
        """Whether the call has ended."""
        return self.is_over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Calls back, with the context, when the call ends."""
        self._callbacks.append(callback)

    def time_remaining(self) -> float | None:
        """Returns the seconds until the deadline, None without one."""
        return None if self._expires_at is None else max(0.0, self._expires_at - self._loop.time())

    def _begin(self, metadata: Trailers) -> None:
        self._is_begun = True
        self._link.send_headers(self.stream_id, RESPONSE_HEADERS + metadata_headers(metadata), is_end=False)

    async def _wait_sent(self) -> None:
        self._burst = 0
        while self.rest and not self.is_over:
            if self._waiting_writer is None or self._waiting_writer.done():
                self._waiting_writer = self._loop.create_future()
            # Several tasks of one handler may wait here: the cancel of one must not be that of all.
            await asyncio.shield(self._waiting_writer)

    def _consume(self) -> None:
        size, self._owed_bytes = self._owed_bytes, 0
        self._link.consumed(self.stream_id, size, is_open=not (self.is_half_closed or self.is_over))

    def _release(self, kept_bytes: int) -> None:
        size, self._held_bytes = self._held_bytes - kept_bytes, kept_bytes
        self._link.released(size)

    def _expire(self) -> None:
        self._is_cancelled = not self.is_over
        self.finish(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline of the call has passed")
        if self.task is not None:
            self.task.cancel()

    def _end(self, reset: ErrorCode | None) -> None:
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._messages.clear()
        self._consume()
        self._release(0)
        self._link.sender.forget(self)
        self._link.call_over(self, reset)
        _wake(self._waiting_reader)
        _wake(self._waiting_writer)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
