"""The supervisor's door for artifacts: a unix socket that only processes of the same user get through.

A request is one line and gets one. It names a kind and inputs and nothing of the file system, so that what a replica
says can't lead a path anywhere.
"""

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Final, Protocol, Self

import structlog

from helios.mesh.errors import HeliosError, InvalidRequest, PermissionDenied
from helios.worker.artifacts.requests import (
    MAX_LINE_BYTES,
    ArtifactRequest,
    Ask,
    decode_request,
    encode_line,
)

log = structlog.get_logger()

_READ_SECONDS: Final = 5.0
# struct ucred: pid, uid, gid. Source: unix(7).
_UCRED: Final = struct.Struct("iII")


class Artifacts(Protocol):
    """Whom the door leads to."""

    async def take(self, request: ArtifactRequest) -> str:
        """Brings an artifact to the node; returns why not, empty where it is there. Raises nothing of its own."""
        ...

    def note_proven(self, request: ArtifactRequest) -> None:
        """Takes notice that what a replica used is good. Does not block."""
        ...

    def note_refused(self, request: ArtifactRequest) -> None:
        """Takes notice that no start with what is on the node went well. Does not block."""
        ...


class ArtifactDoor:
    """Serves the socket. An async context manager; leaving it cuts off who waits."""

    def __init__(self, path: Path, artifacts: Artifacts) -> None:
        """Takes the socket's path, which is replaced if it is there: this process owns its directory."""
        self._path = path
        self._artifacts = artifacts
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
            log.warning("request for an artifact not answered", error=str(error))
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, object]:
        try:
            ask, request = decode_request(line)
        except InvalidRequest as error:
            return {"is_here": False, "why": error.message}
        if ask is Ask.PROVEN:
            self._artifacts.note_proven(request)
            return {}
        if ask is Ask.REFUSED:
            self._artifacts.note_refused(request)
            return {}
        why = await self._artifacts.take(request)
        return {"is_here": not why, "why": why}


def _check_peer(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid != os.getuid():
        raise PermissionDenied("another user's process asked for an artifact", metadata={"uid": str(uid)})
