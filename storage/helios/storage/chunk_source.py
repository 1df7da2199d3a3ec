"""Chunk indexes from the registry, and what they make of a source: verified chunk by chunk, read from this node's other
blobs first, then from peers, then from the registry's store.

An index is a convenience: without one (an older registry, a blob that was stored a moment ago, a small one) a blob is
fetched as a whole from the store and verified by its sha256, as all are in the end. Peers, whom nobody trusts, are not
read without one.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
import structlog

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.api.registry.v1.chunk_service_pb2_grpc import ChunkServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest
from helios.mesh.transfer.source import RangeSource
from helios.storage.chunk_index import BLAKE3_BYTES, ChunkIndex
from helios.storage.fetch import BlobReader, BlobSource, RangedBlob
from helios.storage.manifest import Digest
from helios.storage.swarm import Member, Swarm
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

_PEER_RANK: Final = 0
_STORE_RANK: Final = 1
"""A bucket costs money and is far; it is read where no peer has what is wanted."""

LocalBlobs = Callable[[], Mapping[Digest, Path]]
"""The verified blobs of this node, and where they are."""


@dataclass(frozen=True, slots=True)
class KnownChunks:
    """The chunks of a blob, and where this node has some of them, by BLAKE3."""

    index: ChunkIndex
    copies: Mapping[bytes, tuple[Path, int]]


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
    """A source whose blobs are verified chunk by chunk where an index is known, and copied from where they are; a
    `BlobSource`.
    """

    def __init__(
        self,
        inner: BlobSource,
        known: Mapping[str, KnownChunks],
        holders: Mapping[str, Sequence[str]],
        open_peer: Callable[[str, Digest], RangeSource],
    ) -> None:
        """Takes a source, what is known of blobs by hash, which peers have them, and what opens a peer's blob."""
        self._inner = inner
        self._known = known
        self._holders = holders
        self._open_peer = open_peer

    def open(self, digest: Digest) -> BlobReader:
        return self._inner.open(digest)

    def linkable_path(self, digest: Digest) -> Path | None:
        return self._inner.linkable_path(digest)

    def ranged(self, digest: Digest) -> RangedBlob | None:
        ranged = self._inner.ranged(digest)
        known = self._known.get(digest.hash)
        if ranged is None or known is None or known.index.size_bytes != digest.size_bytes:
            return ranged
        source: RangeSource = VerifiedSource(ranged.source, known.index)
        swarm: Swarm | None = None
        holders = self._holders.get(digest.hash, ())
        if holders:
            peers = [VerifiedSource(self._open_peer(holder, digest), known.index) for holder in holders]
            members = [Member(name, peer, _PEER_RANK) for name, peer in zip(holders, peers, strict=True)]
            source = swarm = Swarm([*members, Member("store", source, _STORE_RANK)], digest.size_bytes)
        local = LocalFirst(source, known.index, known.copies)

        def bytes_elsewhere() -> dict[str, int]:
            read_bytes = swarm.read_bytes() if swarm is not None else {}
            return {"node": local.copied_bytes, "peer": sum(read_bytes.get(holder, 0) for holder in holders)}

        hashes = known.index.hashes
        return RangedBlob(local, known.index.lengths, bytes_elsewhere, part_hashes=hashes, copied=local.copied)


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
