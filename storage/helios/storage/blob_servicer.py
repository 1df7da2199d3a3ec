"""BlobService: what this node has, for the storage agents of others."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self

import grpc
import grpc.aio

from helios.api.storage.v1 import blob_service_pb2 as pb
from helios.api.storage.v1.blob_service_pb2_grpc import BlobServiceServicer
from helios.mesh.errors import BlobNotFound, InvalidRequest, Overloaded, Unavailable
from helios.storage.allocator import give_freed_memory_back, keep_freed_memory
from helios.storage.blob_messages import HEADER_BYTES, encode_piece
from helios.storage.sync.partial import PartialBlobs
from helios.storage.threads import BlockingPool

SERVICE_NAME: Final = "helios.api.storage.v1.BlobService"
PIECE_BYTES: Final = 1 << 20
"""1 MiB: where a gRPC stream is fastest; 4 MiB take half as much again."""

_MAY_NOT_WAIT: Final = getattr(os, "RWF_NOWAIT", None)
"""Reads what is in memory and nothing else. Source: preadv2(2)."""

_IDLE_SECONDS: Final = 10.0
"""Longer than between two blobs of a revision."""

_MAX_HASHES: Final = 10_000
_MAX_WAIT_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 1.0
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class BlobServicer(BlobServiceServicer):
    """Serves the blobs of this node. An async context manager: leaving waits for its threads."""

    def __init__(
        self, places: Callable[[str], Iterable[Path]], *, max_reads: int, partials: PartialBlobs | None = None
    ) -> None:
        """Takes where a blob may be, the fastest place first, how many ranges are read at a time for all peers, and
        what is here of blobs that are not whole.

        A file under a blob's name is whole and verified, whatever tier it is in.
        """
        self._places = places
        self._partials = partials or PartialBlobs()
        self._max_reads = max_reads
        self._reads = 0
        self._idle: asyncio.TimerHandle | None = None
        self._pool = BlockingPool("serve", min(4, max_reads))

    async def __aenter__(self) -> Self:
        keep_freed_memory()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._idle is not None:
            self._idle.cancel()
        await self._pool.close()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service; ReadBlob's messages are encoded by `blob_messages`, not by protobuf."""
        handlers: Any = {
            "FindBlobs": grpc.unary_unary_rpc_method_handler(
                self.FindBlobs,
                request_deserializer=pb.FindBlobsRequest.FromString,
                response_serializer=pb.FindBlobsResponse.SerializeToString,
            ),
            "FindChunks": grpc.unary_unary_rpc_method_handler(
                self.FindChunks,
                request_deserializer=pb.FindChunksRequest.FromString,
                response_serializer=pb.FindChunksResponse.SerializeToString,
            ),
            "ReadBlob": grpc.unary_stream_rpc_method_handler(
                self.ReadBlob, request_deserializer=pb.ReadBlobRequest.FromString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def FindBlobs(self, request: pb.FindBlobsRequest, context: Any) -> pb.FindBlobsResponse:
        """Says which blobs are here."""
        del context
        if len(request.hashes) > _MAX_HASHES:
            raise InvalidRequest(f"at most {_MAX_HASHES} blobs are looked for", reason="TOO_MANY_BLOBS")
        hashes = [_check_hash(hash_) for hash_ in request.hashes]
        return pb.FindBlobsResponse(hashes=await self._pool.run(self._find, hashes))

    async def FindChunks(self, request: pb.FindChunksRequest, context: Any) -> pb.FindChunksResponse:
        """Says which parts of a blob are here, as soon as the caller does not know it."""
        del context
        hash_ = _check_hash(request.hash)
        end = time.monotonic() + min(request.wait.ToTimedelta().total_seconds(), _MAX_WAIT_SECONDS)
        while (state := self._partials.state(hash_)) is not None:
            version, spans = state
            left = end - time.monotonic()
            if version != request.known_version or left <= 0:
                parts = [pb.BlobSpan(offset=start, length=stop - start) for start, stop in spans]
                return pb.FindChunksResponse(version=version, spans=parts)
            await self._partials.wait(left)
        is_whole = bool(await self._pool.run(self._find, [hash_]))
        return pb.FindChunksResponse(version=int(is_whole), is_whole=is_whole)

    async def ReadBlob(  # type: ignore[override]  # messages that are encoded already
        self, request: pb.ReadBlobRequest, context: Any
    ) -> AsyncIterator[bytes]:
        """Sends a range."""
        del context
        if self._reads >= self._max_reads:
            raise Overloaded("this node serves as many peers as it may", retry_after_seconds=_RETRY_SECONDS)
        self._reads += 1
        # A reader that leaves while the blob is opened gets no answer from the thread, and must close it all the same.
        opened: list[int] = []
        try:
            # Held open, so that an eviction in the middle does not end it.
            descriptor, size_bytes = await self._pool.run(self._open, request, opened)
            if request.offset > size_bytes:
                raise InvalidRequest("the range begins behind the blob's end", reason="INVALID_RANGE")
            end = min(size_bytes, request.offset + request.limit) if request.limit else size_bytes
            buffer = bytearray(HEADER_BYTES + min(PIECE_BYTES, max(0, end - request.offset)))
            for offset in range(request.offset, end, PIECE_BYTES):
                length = min(PIECE_BYTES, end - offset)
                message = _read_cached(descriptor, offset, length, buffer)
                if message is None:
                    message = await self._pool.run(_read, descriptor, offset, length, buffer)
                yield message
        finally:
            for descriptor in opened:
                os.close(descriptor)
            self._reads -= 1
            if not self._reads:
                self._rest()

    def _rest(self) -> None:
        """Nobody reads any more, or for a moment: a node at rest keeps no memory for them."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, give_freed_memory_back)

    def _find(self, hashes: list[str]) -> list[str]:
        return [hash_ for hash_ in hashes if any(path.is_file() for path in self._places(hash_))]

    def _open(self, request: pb.ReadBlobRequest, opened: list[int]) -> tuple[int, int]:
        hash_ = _check_hash(request.hash)
        whole = list(self._places(hash_))
        partial = self._partials.find(hash_, request.offset, request.offset + request.limit) if request.limit else None
        # A fetch may end between the looks: its file has got another of these names then.
        for path in (*whole, *((partial, *whole) if partial is not None else ())):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Unavailable(f"the blob can't be read: {error.strerror}", reason="TIER_FAILED") from error
            opened.append(descriptor)
            return descriptor, os.fstat(descriptor).st_size
        raise BlobNotFound("the blob is not here, or not this part of it", metadata={"hash": hash_})


def _read_cached(descriptor: int, offset: int, length: int, buffer: bytearray) -> bytes | None:
    """A range as a message, if all of it is in memory: reading it costs less then than a visit to a thread, and what
    threads allocate goes back to the kernel each time, which halves what a node sends.
    """
    if _MAY_NOT_WAIT is None:
        return None
    try:
        count = os.preadv(descriptor, [memoryview(buffer)[HEADER_BYTES : HEADER_BYTES + length]], offset, _MAY_NOT_WAIT)
    except OSError:
        # It is not in memory, or the file system can't tell; where the disk fails, the thread finds that too.
        return None
    return encode_piece(buffer, count) if count == length else None


def _read(descriptor: int, offset: int, length: int, buffer: bytearray) -> bytes:
    """Reads a range as a message."""
    try:
        count = os.preadv(descriptor, [memoryview(buffer)[HEADER_BYTES : HEADER_BYTES + length]], offset)
    except OSError as error:
        raise Unavailable(f"the blob can't be read: {error.strerror}", reason="TIER_FAILED") from error
    return encode_piece(buffer, count)


def _check_hash(hash_: str) -> str:
    if _HASH.fullmatch(hash_) is None:
        raise InvalidRequest("a blob is named by 64 lower-case hexadecimal digits", reason="INVALID_DIGEST")
    return hash_
