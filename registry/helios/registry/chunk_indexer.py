"""Computing chunk indexes in the background, one blob at a time, after blobs were stored.

Each blob is read once more: from the page cache where an ingest has just left it, or from the bucket that the registry
keeps its blobs in, which is near it. Nobody waits for an index: without one, a blob is fetched as a whole and verified
by its sha256.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import BinaryIO, Final

import structlog
from blake3 import blake3

from helios.mesh.errors import Conflict, HeliosError, InvalidRequest, Unavailable
from helios.registry import offload
from helios.registry.chunk_store import ChunkIndex, ChunkStore
from helios.registry.chunks import plan_chunks, tensor_starts
from helios.registry.safetensors_header import LENGTH_BYTES, header_length, parse_header

log = structlog.get_logger()

# Below, a request is the cost, not its bytes.
MIN_BYTES: Final = 1 << 20
# How late an index may be begun after its ingest.
_POLL_SECONDS: Final = 5.0
# How often blobs without an index are looked for though no model has changed: an artifact's. With a million blobs a
# look takes the database a second.
_LOOK_SECONDS: Final = 60.0
_BATCH: Final = 16


class ChunkIndexer:
    """Indexes what has no index yet."""

    def __init__(
        self,
        store: ChunkStore,
        open_blob: Callable[[str], BinaryIO],
        read_version: Callable[[], Awaitable[int]],
    ) -> None:
        """Takes where indexes are kept, what opens a blob by its hash, blocking, and what changes with any model."""
        self._store = store
        self._read_version = read_version
        self._open_blob = open_blob
        # What can't be read now is looked at again by the next process.
        self._failed: set[str] = set()

    async def run(self) -> None:
        """Indexes for ever. Replicas of the registry may do the same work twice, with the same result."""
        seen, due = -1, 0.0
        while True:
            # Before the look: what comes meanwhile is looked for next time.
            version = await self._read_version()
            if version != seen or time.monotonic() >= due:
                while await self.index_some():
                    pass
                seen, due = version, time.monotonic() + _LOOK_SECONDS
            await asyncio.sleep(_POLL_SECONDS)

    async def index_some(self) -> int:
        """Indexes some blobs; returns how many. Raises Unavailable: the bucket or the database is away."""
        count = 0
        for blob, size_bytes in await self._store.missing(MIN_BYTES, _BATCH + len(self._failed)):
            if blob in self._failed:
                continue
            try:
                await self._store.put(blob, await offload.run(partial(self._index, blob, size_bytes)))
                count += 1
            except Conflict:
                # It was deleted meanwhile.
                continue
            except Unavailable:
                # That says nothing of the blob, which is begun again when whoever runs this does.
                raise
            except (HeliosError, OSError) as error:
                self._failed.add(blob)
                log.warning("blob can't be indexed", blob=blob, error=str(error))
        return count

    def _index(self, blob: str, size_bytes: int, stop: offload.Stop) -> ChunkIndex:
        with self._open_blob(blob) as file:
            lengths = plan_chunks(size_bytes, _starts(file, size_bytes))
            file.seek(0)
            hashes = []
            for length in lengths:
                stop.check()
                hashes.append(blake3(file.read(length)).digest())
        return ChunkIndex(tuple(lengths), tuple(hashes))


def _starts(file: BinaryIO, size_bytes: int) -> list[int]:
    """Where the tensors of a safetensors file begin; of any other file nothing begins anywhere."""
    try:
        length = header_length(file.read(LENGTH_BYTES), size_bytes, "blob")
        return tensor_starts(parse_header(file.read(length), size_bytes, "blob"), length)
    except InvalidRequest:
        return []
