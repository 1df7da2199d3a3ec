"""A client of streamed chat completions that takes as little of a core as it can: one thread around ``select``."""

import gc
import re
import select
import socket
import time
from collections.abc import Sequence

_END = b"0\r\n\r\n"
_OK = b"HTTP/1.1 200"
_DONE = b"data: [DONE]"
# The first event of a stream has a role and an empty text.
_TEXT = re.compile(rb'"content": ?"[^"]')
_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


def stream_all(port: int, bodies: Sequence[bytes], *, timeout_seconds: float) -> tuple[float, int]:
    """Sends all requests at once, reads each stream to its end; returns the seconds it took and the tokens that the
    streams' last usage reports add up to.

    Raises:
        RuntimeError: A stream was refused, broke, or did not end in time.
    """
    connections = {_connect(port): body for body in bodies}
    received = {connection: bytearray() for connection in connections}
    busy = set(connections)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for connection, body in connections.items():
            connection.sendall(_request(body))
        while busy:
            if time.perf_counter() - begin > timeout_seconds:
                raise RuntimeError(f"{len(busy)} streams did not end in {timeout_seconds} s")
            readable, _, _ = select.select(busy, (), (), 1.0)
            for connection in readable:
                data = connection.recv(65536)
                received[connection] += data
                if len(received[connection]) >= len(_OK) and not received[connection].startswith(_OK):
                    raise RuntimeError(f"a stream was refused: {bytes(received[connection][:500])!r}")
                if received[connection].endswith(_END):
                    busy.discard(connection)
                elif not data:
                    raise RuntimeError(f"a stream broke: {bytes(received[connection][-500:])!r}")
        seconds = time.perf_counter() - begin
    finally:
        gc.enable()
        for connection in connections:
            connection.close()
    return seconds, sum(_tokens(bytes(answer)) for answer in received.values())


def first_token_seconds(port: int, body: bytes, *, timeout_seconds: float) -> float:
    """Sends one streamed chat and returns the seconds until the first text of the answer is here, then hangs up.

    Raises:
        RuntimeError: Something else than a stream with text came, or nothing in time.
        OSError: Nobody listens.
    """
    begin = time.perf_counter()
    received = bytearray()
    with _connect(port) as connection:
        connection.settimeout(timeout_seconds)
        connection.sendall(_request(body))
        while not _TEXT.search(received):
            data = connection.recv(65536)
            if not data or (len(received) > len(_OK) and not received.startswith(_OK)):
                raise RuntimeError(f"not a stream with text: {bytes(received[-500:])!r}")
            received += data
        return time.perf_counter() - begin


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _request(body: bytes) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def _tokens(answer: bytes) -> int:
    if not answer.startswith(_OK) or _DONE not in answer:
        raise RuntimeError(f"not a whole stream: {answer[:500]!r}")
    return int(_TOKENS.findall(answer)[-1])
