"""gRPC's own layer on HTTP/2, without I/O: length-prefixed messages, metadata, timeouts, status headers.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

import base64
import binascii
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import quote

from helios.mesh.errors import InvalidRequest, QuotaExceeded, Unsupported

Header = tuple[bytes, bytes]

CONTENT_TYPE: Final = b"application/grpc"
PREFIX_BYTES: Final = 5
_PREFIX: Final = struct.Struct(">BI")
_UNIT_SECONDS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
# Everything that is printable and not the escape itself stays readable. Source: the grammar of Status-Message.
_SAFE: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
# Source: RFC 9113, 8.2.2.
_ONE_HOP: Final = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
# Headers of the call, not metadata of the application.
_RESERVED: Final = frozenset({b"te", b"content-type", b"host", b"content-length"})


class Metadatum(NamedTuple):
    """One entry of metadata; grpcio's have these two names, and interceptors use them."""

    key: str
    value: str | bytes


class MalformedError(Exception):
    """The headers are no request."""


class NotGrpcError(Exception):
    """The request is HTTP/2 but no gRPC; ``http_status`` is the answer."""

    def __init__(self, http_status: int) -> None:
        super().__init__(f"HTTP {http_status}")
        self.http_status = http_status


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the headers of a request say."""

    path: str
    metadata: tuple[Metadatum, ...]
    timeout_seconds: float | None


def read_head(headers: Iterable[Header]) -> RequestHead:
    """Reads a request's headers.

    Raises:
        MalformedError: No request of HTTP/2 has them: a pseudo-header that is missing, unknown, there twice or late, a
            name in capitals, a header of one hop.
        NotGrpcError: Another method than POST, or another content type.
        InvalidRequest: A timeout or a binary value that can't be read.
    """
    pseudo: dict[bytes, bytes] = {}
    content_type = b""
    timeout = ""
    metadata: list[Header] = []
    is_late = False
    for name, value in headers:
        if name[:1] == b":":
            if is_late or name in pseudo or name not in _PSEUDO:
                raise MalformedError
            pseudo[name] = value
            continue
        is_late = True
        if name == b"content-type":
            content_type = value
        elif name == b"grpc-timeout":
            timeout = value.decode("latin-1")
        elif name in _ONE_HOP or name != name.lower() or (name == b"te" and value != b"trailers"):
            raise MalformedError
        elif name not in _RESERVED and name[:5] != b"grpc-":
            metadata.append((name, value))
    if not pseudo.get(b":path") or b":scheme" not in pseudo or b":method" not in pseudo:
        raise MalformedError
    if pseudo[b":method"] != b"POST":
        raise NotGrpcError(405)
    if content_type[:16] != CONTENT_TYPE:
        raise NotGrpcError(415)
    return RequestHead(
        pseudo[b":path"].decode("latin-1"),
        tuple(entry for name, value in metadata for entry in _read_metadatum(name, value)),
        parse_timeout(timeout) if timeout else None,
    )


def parse_timeout(text: str) -> float:
    """Returns the seconds of a ``grpc-timeout``. Raises InvalidRequest."""
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise InvalidRequest("grpc-timeout is not of the form <number><unit>", metadata={"value": text})
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def metadata_headers(metadata: Iterable[tuple[str, str | bytes]]) -> list[Header]:
    """Returns metadata as headers; binary values, whose names end in ``-bin``, travel as base64."""
    headers: list[Header] = []
    for name, value in metadata:
        raw = value.encode() if isinstance(value, str) else value
        headers.append((name.encode(), base64.b64encode(raw).rstrip(b"=") if name.endswith("-bin") else raw))
    return headers


def status_headers(code: int, details: str) -> list[Header]:
    """Returns ``grpc-status`` and, where there is one, the percent-encoded ``grpc-message``."""
    headers = [(b"grpc-status", b"%d" % code)]
    if details:
        headers.append((b"grpc-message", quote(details, safe=_SAFE).encode("ascii")))
    return headers


def frame(message: bytes) -> bytes:
    """Returns a message with its prefix."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Cuts the bytes of one stream into messages. Holds at most one message that is not complete."""

    __slots__ = ("_buffer", "_limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """How much of a message is waiting for its rest."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Sequence[bytes]:
        """Takes in bytes; returns the messages that are complete now.

        Raises:
            Unsupported: A compressed message.
            QuotaExceeded: A message above the limit; nothing of it is kept.
        """
        if not self._buffer and len(data) >= PREFIX_BYTES and self._next_size(data) == len(data) - PREFIX_BYTES:
            return (data[PREFIX_BYTES:],)
        buffer = self._buffer
        buffer += data
        messages: list[bytes] = []
        start = 0
        while len(buffer) - start >= PREFIX_BYTES:
            end = start + PREFIX_BYTES + self._next_size(buffer, start)
            if end > len(buffer):
                break
            messages.append(bytes(memoryview(buffer)[start + PREFIX_BYTES : end]))
            start = end
        del buffer[:start]
        return messages

    def _next_size(self, data: bytes | bytearray, start: int = 0) -> int:
        is_compressed, size = _PREFIX.unpack_from(data, start)
        if is_compressed:
            self._buffer.clear()
            raise Unsupported("compressed messages are not supported; send them as they are (grpc-encoding: identity)")
        if size > self._limit_bytes:
            self._buffer.clear()
            raise too_large(size, self._limit_bytes)
        return int(size)


def too_large(size_bytes: int, limit_bytes: int) -> QuotaExceeded:
    """Returns the error of a message above the limit of its server."""
    return QuotaExceeded(
        f"a message of {size_bytes} bytes is larger than the limit of {limit_bytes} bytes",
        reason="MESSAGE_TOO_LARGE",
        metadata={"size_bytes": str(size_bytes), "limit_bytes": str(limit_bytes)},
    )


def _read_metadatum(name: bytes, value: bytes) -> list[Metadatum]:
    key = name.decode("latin-1")
    if not key.endswith("-bin"):
        return [Metadatum(key, _text(value))]
    # Several values of one name may be joined by commas, which base64 has none of.
    try:
        return [Metadatum(key, _binary(part.strip())) for part in value.split(b",")]
    except binascii.Error as error:
        raise InvalidRequest(f"the metadata {key} is not base64", metadata={"name": key}) from error


def _binary(value: bytes) -> bytes:
    # Senders may leave the padding away.
    return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        # HTTP allows any byte from 0x80 on in a value; grpcio reads it the same way.
        return value.decode("latin-1")
