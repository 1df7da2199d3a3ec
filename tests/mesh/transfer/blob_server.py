"""An HTTP server with one blob at any path, or some by name, with ranges, ETags, and whatever fault a test scripts."""

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ETAG = '"one"'


@dataclass
class Request:
    """One GET, as the server saw it."""

    number: int
    path: str
    first: int
    last: int
    headers: dict[str, str]


@dataclass
class Answer:
    """How to answer it; the default is how a good server does."""

    status: int = 0
    """0: 206, or 200 where ranges are not served."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_bytes: int = 0
    """Close the connection so many bytes before the end."""
    drip_seconds: float = 0.0
    """Pause after each KiB."""
    hang: bool = False
    """Send the head, then nothing."""


@dataclass
class BlobServer:
    """What is served, and what was asked for. Fields may be changed at any time."""

    content: bytes
    etag: str = ETAG
    is_ranged: bool = True
    script: Callable[[Request], Answer] = lambda _: Answer()
    requests: list[Request] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    """None: plain HTTP."""
    stopped: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    named: Mapping[str, bytes] = field(default_factory=dict)
    """Other blobs, by the last part of their paths."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges of data that were asked for; the first byte alone is how a source is described."""
        return [(request.first, request.last) for request in self.requests if request.last > 0]


@contextmanager
def serve_blob(content: bytes, **fields: Any) -> Iterator[BlobServer]:
    """Serves until the context ends."""
    blob = BlobServer(content, **fields)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"blob": blob, "lock": threading.Lock()}))
    if blob.tls is not None:
        server.socket = blob.tls.wrap_socket(server.socket, server_side=True)
    blob.url = f"http{'s' if blob.tls else ''}://127.0.0.1:{server.server_address[1]}/blob"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="blob server")
    thread.start()
    try:
        yield blob
    finally:
        blob.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that are killed reset their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    blob: BlobServer
    lock: threading.Lock

    @property
    def _content(self) -> bytes:
        return self.blob.named.get(self.path.rpartition("/")[2], self.blob.content)

    def do_HEAD(self) -> None:
        self._head(200, len(self._content), {"Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT"})

    def do_GET(self) -> None:
        blob, content = self.blob, self._content
        span = self.headers.get("Range", "")
        first, _, last = span.removeprefix("bytes=").partition("-") if span else ("0", "", str(len(content) - 1))
        with self.lock:
            request = Request(len(blob.requests), self.path, int(first), int(last), dict(self.headers))
            blob.requests.append(request)
        answer = blob.script(request)
        is_partial = bool(span) and blob.is_ranged
        body = content[request.first : request.last + 1] if is_partial else content
        headers = {}
        if answer.status:
            status, body = answer.status, b""
        elif is_partial and not body:
            status = 416
        elif is_partial:
            status = 206
            headers["Content-Range"] = f"bytes {first}-{request.first + len(body) - 1}/{len(content)}"
        else:
            status = 200
        headers["Last-Modified"] = "Sun, 22 Nov 2026 00:00:00 GMT"
        self._head(status, len(body), {**headers, **answer.headers})
        self._send(body, answer)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.blob.etag:
            self.send_header("ETag", self.blob.etag)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes, answer: Answer) -> None:
        self.close_connection = self.close_connection or answer.hang or answer.cut_bytes > 0
        if answer.hang:
            self.blob.stopped.wait(30.0)
            return
        step = 1024 if answer.drip_seconds else max(1, len(body))
        try:
            for at in range(0, len(body) - answer.cut_bytes, step):
                self.wfile.write(body[at : min(at + step, len(body) - answer.cut_bytes)])
                time.sleep(answer.drip_seconds)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Tests look at `requests`."""
