"""ChunkService over the store of chunk indexes."""

import re
from typing import Any, Final

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.api.registry.v1.chunk_service_pb2_grpc import ChunkServiceServicer
from helios.mesh.errors import InvalidRequest
from helios.registry.chunk_store import ChunkStore

_MAX_BLOBS: Final = 4_096
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class ChunkServicer(ChunkServiceServicer):
    """Answers the contract."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    async def GetChunkIndex(self, request: pb.GetChunkIndexRequest, context: Any) -> pb.GetChunkIndexResponse:
        """Returns a blob's chunks, and where the caller has some of them."""
        del context
        if len(request.local_hashes) > _MAX_BLOBS:
            raise InvalidRequest(
                f"at most {_MAX_BLOBS} blobs are compared", reason="TOO_MANY_BLOBS", metadata={"param": "local_hashes"}
            )
        hash_ = _check_hash(request.hash)
        others = [_check_hash(other) for other in request.local_hashes if other != hash_]
        index = await self._store.get(hash_)
        copies = await self._store.find_copies(index, others)
        return pb.GetChunkIndexResponse(
            lengths=index.lengths,
            blake3=b"".join(index.hashes),
            copies=[pb.ChunkCopy(index=copy.index, hash=copy.blob, offset=copy.offset) for copy in copies],
        )


def _check_hash(hash_: str) -> str:
    if _HASH.fullmatch(hash_) is None:
        raise InvalidRequest("a blob is named by 64 lower-case hexadecimal digits", reason="INVALID_DIGEST")
    return hash_
