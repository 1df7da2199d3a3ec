"""A URL as a source: hubs, OCI registries, signed URLs, plain HTTP directories.

http.client in threads over obstore's HTTP store, which neither tells the answer's Retry-After nor takes a query; over
httpx, which is five times slower; over aiohttp, whose TLS in asyncio has a tenth of the speed of a thread's.
Connections are kept. Redirects are followed, without credentials once the origin changes, and where they lead is
remembered until it fails.
"""

import email.utils
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from helios.mesh.errors import BlobNotFound, HeliosError, InvalidRequest, PermissionDenied, Unauthenticated
from helios.mesh.transfer.proxies import (
    Proxy,
    environment_proxy,
    error_of_connection,
    open_connection,
    parse_proxy,
    proxy_refusal,
)
from helios.mesh.transfer.source import Sink, SourceChanged, SourceFault, SourceState, source_unavailable

_PIECE_BYTES = 256 << 10
"""What one read may return: as much as a socket has, at most."""

_TIMEOUT_SECONDS = 20.0
_MAX_REDIRECTS = 5
_MAX_IDLE_CONNECTIONS = 32
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TEMPORARY: Final = frozenset({408, 425, 429})
"""Refusals that time heals, beside all of 5xx."""


def _no_headers() -> Mapping[str, str]:
    return {}


class HttpSource:
    """Reads one URL."""

    def __init__(
        self,
        url: str,
        *,
        headers: Callable[[], Mapping[str, str]] = _no_headers,
        tls: ssl.SSLContext | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        proxy_for: Callable[[str], str | None] = environment_proxy,
    ) -> None:
        """Takes an absolute URL.

        Args:
            url: What to read.
            headers: Asked for every request, so that a token may be renewed; sent to the URL's own origin only.
            tls: None: the system's roots.
            timeout_seconds: For connecting, and for each wait for bytes.
            proxy_for: Asked for the URL of the proxy of each URL that is read, where a redirect leads to included;
                None: it is asked directly.

        Raises:
            InvalidRequest: INVALID_LOCATION.
        """
        _split(url)
        self._url = url
        self._headers = headers
        self._connections = _Connections(tls, timeout_seconds, proxy_for)
        self._resolved = url

    def describe(self) -> SourceState:
        # A GET of one byte, not HEAD: signed URLs allow one method, and only this tells whether ranges work.
        with self._get(0, 0) as answer:
            if answer.status == HTTPStatus.PARTIAL_CONTENT:
                first, last, size_bytes = _content_range(answer.response)
                if first == last == 0:
                    # Read to its end, so that the connection is kept: through TLS, another one costs more than a byte.
                    while answer.read(_PIECE_BYTES):
                        pass
                return SourceState(size_bytes, etag=answer.etag)
            if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return SourceState(0, etag=answer.etag)
            return SourceState(_content_length(answer.response), etag=answer.etag, is_ranged=False)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        with self._get(offset, offset + length - 1) as answer:
            if answer.status == HTTPStatus.PARTIAL_CONTENT:
                first, last, size_bytes = _content_range(answer.response)
                is_other_range = (first, last) != (offset, offset + length - 1)
            else:
                size_bytes = _content_length(answer.response)
                is_other_range = (offset, length) != (0, size_bytes)
            if (size_bytes, answer.etag) != (state.size_bytes, state.etag):
                raise SourceChanged("the file was replaced while it was read", metadata={"url": _shown(self._url)})
            if is_other_range:
                raise SourceFault("the server answers with another range than was asked for")
            while piece := answer.read(_PIECE_BYTES):
                sink(memoryview(piece))

    def close(self) -> None:
        self._connections.close()

    @contextmanager
    def _get(self, first: int, last: int) -> Iterator["_Answer"]:
        """One GET of a range, redirects followed. The connection is kept if the whole answer was read.

        Raises:
            HeliosError: The server refuses, or can't be reached.
        """
        try:
            answer = self._follow(self._resolved, first, last)
        except (BlobNotFound, PermissionDenied, Unauthenticated, InvalidRequest):
            if self._resolved == self._url:
                raise
            # Where a redirect led has an end of its own: signed URLs expire.
            answer = self._follow(self._url, first, last)
        try:
            yield answer
        finally:
            self._connections.give_back(answer)

    def _follow(self, url: str, first: int, last: int) -> "_Answer":
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self._connections.get(url, self._request_headers(url, first, last))
            if answer.status not in _REDIRECTS:
                error = _refusal(answer, self._url)
                if error is not None:
                    self._connections.give_back(answer)
                    raise error
                self._resolved = url
                return answer
            location = answer.response.getheader("Location", "")
            self._connections.give_back(answer)
            try:
                url = urljoin(url, location)
                # Asking for the port looks whether it is one.
                _ = _split(url).port
            except ValueError as error:
                raise source_unavailable(f"{_shown(self._url)} redirects to what is no URL") from error
        raise source_unavailable(f"{_shown(self._url)} redirects without end")

    def _request_headers(self, url: str, first: int, last: int) -> dict[str, str]:
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity", "User-Agent": "helios"}
        if _origin(url) == _origin(self._url):
            headers.update(self._headers())
        return headers


