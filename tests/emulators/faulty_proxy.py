"""A reverse proxy on loopback that breaks what passes through it, as told: the network between a client and a store.

    proxy = FaultyProxy("127.0.0.1:8333")            # a server's address
    with proxy:
        proxy.inject(status(503, times=2))           # the next two requests
        proxy.inject(reset_body(after_bytes=1000, method="GET", part="/sha256/"))
        ... a client that talks to proxy.address ...
        assert proxy.broken_count == 3

Requests pass with their `Host` unchanged, so signatures over it stay valid. Faults are taken in the order of `inject`;
each is used up after `times` requests that it fits. Every exchange is a connection of its own (`Connection: close`),
so that a test leaves nothing open and a fault hits one request only.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self

# A store under a busy machine's load answers within this, or the test has failed anyway.
_UPSTREAM_SECONDS: Final = 30.0
_BUFFER_BYTES: Final = 64 << 10
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"})
EXPIRED_TOKEN: Final = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered: status, headers, and the body as it comes."""

    status: int
    headers: list[tuple[str, str]]
    body: Iterator[bytes]


@dataclass(slots=True)
class Fault:
    """One way in which a request goes wrong, for the next ``times`` requests of a method whose target holds ``part``.

    Attributes:
        answer: Replaces the server: the request never reaches it.
        after: So many requests that it would hit pass first.
        is_request_reset: The connection is reset before the body of the request was read.
        is_request_damaged: One byte of the request's body is another when it reaches the server.
        is_answer_lost: The server does what it is asked, and the connection is reset instead of the answer.
        change: Changes the server's answer.
        reset_after_bytes: The connection is reset after this much of the answer's body.
        bytes_per_second: The answer's body comes this slowly; 0: as fast as it can.
    """

    method: str = ""
    part: str = ""
    times: int = 1
    after: int = 0
    answer: Reply | None = None
    is_request_reset: bool = False
    is_answer_lost: bool = False
    is_request_damaged: bool = False
    change: Callable[[Reply], Reply] | None = None
    reset_after_bytes: int | None = None
    bytes_per_second: int = 0

    def fits(self, method: str, target: str) -> bool:
        """Returns whether a request is hit."""
        return self.times > 0 and self.method in ("", method) and self.part in target


def status(
    code: int,
    *,
    retry_after: int | None = None,
    body: bytes = b"",
    method: str = "",
    part: str = "",
    times: int = 1,
    after: int = 0,
) -> Fault:
    """The server answers with an error: 500 and 503, or 429 with Retry-After in seconds."""
    headers = [("Content-Type", "application/xml")]
    if retry_after is not None:
        headers.append(("Retry-After", str(retry_after)))
    return Fault(method, part, times, after, answer=Reply(code, headers, iter((body,))))


def expired_token(*, method: str = "", part: str = "", times: int = 1) -> Fault:
    """The credentials have expired: 403, as S3 says it."""
    return status(403, body=EXPIRED_TOKEN, method=method, part=part, times=times)


def reset_request(*, method: str = "", part: str = "", times: int = 1) -> Fault:
    """The connection breaks while the client sends."""
    return Fault(method, part, times, is_request_reset=True)


def damaged_request(*, method: str = "PUT", part: str = "", times: int = 1) -> Fault:
    """The network changes what the client sends."""
    return Fault(method, part, times, is_request_damaged=True)


def lost_answer(*, method: str = "", part: str = "", times: int = 1) -> Fault:
    """The server did it, and the client never hears so."""
    return Fault(method, part, times, is_answer_lost=True)


def reset_body(*, after_bytes: int, method: str = "GET", part: str = "", times: int = 1) -> Fault:
    """The connection breaks in the middle of the answer's body."""
    return Fault(method, part, times, reset_after_bytes=after_bytes)


def slow_drip(*, bytes_per_second: int, method: str = "GET", part: str = "", times: int = 1) -> Fault:
    """The answer's body trickles."""
    return Fault(method, part, times, bytes_per_second=bytes_per_second)


def wrong_length(*, missing_bytes: int, method: str = "GET", part: str = "", times: int = 1) -> Fault:
    """The answer is shorter than it should be, and its headers agree with that."""

    def shorten(reply: Reply) -> Reply:
        body = b"".join(reply.body)[:-missing_bytes]
        headers = [(name, value) for name, value in reply.headers if name.lower() != "content-length"]
        return Reply(reply.status, [*headers, ("Content-Length", str(len(body)))], iter((body,)))

    return Fault(method, part, times, change=shorten)


