"""Manifests from the registry, checked again: what comes over the wire is not trusted, whoever sent it."""

import grpc.aio

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import DeadlineExceeded, InvalidRequest, Unavailable
from helios.mesh.status import error_from_rpc
from helios.storage.chunk_source import ChunkedSource, RegistryChunks
from helios.storage.fetch import BlobSource, DirectorySource
from helios.storage.manifest import Digest, Manifest, ManifestEntry, make_manifest
from helios.storage.sources import BlobLocation, Sources
from helios.storage.sync.swarms import Swarms

_TIMEOUT_SECONDS = 10.0
"""A manifest is some kilobytes from the registry's memory or SQL; a registry that is this late is as good as away."""


class RegistryManifests:
    """Asks a registry; a `ManifestSource`."""

    def __init__(
        self,
        dialer: Dialer,
        sources: Sources | None = None,
        chunks: RegistryChunks | None = None,
        swarms: Swarms | None = None,
    ) -> None:
        """Takes an open dialer to the registry, what opens the stores that it names, what knows of chunks, and what
        knows the other nodes.
        """
        self._dialer = dialer
        self._chunks = chunks
        self._swarms = swarms
        self._sources = sources or Sources()

    async def get_manifest(self, revision: str) -> tuple[Manifest, BlobSource]:
        """Returns a checked manifest and the source that has its blobs.

        Raises:
            RevisionNotFound: The registry does not know it.
            InvalidRequest: INVALID_MANIFEST.
            DigestMismatch: The manifest is one of another revision.
            Unsupported: Its blobs are where this agent can't read.
            Unavailable: SOURCE_UNAVAILABLE, when the registry does not answer.
        """
        try:
            response = await self._dialer.stub(RegistryServiceStub).GetManifest(
                pb.GetManifestRequest(revision=revision), timeout=_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_rpc(rpc_error)
            if isinstance(error, Unavailable | DeadlineExceeded):
                raise Unavailable(
                    f"the registry does not answer: {error.message}",
                    reason="SOURCE_UNAVAILABLE",
                    retry_after_seconds=1.0,
                ) from rpc_error
            raise error from rpc_error
        locations = [BlobLocation(location.url, dict(location.options)) for location in response.locations]
        # A registry of an older Helios names one store only.
        source = self._sources.open(locations or [BlobLocation(response.blob_store_url)])
        manifest = manifest_from_proto(revision, response.manifest)
        if self._chunks is not None and not isinstance(source, DirectorySource):
            known = await self._chunks.find(manifest.blobs)
            source = ChunkedSource(source, known, self._swarms)
        return manifest, source


def manifest_from_proto(revision: str, manifest: pb.Manifest) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        InvalidRequest: INVALID_MANIFEST.
        DigestMismatch: It is one of another revision.
    """
    entries = []
    for entry in manifest.entries:
        if entry.digest.algorithm != "sha256":
            raise InvalidRequest(
                "a blob is named by another hash than sha256",
                reason="INVALID_MANIFEST",
                metadata={"path": entry.path[:200]},
            )
        digest = Digest(entry.digest.hash, entry.digest.size_bytes)
        entries.append(ManifestEntry(entry.path, digest, entry.media_type))
    return make_manifest(revision, entries)
