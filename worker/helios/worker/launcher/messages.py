"""The language of the control socket: length-prefixed JSON between a supervisor and its launcher.

    supervisor → launcher   fork {number, spec, requested_ns}
    launcher → supervisor   ready {import_seconds, pid}       once, when everything is imported
                            forked {number, pid, start_ticks} in the order of the requests
                            refused {number, message}
                            exited {pid, start_ticks, status}

JSON over a socketpair and no gRPC: the launcher must not start a thread, and gRPC starts several. Messages are a few
hundred bytes and a handful a minute.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from helios.mesh.errors import Corrupted

_HEADER: Final = struct.Struct("!I")
# A spec is below 4 KiB; anything near this is not a message of ours.
_MESSAGE_LIMIT_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Fork:
    """Asks for a replica. ``requested_ns`` is CLOCK_MONOTONIC, which all processes of a machine share."""

    number: int
    spec: dict[str, Any]
    requested_ns: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is imported; forks are quick from now on. ``pid`` is the sender's."""

    import_seconds: float
    pid: int


@dataclass(frozen=True, slots=True)
class Forked:
    """A replica's front process exists. pid and start_ticks together name one process for good."""

    number: int
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No process was made."""

    number: int
    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A front process is gone and was reaped. ``status`` is the exit code, or minus the signal that killed it."""

    pid: int
    start_ticks: int
    status: int


Message = Fork | Ready | Forked | Refused | Exited
_KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__.lower(): kind for kind in (Fork, Ready, Forked, Refused, Exited)
}


def encode(message: Message) -> bytes:
    """Returns the bytes of one message, its length first."""
    body = json.dumps({"kind": type(message).__name__.lower(), **asdict(message)}).encode()
    return _HEADER.pack(len(body)) + body


class Decoder:
    """Turns a stream of bytes, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yields the messages that ``data`` completes. Raises Corrupted for what is not a message."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > _MESSAGE_LIMIT_BYTES:
                raise Corrupted("the control socket carries something that is not a message")
            if len(self._buffer) < _HEADER.size + length:
                return
            body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
            del self._buffer[: _HEADER.size + length]
            yield _decode(body)


def _decode(body: bytes) -> Message:
    try:
        fields = json.loads(body)
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupted(f"the control socket carries a broken message: {error}") from error
