"""A little forward proxy: whole URLs for http, tunnels for https, and a password where a test wants one.

All names lead to this machine, so that a test sees that it is the proxy that looks names up.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

_COPY_BYTES = 64 << 10
_TIMEOUT_SECONDS = 30.0


@dataclass
class ForwardProxy:
    """What went through."""

    authorization: str = ""
    """What clients must send; empty: anything."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and target, as they were asked for."""
    address: str = ""


@contextmanager
def serve_proxy(**fields: Any) -> Iterator[ForwardProxy]:
    """Serves until the context ends."""
    proxy = ForwardProxy(**fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="forward proxy")
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        # Waits for its handlers, whose clients have closed their connections by now.
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ForwardProxy

    def do_CONNECT(self) -> None:
        if not self._is_let_in():
            return
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2])), _TIMEOUT_SECONDS) as there:
            self.send_response(200, "Connection established")
            self.end_headers()
            back = threading.Thread(target=_copy, args=(there, self.connection))
            back.start()
            _copy(self.connection, there)
            back.join()
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._is_let_in():
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "proxy-authorization"}
        url = self.path.replace("far.example", "127.0.0.1")
        with build_opener(ProxyHandler({})).open(Request(url, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
            body = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Range", "ETag"):
                self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _is_let_in(self) -> bool:
        self.proxy.seen.append((self.command, self.path))
        if self.proxy.authorization in ("", self.headers.get("Proxy-Authorization", "none")):
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(_COPY_BYTES):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One of them is gone; the other one need not wait.
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
