"""Chunk indexes from the registry, and what they make of a source: verified chunk by chunk, read from this node's other
blobs first, then from peers, then from the registry's store.

An index is a convenience: without one (an older registry, a blob that was stored a moment ago, a small one) a blob is
fetched as a whole from the store and verified by its sha256, as all are in the end. Peers, whom nobody trusts, are not
read without one.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
import structlog

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.api.registry.v1.chunk_service_pb2_grpc import ChunkServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest
from helios.storage.chunk_index import BLAKE3_BYTES, ChunkIndex
from helios.storage.fetch import BlobReader, BlobSource, RangedBlob
from helios.storage.manifest import Digest
from helios.storage.sync.swarms import Swarms
from helios.storage.verified_source import LocalFirst, VerifiedSource

log = structlog.get_logger()

_MIN_BYTES: Final = 1 << 20
"""Smaller blobs have no index: a request is their cost."""

_MAX_LOCAL: Final = 4_096
"""Blobs that the registry compares at a time; of more, the largest."""

_TIMEOUT_SECONDS: Final = 10.0
_ALL_SECONDS: Final = 30.0
"""For all blobs of a manifest, which may be thousands: a start waits for it."""

_AT_A_TIME: Final = 4

LocalBlobs = Callable[[], Mapping[Digest, Path]]
"""The verified blobs of this node, and where they are."""


@dataclass(frozen=True, slots=True)
class KnownChunks:
    """The chunks of a blob, and where this node has some of them, by BLAKE3."""

    index: ChunkIndex
    copies: Mapping[bytes, tuple[Path, int]]

    def is_local(self, span: tuple[int, int]) -> bool:
        """Whether all of a span that begins and ends where chunks do may be copied here."""
        start, end = span
        return bool(self.copies) and all(c.blake3 in self.copies for c in self.index.within(start, end - start))


class RegistryChunks:
    """Asks a registry for chunk indexes."""

    def __init__(self, dialer: Dialer, local_blobs: LocalBlobs) -> None:
        """Takes an open dialer to the registry, and what is asked for the node's blobs."""
        self._dialer = dialer
        self._local_blobs = local_blobs

    async def find(self, digests: Iterable[Digest]) -> dict[str, KnownChunks]:
        """Returns what is known of blobs that are not here, by hash. Never fails: what is not known is left out."""
        local = self._local_blobs()
        wanted = [d for d in digests if d.size_bytes >= _MIN_BYTES and d not in local]
        largest = sorted(local, key=lambda digest: (-digest.size_bytes, digest.hash))[:_MAX_LOCAL]
        paths = {digest.hash: local[digest] for digest in largest if digest.size_bytes >= _MIN_BYTES}
        found: dict[str, KnownChunks] = {}
        slots = asyncio.Semaphore(_AT_A_TIME)

        async def ask(digest: Digest) -> None:
            async with slots:
                known = await self._ask(digest, paths)
            if known is not None:
                found[digest.hash] = known

        try:
            async with asyncio.timeout(_ALL_SECONDS), asyncio.TaskGroup() as group:
                for digest in wanted:
                    group.create_task(ask(digest), name=f"chunk index {digest.hash}")
        except TimeoutError:
            log.warning("chunk indexes came too slowly", wanted=len(wanted), found=len(found))
        return found

    async def _ask(self, digest: Digest, paths: Mapping[str, Path]) -> KnownChunks | None:
        request = pb.GetChunkIndexRequest(hash=digest.hash, local_hashes=paths)
        try:
            response = await self._dialer.stub(ChunkServiceStub).GetChunkIndex(request, timeout=_TIMEOUT_SECONDS)
            return known_from_proto(digest, response, paths)
        except grpc.aio.AioRpcError as error:
            log.debug("no chunk index", hash=digest.hash, code=str(error.code()))
        except InvalidRequest as error:
            log.warning("chunk index refused", hash=digest.hash, error=error.message)
        return None


class ChunkedSource:
    """A source whose blobs are verified chunk by chunk where an index is known, copied from where they are, and read
    from other nodes; a `BlobSource`.
    """

    def __init__(self, inner: BlobSource, known: Mapping[str, KnownChunks], swarms: Swarms | None) -> None:
        """Takes a source, what is known of blobs by hash, and what knows the other nodes; None: there are none."""
        self._inner = inner
        self._known = known
        self._swarms = swarms

    def open(self, digest: Digest) -> BlobReader:
        return self._inner.open(digest)

    def linkable_path(self, digest: Digest) -> Path | None:
        return self._inner.linkable_path(digest)

    def ranged(self, digest: Digest) -> RangedBlob | None:
        ranged = self._inner.ranged(digest)
        known = self._known.get(digest.hash)
        if ranged is None or known is None or known.index.size_bytes != digest.size_bytes:
            return ranged
        lengths, hashes = known.index.lengths, known.index.hashes
        if self._swarms is None:
            local = LocalFirst(VerifiedSource(ranged.source, known.index), known.index, known.copies)
            return RangedBlob(
                local, lengths, lambda: {"node": local.copied_bytes}, part_hashes=hashes, copied=local.copied
            )
        swarm = self._swarms.source(digest, known.index, ranged.source, known.is_local)
        local = LocalFirst(swarm, known.index, known.copies)
        return RangedBlob(
            local,
            lengths,
            lambda: {"node": local.copied_bytes, "peer": swarm.peer_bytes()},
            part_hashes=hashes,
            copied=local.copied,
            guide=swarm,
            end=lambda is_whole: swarm.ended(is_whole=is_whole),
        )


def known_from_proto(digest: Digest, response: pb.GetChunkIndexResponse, paths: Mapping[str, Path]) -> KnownChunks:
    """Reads and checks an index.

    Raises:
        InvalidRequest: INVALID_CHUNK_INDEX.
    """
    starts = range(0, len(response.blake3), BLAKE3_BYTES)
    hashes = [response.blake3[at : at + BLAKE3_BYTES] for at in starts]
    if len(hashes) != len(response.lengths):
        raise InvalidRequest("lengths and hashes of chunks don't agree", reason="INVALID_CHUNK_INDEX")
    index = ChunkIndex(digest.size_bytes, zip(response.lengths, hashes, strict=True))
    # What a registry says of other blobs is compared with the chunk's hash when it is copied.
    copies = {
        hashes[copy.index]: (paths[copy.hash], copy.offset)
        for copy in response.copies
        if copy.hash in paths and copy.index < len(hashes)
    }
    return KnownChunks(index, copies)
