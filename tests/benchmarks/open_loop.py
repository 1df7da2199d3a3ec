"""A client that sends at fixed times, whether or not answers have come, and takes as little of a core as it can.

Latency counts from the time at which a request was due: a server that stalls is charged for the requests that could
not be sent meanwhile. One thread around ``select``, because its timeout has microseconds; that of epoll, which asyncio
uses, has milliseconds, as much as what is measured.
"""

import gc
import select
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Self

_END = b"0\r\n\r\n"
_OK = b"HTTP/1.1 200"
# A request that takes longer is a failure of the run.
_LIMIT_SECONDS = 10.0


@dataclass(slots=True)
class _Flight:
    due: float
    received: bytes = b""


class Connections:
    """Persistent HTTP/1.1 connections to one address; one request at a time on each."""

    def __init__(self, port: int, count: int, request: bytes) -> None:
        self._request = request
        self._idle: deque[socket.socket] = deque()
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=_LIMIT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._idle.append(connection)
        self._busy: dict[socket.socket, _Flight] = {}
        self._seconds: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._idle, *self._busy):
            connection.close()

    def run(self, count: int, per_second: float) -> list[float]:
        """Sends ``count`` requests, one every 1/``per_second``; returns the latency of each in seconds.

        Raises:
            RuntimeError: An answer was not 200, or did not come.
        """
        self._seconds = []
        is_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            begin = time.perf_counter()
            for number in range(count):
                due = begin + number / per_second
                self._serve_until(due)
                self._send(due)
            end = time.perf_counter() + _LIMIT_SECONDS
            while self._busy:
                self._receive(0.1)
                if time.perf_counter() > end:
                    raise RuntimeError(f"{len(self._busy)} requests were not answered in {_LIMIT_SECONDS} s")
        finally:
            if is_enabled:
                gc.enable()
        return self._seconds

    def _serve_until(self, due: float) -> None:
        while (left := due - time.perf_counter()) > 0:
            self._receive(left)

    def _send(self, due: float) -> None:
        while not self._idle:
            self._receive(0.1)
            if time.perf_counter() > due + _LIMIT_SECONDS:
                raise RuntimeError("no connection became free")
        connection = self._idle.popleft()
        self._busy[connection] = _Flight(due)
        connection.sendall(self._request)

    def _receive(self, timeout_seconds: float) -> None:
        readable, _, _ = select.select(self._busy, (), (), timeout_seconds)
        now = time.perf_counter()
        for connection in readable:
            flight = self._busy[connection]
            data = connection.recv(65536)
            flight.received += data
            if flight.received.endswith(_END):
                if not flight.received.startswith(_OK):
                    raise RuntimeError(f"refused: {flight.received[:500]!r}")
                self._seconds.append(now - flight.due)
                del self._busy[connection]
                self._idle.append(connection)
            elif not data or not flight.received.startswith(_OK[: len(flight.received)]):
                raise RuntimeError(f"refused: {flight.received[:500]!r}")
