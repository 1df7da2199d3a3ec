"""The faulty proxy does to HTTP what it is told, and nothing else: other tests believe it."""

import http.client
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.emulators.faulty_proxy import (
    FaultyProxy,
    expired_token,
    flipped_bit,
    lost_answer,
    reset_body,
    reset_request,
    slow_drip,
    status,
    wrong_etag,
    wrong_length,
)

BODY = bytes(range(256)) * 40


class Echo(BaseHTTPRequestHandler):
    """Answers GET with BODY, PUT with what came; counts what reached it."""

    seen: list[tuple[str, str, bytes, str]] = []  # noqa: RUF012 - of one test, cleared by the fixture

    def do_GET(self) -> None:
        self._answer(BODY)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        self.seen.append((self.command, self.path, body, self.headers["Host"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"right"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    Echo.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    with FaultyProxy(f"127.0.0.1:{server.server_address[1]}") as opened:
        yield opened
    server.shutdown()
    server.server_close()
    thread.join()


def ask(proxy: FaultyProxy, method: str = "GET", body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(proxy.address, timeout=10)
    try:
        connection.request(method, "/bucket/key?x=1", body=body or None, headers={"Host": "store.example"})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_passes_on_what_is_sound(proxy: FaultyProxy) -> None:
    assert ask(proxy) == (200, ask(proxy)[1], BODY)
    assert ask(proxy, "PUT", b"hello")[2] == b"hello"
    assert Echo.seen[-1] == ("PUT", "/bucket/key?x=1", b"hello", "store.example")
    assert proxy.requests[-1] == ("PUT", "/bucket/key?x=1")
    assert proxy.broken_count == 0


def test_answers_in_place_of_the_server(proxy: FaultyProxy) -> None:
    proxy.inject(status(429, retry_after=7, body=b"slow down", times=2), expired_token())
    for _ in range(2):
        code, headers, body = ask(proxy)
        assert (code, headers["retry-after"], body) == (429, "7", b"slow down")
    code, _, body = ask(proxy)
    assert (code, b"ExpiredToken" in body) == (403, True)
    assert Echo.seen == []
    assert ask(proxy)[0] == 200
    assert proxy.broken_count == 3


def test_hits_what_fits(proxy: FaultyProxy) -> None:
    proxy.inject(status(500, method="PUT"), status(503, part="/other"))
    assert ask(proxy)[0] == 200
    assert ask(proxy, "PUT", b"x")[0] == 500
    proxy.heal()
    assert ask(proxy, "PUT", b"x")[0] == 200


@pytest.mark.parametrize("reached", [False, True])
def test_resets_before_the_answer(proxy: FaultyProxy, reached: bool) -> None:
    proxy.inject(lost_answer() if reached else reset_request())
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy, "PUT", b"hello")
    assert [each[2] for each in Echo.seen] == ([b"hello"] if reached else [])


def test_resets_in_the_middle_of_a_body(proxy: FaultyProxy) -> None:
    proxy.inject(reset_body(after_bytes=1000))
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy)
    assert ask(proxy)[2] == BODY


def test_drips(proxy: FaultyProxy) -> None:
    proxy.inject(slow_drip(bytes_per_second=len(BODY) * 4))
    started = time.monotonic()
    assert ask(proxy)[2] == BODY
    assert time.monotonic() - started > 0.2


def test_changes_answers(proxy: FaultyProxy) -> None:
    proxy.inject(wrong_length(missing_bytes=10), flipped_bit(at=5), wrong_etag())
    assert ask(proxy)[2] == BODY[:-10]
    flipped = ask(proxy)[2]
    assert [at for at in range(len(BODY)) if flipped[at] != BODY[at]] == [5]
    assert ask(proxy)[1]["etag"] != '"right"'
    assert ask(proxy)[1]["etag"] == '"right"'
