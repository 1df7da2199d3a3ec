"""A bare HTTP server of one file, or of a directory's, with ranges, by sendfile: a store that costs next to nothing.

Run as a process of its own: `python -m tests.benchmarks.range_server FILE [RATE]`; it prints its port. It ends when its
standard input does. With a rate the kernel sends no connection more bytes a second than that, at no cost in CPU.
"""

import os
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

_PATH = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/dev/null")
_RATE = int(sys.argv[2]) if len(sys.argv) > 2 else 0
_SO_MAX_PACING_RATE = 47
"""Of Linux, which Python has no name for. Source: socket(7)."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        if _RATE:
            self.request.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _RATE)
        super().setup()

    def do_HEAD(self) -> None:
        self._head(200, self._file().stat().st_size)

    def do_GET(self) -> None:
        path = self._file()
        size = path.stat().st_size
        first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        offset, end = int(first), min(int(last) + 1, size)
        self._head(206, end - offset, f"bytes {offset}-{end - 1}/{size}")
        self.wfile.flush()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while offset < end:
                offset += os.sendfile(self.connection.fileno(), descriptor, offset, end - offset)
        finally:
            os.close(descriptor)

    def _file(self) -> Path:
        """Of a directory, what the URL ends with."""
        return _PATH / Path(urlsplit(self.path).path).name if _PATH.is_dir() else _PATH

    def _head(self, status: int, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 00:00:00 GMT")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is logged while it is measured."""


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *_: object) -> None:
        """A client that is done closes its connections, some of them by a reset."""


if __name__ == "__main__":
    with _Server(("127.0.0.1", 0), _Handler) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()
