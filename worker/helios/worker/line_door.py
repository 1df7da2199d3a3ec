"""A unix socket where replicas ask their supervisor something: one JSON line there, one back.

Not gRPC: a replica asks before its engine has forked, or from the engine's own processes, where there must be no
threads of gRPC. Only processes of the same user get through.
"""

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Self

import structlog

from helios.mesh.errors import HeliosError, InvalidRequest, PermissionDenied

log = structlog.get_logger()

Document = dict[str, Any]

MAX_LINE_BYTES: Final = 128 << 10
"""What is asked. Inputs of artifacts have at most 64 KiB; twice that, for their quotes in JSON."""
_MAX_ANSWER_BYTES: Final = 16 << 20
"""What is here of a large model, in pieces as small as can be."""
_READ_SECONDS: Final = 5.0
# struct ucred: pid, uid, gid. Source: unix(7).
_UCRED: Final = struct.Struct("iII")


class LineDoor:
    """Serves the socket. An async context manager; leaving it cuts off who waits."""

    def __init__(self, path: Path, answer: Callable[[bytes], Awaitable[Document]]) -> None:
        """Takes the socket's path, which is replaced if it is there, for this process owns its directory; and what
        answers a line, in its own time. It raises HeliosError where there is no answer.
        """
        self._path = path
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=MAX_LINE_BYTES)
        self._path.chmod(0o600)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            _check_peer(writer)
            async with asyncio.timeout(_READ_SECONDS):
                line = await reader.readline()
            writer.write(encode_line(await self._answer(line)))
            await writer.drain()
        except (HeliosError, OSError, TimeoutError, ValueError) as error:
            # ValueError: a line beyond the limit.
            log.warning("what a replica asked is not answered", door=self._path.name, error=str(error))
        finally:
            self._serving.discard(task)
            writer.close()


def ask(door: str, line: bytes, *, timeout_seconds: float) -> Document:
    """Asks at a door; blocks, and starts no thread.

    Raises:
        OSError: Nobody answers, or not in time.
        InvalidRequest: What came back is no JSON object; nothing, say.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_seconds)
        connection.connect(door)
        connection.sendall(line)
        with connection.makefile("rb") as answers:
            return decode_line(answers.readline(_MAX_ANSWER_BYTES))


def encode_line(document: Document) -> bytes:
    """Returns a line."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes) -> Document:
    """Reads a JSON object. Raises InvalidRequest."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("not a JSON object")
    return document


def _check_peer(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid != os.getuid():
        raise PermissionDenied("another user's process asked", metadata={"uid": str(uid)})
