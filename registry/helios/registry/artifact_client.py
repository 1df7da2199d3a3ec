"""Artifacts as workers and the command line see them: values in and out, HeliosError on failure.

An artifact is never the only copy, so every call has a short deadline of the caller's and no retries: whoever does not
get one makes it anew.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from helios.api.registry.v1 import artifact_service_pb2 as pb
from helios.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource
from helios.mesh.errors import NotFound
from helios.registry.artifact_wire import artifact_from_proto, header_to_proto
from helios.registry.artifacts import Artifact, NewArtifact
from helios.registry.manifest import MEDIA_ARTIFACT, Digest, Entry, Manifest

_TIMEOUT_SECONDS: Final = 10.0
_CHUNK_BYTES: Final = 1 << 20
_PAGE_SIZE: Final = 1_000


class ArtifactClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def find(self, kind: str, key: str, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> Artifact | None:
        """Returns an artifact, None where there is none. Raises HeliosError where the registry can't be asked."""
        request = pb.GetArtifactRequest(kind=kind, key=key)
        try:
            response = await answer_of(self._stub().GetArtifact(request, timeout=timeout_seconds))
        except NotFound:
            return None
        return artifact_from_proto(response.artifact)

    async def list_artifacts(self, *, revision: str = "") -> tuple[Artifact, ...]:
        """Returns the artifacts of a revision, or all, by kind and key."""
        found: list[Artifact] = []
        token = ""
        while True:
            request = pb.ListArtifactsRequest(revision=revision, page_size=_PAGE_SIZE, page_token=token)
            response = await answer_of(self._stub().ListArtifacts(request, timeout=_TIMEOUT_SECONDS))
            found += map(artifact_from_proto, response.artifacts)
            token = response.next_page_token
            if not token:
                return tuple(found)

    async def put(
        self,
        *,
        kind: str,
        inputs: str,
        revision: str,
        producer: str,
        files: Mapping[str, Path],
        timeout_seconds: float,
    ) -> tuple[Artifact, bool]:
        """Stores an artifact unless there is one of its name; returns the one that has it, and whether it is this one.

        Args:
            kind: What it is.
            inputs: All that it depends on: a JSON object. Its sha256 is the key.
            revision: What it was made of.
            producer: Who made it, for people.
            files: Its files by path; they must not change meanwhile.
            timeout_seconds: For the whole upload.

        Raises:
            HeliosError: As PutArtifact in the contract.
            OSError: A file can't be read.
        """
        # Some are as large as weights: seconds of hashing are not for the event loop.
        entries = [Entry(path, await asyncio.to_thread(_digest, file), MEDIA_ARTIFACT) for path, file in files.items()]
        new = NewArtifact(
            kind, hashlib.sha256(inputs.encode()).hexdigest(), inputs, revision, producer, Manifest.of(entries)
        ).check()
        # An iterator of requests: on a channel with interceptors, grpcio's write leaves a task behind where the server
        # ends the call early, which this one does for a name that is taken.
        response = await answer_of(self._stub().PutArtifact(_requests(new, files), timeout=timeout_seconds))
        return artifact_from_proto(response.artifact), response.is_new

    async def delete(self, kind: str, key: str, *, digest: str) -> int:
        """Removes an artifact if it still has this digest (empty: whatever it is); returns the bytes freed."""
        request = pb.DeleteArtifactRequest(kind=kind, key=key, digest=digest)
        return (await answer_of(self._stub().DeleteArtifact(request, timeout=_TIMEOUT_SECONDS))).freed_bytes

    def _stub(self) -> ArtifactServiceStub:
        return self._dialer.stub(ArtifactServiceStub)


async def _requests(new: NewArtifact, files: Mapping[str, Path]) -> AsyncIterator[pb.PutArtifactRequest]:
    yield pb.PutArtifactRequest(header=header_to_proto(new))
    first = {entry.digest: entry.path for entry in reversed(new.manifest.entries)}
    for digest in dict.fromkeys(entry.digest for entry in new.manifest.entries):
        with files[first[digest]].open("rb") as file:
            while data := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                yield pb.PutArtifactRequest(data=data)


def _digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