@dataclass(slots=True, eq=False)
class _Answer:
    """An answer whose head was read, on its connection."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse
    origin: tuple[str, str]

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def etag(self) -> str:
        """A weak ETag does not promise the same bytes, and counts as none."""
        etag = self.response.getheader("ETag", "")
        return "" if etag.startswith("W/") else etag

    def read(self, count: int) -> bytes:
        """Reads what is there, at least one byte; empty at the end."""
        try:
            piece = self.response.read1(count)
            if not piece:
                # Python 3.11's read1 leaves a response open that was read to its end; its connection could not be kept.
                self.response.read()
            return piece
        except (OSError, http.client.HTTPException) as error:
            raise source_unavailable(f"the connection broke while it was read: {error}") from error


class _Connections:
    """Connections that are kept, by origin. Thread-safe."""

    def __init__(
        self, tls: ssl.SSLContext | None, timeout_seconds: float, proxy_for: Callable[[str], str | None]
    ) -> None:
        self._tls = tls
        self._timeout_seconds = timeout_seconds
        self._proxy_for = proxy_for
        self._lock = threading.Lock()
        self._idle: list[tuple[tuple[str, str], http.client.HTTPConnection]] = []
        self._busy: set[http.client.HTTPConnection] = set()

    def get(self, url: str, headers: Mapping[str, str]) -> _Answer:
        """Sends a GET and reads the head of its answer.

        Raises:
            Unavailable: SOURCE_UNAVAILABLE.
            InvalidRequest: INVALID_PROXY, PROXY_REFUSED.
        """
        parts = _split(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        origin, shown = _origin(url), parts.netloc.rpartition("@")[2]
        proxy_url = self._proxy_for(url)
        proxy = parse_proxy(proxy_url) if proxy_url else None
        sent = dict(headers)
        if proxy is not None and parts.scheme == "http":
            # Not in a tunnel: the proxy reads the request, and so the whole URL and its own credentials.
            target = f"http://{shown}{target}"
            sent |= proxy.headers
        while True:
            connection, is_kept = self._take(origin, parts, proxy)
            try:
                connection.request("GET", target, headers=sent)
                answer = _Answer(connection, connection.getresponse(), origin)
            except (OSError, http.client.HTTPException) as error:
                self._drop(connection)
                # A server may close a connection that rests at any time; a fresh one says what is true.
                if not is_kept:
                    raise error_of_connection(error, shown, proxy) from error
                continue
            if proxy is not None and answer.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                self.give_back(answer)
                raise proxy_refusal(shown, proxy, answer.status)
            return answer

    def give_back(self, answer: _Answer) -> None:
        """Keeps a connection whose answer was read to its end, and closes any other."""
        is_reusable = answer.response.isclosed() and answer.connection.sock is not None
        with self._lock:
            if is_reusable and answer.connection in self._busy and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._busy.remove(answer.connection)
                self._idle.append((answer.origin, answer.connection))
                return
        answer.response.close()
        self._drop(answer.connection)

    def close(self) -> None:
        """Closes what rests, and ends reads that run."""
        with self._lock:
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for _, connection in idle:
            connection.close()
        for connection in busy:
            # Shut down rather than closed: the descriptor belongs to the thread that reads from it.
            sock = connection.sock
            if sock is not None:
                _shut_down(sock)

    def _take(
        self, origin: tuple[str, str], parts: SplitResult, proxy: Proxy | None
    ) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            for number, (kept_origin, connection) in enumerate(self._idle):
                if kept_origin == origin:
                    del self._idle[number]
                    self._busy.add(connection)
                    return connection, True
        connection = open_connection(parts, proxy, tls=self._tls, timeout_seconds=self._timeout_seconds)
        with self._lock:
            self._busy.add(connection)
        return connection, False

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._busy.discard(connection)
        connection.close()


def _refusal(answer: _Answer, url: str) -> HeliosError | None:
    """What an answer without the bytes means; None where it has them."""
    status, shown = answer.status, _shown(url)
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        if answer.response.getheader("Content-Encoding", "identity") != "identity":
            return source_unavailable(f"{shown} answers with compressed bytes although none were asked for")
        return None
    metadata = {"url": shown, "status": str(status)}
    if status >= 500 or status in _TEMPORARY:
        seconds = retry_after_seconds(answer.response.getheader("Retry-After", ""), datetime.now(UTC))
        return source_unavailable(f"{shown} answers {status}", retry_after_seconds=seconds)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return BlobNotFound(f"{shown} is not there", metadata=metadata)
    if status == HTTPStatus.UNAUTHORIZED:
        return Unauthenticated(f"{shown} asks for a valid token", metadata=metadata)
    if status == HTTPStatus.FORBIDDEN:
        return PermissionDenied(f"{shown} is not for these credentials", metadata=metadata)
    return InvalidRequest(f"{shown} answers {status}", reason="SOURCE_REFUSED", metadata=metadata)


def retry_after_seconds(header: str, now: datetime) -> float | None:
    """Reads a Retry-After: seconds, or a date; None where there is none that makes sense.

    Source: RFC 9110, 10.2.3.
    """
    if header.strip().isdecimal():
        return float(header)
    try:
        at = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds())


def _content_range(response: http.client.HTTPResponse) -> tuple[int, int, int]:
    """First and last byte, and the whole's size, of `bytes 0-9/100`."""
    header = response.getheader("Content-Range", "")
    unit, _, rest = header.partition(" ")
    span, _, size = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdecimal() and last.isdecimal() and size.isdecimal()):
        raise SourceFault("the server does not say which range it answers with", metadata={"header": header[:100]})
    return int(first), int(last), int(size)


def _content_length(response: http.client.HTTPResponse) -> int:
    header = response.getheader("Content-Length", "")
    if not header.isdecimal():
        raise SourceFault("the server does not say how many bytes it answers with")
    return int(header)


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(
            "bytes are read from http:// and https:// URLs", reason="INVALID_LOCATION", metadata={"url": _shown(url)}
        )
    return parts


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _shown(url: str) -> str:
    """A URL for people: without its query, which may be a signature, and without a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:300]


def _shut_down(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is closed already.
        return
