"""A call that is answered at once: one message in, one out, by a function that waits for nothing.

A handler of grpc.aio runs in a task, and task, futures and the context that it may ask cost a short call more than its
work. A question has none: the answer is made in the turn of the loop in which the last of its bytes arrived.
"""

from typing import Any, Final

from helios.mesh import status
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.http2.call import REFUSAL_HEADERS, RESPONSE_HEADERS, Link
from helios.mesh.http2.protocol import ErrorCode
from helios.mesh.http2.wire import Header, MessageReader, frame, metadata_headers, status_headers, too_large
from helios.mesh.interceptors import Answer

_OK: Final = status_headers(0, "")


class Question:
    """One stream. It is what `Call` is to its connection, without a task."""

    def __init__(self, link: Link, stream_id: int, answer: Answer, max_message_bytes: int) -> None:
        self.stream_id = stream_id
        self.rest = bytearray()
        self.is_over = False
        self._link = link
        self._answer = answer
        self._max_message_bytes = max_message_bytes
        self._reader = MessageReader(max_message_bytes)
        self._messages: list[bytes] = []
        self._held_bytes = 0
        self._is_half_closed = False

    def receive(self, data: bytes) -> None:
        """Takes in bytes of the message."""
        self._held_bytes += len(data)
        try:
            self._messages += self._reader.feed(data)
        except HeliosError as error:
            self.refuse(error)
            return
        if len(self._messages) > 1 or (self._messages and self._reader.pending_bytes):
            # At once: a window that nobody gives back would keep its rest, and the call, waiting.
            self.refuse(InvalidRequest("the request has more than the one message that it should have"))
            return
        if not self._messages:
            # The rest of a long one needs the window.
            self._link.consumed(self.stream_id, len(data), is_open=True)

    def half_close(self) -> None:
        """The message is whole: answers it."""
        self._is_half_closed = True
        if self.is_over:
            return
        if not self._messages:
            self.refuse(InvalidRequest("the request has no message"))
            return
        try:
            data = self._answered()
        except HeliosError as error:
            self.refuse(error)
            return
        self._link.send_headers(self.stream_id, RESPONSE_HEADERS, is_end=False)
        # The answer may wait long for the peer's window; the question need not be kept for that.
        self._release()
        if self._link.sender.send(self, data):
            self.rest_sent()

    def rest_sent(self) -> None:
        """The peer's window has taken all of the answer. Does nothing where the call has ended: an answer of several
        frames for which there is room is told of by `Sender.send`, too.
        """
        if not self.is_over:
            self._end(_OK)

    def refuse(self, error: HeliosError) -> None:
        """Ends with an error; does nothing where it has ended."""
        if self.is_over:
            return
        code, details, trailing = status.ending(error)
        refusal = [*REFUSAL_HEADERS, *status_headers(code.value[0], details), *metadata_headers(trailing)]
        if self.rest:
            # A part of the answer is out; no status can follow it.
            self._over(ErrorCode.CANCEL)
            return
        self._end(refusal)

    def cut(self) -> None:
        """The stream is gone."""
        if not self.is_over:
            self._over(None)

    def auth_context(self) -> Any:
        """Returns what the peer's certificate says, in grpcio's form."""
        return self._link.auth

    def _answered(self) -> bytes:
        """Returns the answer as it goes out. Raises what the function does, and QuotaExceeded above the limit."""
        data = self._answer(self._messages[0], self)
        if len(data) > self._max_message_bytes:
            raise too_large(len(data), self._max_message_bytes)
        return frame(data)

    def _release(self) -> None:
        self._messages.clear()
        size, self._held_bytes = self._held_bytes, 0
        self._link.released(size)

    def _end(self, headers: list[Header]) -> None:
        self._link.send_headers(self.stream_id, headers, is_end=True)
        self._over(None if self._is_half_closed else ErrorCode.NO_ERROR)

    def _over(self, reset: ErrorCode | None) -> None:
        self.is_over = True
        self._release()
        self._link.consumed(self.stream_id, 0, is_open=False)
        if self.rest:
            self._link.sender.forget(self)
        self._link.call_over(self, reset)
