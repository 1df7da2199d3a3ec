"""Chunk indexes: computed after blobs were stored, true to their bytes, gone with them, and shared chunks are found."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save
from sqlalchemy import delete, insert

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.mesh.errors import InvalidRequest, NotFound, Unavailable
from helios.registry import chunk_indexer
from helios.registry.chunk_indexer import ChunkIndexer
from helios.registry.chunk_servicer import ChunkServicer
from helios.registry.chunk_store import ChunkStore
from helios.registry.database import Database
from helios.registry.tables import blobs

MIB = 1 << 20


async def unchanged() -> int:
    """Reads the version of a registry whose models stay as they are."""
    return 0


@dataclass
class Place:
    """A database, a blob store, and what indexes one into the other."""

    directory: Path
    database: Database
    store: ChunkStore
    indexer: ChunkIndexer

    async def add(self, content: bytes, *, is_file_there: bool = True) -> str:
        """Stores a blob, with its row."""
        hash_ = hashlib.sha256(content).hexdigest()
        if is_file_there:
            (self.directory / hash_).write_bytes(content)
        async with self.database.transaction() as connection:
            await connection.execute(insert(blobs).values(hash=hash_, size_bytes=len(content)))
        return hash_

    async def ask(self, blob: str, *local: str) -> pb.GetChunkIndexResponse:
        context: Any = None
        request = pb.GetChunkIndexRequest(hash=blob, local_hashes=local)
        return await ChunkServicer(self.store).GetChunkIndex(request, context)


@asynccontextmanager
async def open_place(directory: Path) -> AsyncIterator[Place]:
    database = await Database.open(directory / "registry.db")
    files = directory / "files"
    files.mkdir()
    store = ChunkStore(database)
    yield Place(files, database, store, ChunkIndexer(store, lambda hash_: (files / hash_).open("rb"), unchanged))
    await database.close()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path) as opened:
        yield opened


def weights(seed: int, **changed: int) -> bytes:
    """Four tensors of 1.5 MiB; named ones have other values, and another header makes them begin elsewhere."""
    tensors = {
        name: np.random.default_rng(changed.get(name, number)).integers(0, 255, 3 * MIB // 2, dtype=np.uint8)
        for number, name in enumerate(("a", "b", "c", "d"))
    }
    return save(tensors, metadata={"note": "x" * seed})


async def test_an_index_is_what_the_bytes_are(place: Place) -> None:
    content = weights(1)
    blob = await place.add(content)
    assert await place.indexer.index_some() == 1
    assert await place.indexer.index_some() == 0
    answer = await place.ask(blob)
    offset = 0
    for number, length in enumerate(answer.lengths):
        assert answer.blake3[32 * number : 32 * number + 32] == blake3(content[offset : offset + length]).digest()
        offset += length
    assert offset == len(content)
    assert len(answer.lengths) == 5, "a header and four tensors"


async def test_what_is_no_safetensors_file_is_indexed_too(place: Place) -> None:
    blob = await place.add(random.Random(1).randbytes(5 * MIB))
    await place.indexer.index_some()
    assert list((await place.ask(blob)).lengths) == [4 * MIB, MIB]


async def test_a_fine_tune_finds_its_base(place: Place) -> None:
    base, tuned = await place.add(weights(1)), await place.add(weights(900, b=77))
    other = await place.add(random.Random(2).randbytes(2 * MIB))
    await place.indexer.index_some()
    answer = await place.ask(tuned, base, other, "0" * 64, tuned)
    base_answer = await place.ask(base)
    starts = [sum(base_answer.lengths[:number]) for number in range(5)]
    assert [(copy.index, copy.hash, copy.offset) for copy in answer.copies] == [
        (1, base, starts[1]),
        (3, base, starts[3]),
        (4, base, starts[4]),
    ]


async def test_small_blobs_and_missing_ones_have_no_index(place: Place) -> None:
    small = await place.add(b"x" * 1000)
    lost = await place.add(b"y" * 2 * MIB, is_file_there=False)
    good = await place.add(b"z" * 2 * MIB)
    await place.indexer.index_some()
    assert await place.indexer.index_some() == 0, "one that can't be read holds nothing up"
    await place.ask(good)
    for blob in (small, lost, "0" * 64):
        with pytest.raises(NotFound) as caught:
            await place.ask(blob)
        assert caught.value.reason == "CHUNK_INDEX_NOT_FOUND"


async def test_a_bucket_that_was_away_costs_no_index(place: Place) -> None:
    content = weights(1)
    blob = await place.add(content)
    is_away = True

    def open_blob(hash_: str) -> BinaryIO:
        if is_away:
            raise Unavailable("the bucket is away")
        return (place.directory / hash_).open("rb")

    indexer = ChunkIndexer(place.store, open_blob, unchanged)
    with pytest.raises(Unavailable):
        await indexer.index_some()
    is_away = False
    assert await indexer.index_some() == 1
    assert sum((await place.ask(blob)).lengths) == len(content)


async def test_an_index_goes_with_its_blob(place: Place) -> None:
    blob = await place.add(weights(1))
    await place.indexer.index_some()
    async with place.database.transaction() as connection:
        await connection.execute(delete(blobs))
    with pytest.raises(NotFound):
        await place.ask(blob)


async def test_wrong_names_are_refused(place: Place) -> None:
    for hash_, local in (("", []), ("A" * 64, []), ("0" * 64, ["../x"]), ("0" * 64, ["0" * 64] * 4097)):
        with pytest.raises(InvalidRequest):
            await place.ask(hash_, *local)


async def test_looks_again_when_a_model_has_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, looks, version = 0, 0, 1

    class Counted(ChunkStore):
        async def missing(self, min_bytes: int, limit: int) -> list[tuple[str, int]]:
            nonlocal looks
            looks += 1
            return await super().missing(min_bytes, limit)

    async def read_version() -> int:
        nonlocal reads
        reads += 1
        return version

    monkeypatch.setattr(chunk_indexer, "_POLL_SECONDS", 0.001)
    indexer = ChunkIndexer(Counted(place.database), lambda hash_: (place.directory / hash_).open("rb"), read_version)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(indexer.run(), name="index")
        while reads < 5:
            await asyncio.sleep(0.001)
        assert looks == 1
        version = 2
        while looks < 2:
            await asyncio.sleep(0.001)
        running.cancel()
