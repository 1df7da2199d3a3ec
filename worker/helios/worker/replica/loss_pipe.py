"""The way from the engine's own process to its replica for what its KV cache lost: a socket pair of messages.

The writer is a step of the engine and never waits: where the replica does not read, losses are dropped, and the next
message that has room says that the cache is to be taken for empty.
"""

import json
import socket
from collections.abc import Sequence
from typing import Final, Self

from helios.worker.replica.kv_losses import Loss, LossLog

# A message is one datagram; more than this has no room in a socket's buffer.
_MOST_LOSSES: Final = 512
_READ_BYTES: Final = 1 << 17


class LossWriter:
    """The engine's end, which a fork inherits."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._has_dropped = False

    def begin(self) -> None:
        """Says that losses will be told."""
        self._send([])

    def tell(self, losses: Sequence[Loss]) -> None:
        """Tells losses, in the order in which they happened."""
        for begin in range(0, len(losses), _MOST_LOSSES):
            part = losses[begin : begin + _MOST_LOSSES]
            self._send([[loss.request_id, loss.kept_tokens, loss.prompt_tokens] for loss in part])

    def tell_emptied(self) -> None:
        """Tells that nothing is left in the cache."""
        self._has_dropped = True
        self._send([])

    def _send(self, losses: list[list[str | int]]) -> None:
        try:
            self._end.send(json.dumps([self._has_dropped, losses]).encode())
            self._has_dropped = False
        except OSError:
            # Full, or a replica that is ending.
            self._has_dropped = True


class LossPipe:
    """Both ends. The replica reads when ``fileno`` is readable."""

    def __init__(self) -> None:
        self._reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reading.setblocking(False)
        writing.setblocking(False)
        self._writing = writing
        self.writer = LossWriter(writing)

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._reading.fileno()

    def read(self, log: LossLog) -> None:
        """Takes what was told into a log; does not wait."""
        while True:
            try:
                data = self._reading.recv(_READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                return
            is_emptied, losses = json.loads(data)
            if is_emptied:
                log.emptied()
            log.note([Loss(*loss) for loss in losses])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reading.close()
        self._writing.close()