def flipped_bit(*, at: int, method: str = "GET", part: str = "", times: int = 1) -> Fault:
    """One bit of the answer's body is another."""

    def flip(reply: Reply) -> Reply:
        body = bytearray(b"".join(reply.body))
        body[at] ^= 1
        return Reply(reply.status, reply.headers, iter((bytes(body),)))

    return Fault(method, part, times, change=flip)


def wrong_etag(
    etag: str = '"00000000000000000000000000000000"', *, method: str = "", part: str = "", times: int = 1
) -> Fault:
    """The answer names another ETag."""

    def rename(reply: Reply) -> Reply:
        headers = [(name, value) for name, value in reply.headers if name.lower() != "etag"]
        return Reply(reply.status, [*headers, ("ETag", etag)], reply.body)

    return Fault(method, part, times, change=rename)


@dataclass
class FaultyProxy:
    """Forwards to ``upstream`` (``host:port``). A context manager; the attributes may be read at any time."""

    upstream: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken_count: int = 0
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: "_Server | None" = None
    _thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.server_address[1]}"

    def inject(self, *faults: Fault) -> None:
        """Adds faults, after those that are not used up yet."""
        with self._lock:
            self._faults += faults

    def heal(self) -> None:
        """Takes all faults away."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, target: str) -> Fault | None:
        """Notes a request; returns the fault that hits it."""
        with self._lock:
            self.requests.append((method, target))
            for fault in self._faults:
                if fault.fits(method, target):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    self.broken_count += 1
                    return fault
            return None

    def translate(
        self, method: str, target: str, headers: Iterable[tuple[str, str]]
    ) -> tuple[str, Iterable[tuple[str, str]]]:
        """Returns what the server is asked, and with which headers: the same."""
        del method
        return target, headers

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="proxy")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: clients that go away are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A part of an upload has megabytes.
    rbufsize = 1 << 20

    @property
    def proxy(self) -> FaultyProxy:
        """The proxy that this connection came to."""
        assert isinstance(self.server, _Server)
        return self.server.proxy

    def handle_one_request(self) -> None:
        """Answers one request, whatever its method."""
        self.close_connection = True
        self.raw_requestline = self.rfile.readline(64 << 10)
        if not self.raw_requestline or not self.parse_request():
            return
        self.close_connection = True
        fault = self.proxy.take(self.command, self.path)
        if fault is not None and fault.is_request_reset:
            if int(self.headers.get("Content-Length") or 0) or "Transfer-Encoding" in self.headers:
                self.rfile.read(1)
            self._reset()
            return
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self._read_body()
        if fault is not None and fault.is_request_damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault is not None and fault.answer is not None:
            content = b"".join(fault.answer.body)
            # The body is an iterator, which a fault that hits twice needs again.
            fault.answer = Reply(fault.answer.status, fault.answer.headers, iter((content,)))
            self._send(
                Reply(
                    fault.answer.status,
                    [*fault.answer.headers, ("Content-Length", str(len(content)))],
                    iter((content,)),
                ),
                None,
            )
            return
        self._forward(body, fault)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=_UPSTREAM_SECONDS)
        try:
            target, headers = self.proxy.translate(self.command, self.path, self.headers.items())
            upstream.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in _HOP_BY_HOP and name.lower() not in ("content-length", "expect"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.putheader("Connection", "close")
            upstream.endheaders(body)
            response = upstream.getresponse()
            reply = Reply(response.status, response.getheaders(), _chunks(response))
            if fault is not None and fault.is_answer_lost:
                response.read()
                self._reset()
                return
            if fault is not None and fault.change is not None:
                reply = fault.change(reply)
            self._send(reply, fault)
        finally:
            upstream.close()

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        self.send_response_only(reply.status)
        for name, value in reply.headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        limit = fault.reset_after_bytes if fault is not None else None
        for chunk in reply.body:
            part = chunk if limit is None else chunk[: limit - sent]
            self._write(part, fault.bytes_per_second if fault is not None else 0)
            sent += len(part)
            if limit is not None and sent >= limit:
                self._reset()
                return

    def _write(self, data: bytes, bytes_per_second: int) -> None:
        if not bytes_per_second:
            self.wfile.write(data)
            return
        step = max(1, bytes_per_second // 20)
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            self.wfile.flush()
            time.sleep(0.05)

    def _reset(self) -> None:
        """Ends the connection with a TCP reset rather than an orderly end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read(_BUFFER_BYTES):
        yield chunk
