"""The supervisor's door for artifacts.

A request names a kind and inputs and nothing of the file system, so that what a replica says can't lead a path
anywhere.
"""

from pathlib import Path
from typing import Protocol

from helios.mesh.errors import InvalidRequest
from helios.worker.artifacts.requests import ArtifactRequest, Ask, decode_request
from helios.worker.line_door import Document, LineDoor


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


class ArtifactDoor(LineDoor):
    """Serves the socket. An async context manager; leaving it cuts off who waits."""

    def __init__(self, path: Path, artifacts: Artifacts) -> None:
        """Takes the socket's path, which is replaced if it is there: this process owns its directory."""
        super().__init__(path, self._tell)
        self._artifacts = artifacts

    async def _tell(self, line: bytes) -> Document:
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
