"""Chunks of a blob: verified wherever they come from, and copied where they are."""

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from blake3 import blake3
from hypothesis import given

from helios.mesh.errors import BlobNotFound, InvalidRequest
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.mesh.transfer.source import ChunkMismatch, RangeSource, Sink, SourceState
from helios.storage.chunk_index import ChunkIndex
from helios.storage.verified_source import LocalFirst, VerifiedSource
from tests.storage.harness import digest_of

CHUNK = 1000
CONTENT = random.Random(9).randbytes(20 * CHUNK + 17)
DIGEST = digest_of(CONTENT)
OPTIONS = TransferOptions(
    chunk_bytes=3 * CHUNK, in_flight=4, retry=RetryPolicy(max_attempts=6, base_seconds=0.01, cap_seconds=0.05)
)


def index_of(content: bytes, chunk_bytes: int = CHUNK) -> ChunkIndex:
    pieces = [content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes)]
    return ChunkIndex(len(content), [(len(piece), blake3(piece).digest()) for piece in pieces])


INDEX = index_of(CONTENT)


class Bytes:
    """A source in memory that may lie, fail or send too little."""

    def __init__(self, content: bytes = CONTENT, *, fail_count: int = 0, short_bytes: int = 0) -> None:
        self.content = content
        self.fail_count = fail_count
        self.short_bytes = short_bytes
        self.reads: list[tuple[int, int]] = []

    def describe(self) -> SourceState:
        return SourceState(len(self.content))

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        self.reads.append((offset, length))
        if self.fail_count:
            self.fail_count -= 1
            raise BlobNotFound("gone")
        body = memoryview(self.content)[offset : offset + length - self.short_bytes]
        for at in range(0, len(body), 300):
            sink(body[at : at + 300])

    def close(self) -> None:
        """Nothing is open."""


def _fetch(source: RangeSource, target: Path) -> int:
    wanted = Wanted(DIGEST.size_bytes, DIGEST.hash, INDEX.lengths, INDEX.hashes)
    return Downloader(OPTIONS).fetch(Transfer(source, target, wanted)).fetched_bytes


def test_an_index_is_that_of_its_blob() -> None:
    hash_ = b"\0" * 32
    for chunks in ([(5, hash_)], [(10, b"short")], [(0, hash_), (10, hash_)], []):
        with pytest.raises(InvalidRequest):
            ChunkIndex(10, chunks)
    assert ChunkIndex(0, []).chunks == ()


@given(first=st.integers(0, 20), count=st.integers(1, 21))
def test_a_range_holds_its_chunks(first: int, count: int) -> None:
    chunks = INDEX.chunks[first : first + count]
    length = sum(chunk.length for chunk in chunks)
    assert tuple(INDEX.within(chunks[0].offset, length)) == chunks


def test_a_verified_source_passes_what_is_right() -> None:
    got = bytearray()
    VerifiedSource(Bytes(), INDEX).read(SourceState(len(CONTENT)), 3 * CHUNK, 2 * CHUNK, got.extend)
    assert got == CONTENT[3 * CHUNK : 5 * CHUNK]


@pytest.mark.parametrize("flip_at", [3 * CHUNK, 4 * CHUNK - 1, 5 * CHUNK - 1])
def test_a_flipped_bit_ends_a_read(flip_at: int) -> None:
    content = bytearray(CONTENT)
    content[flip_at] ^= 1
    with pytest.raises(ChunkMismatch):
        VerifiedSource(Bytes(bytes(content)), INDEX).read(
            SourceState(len(CONTENT)), 3 * CHUNK, 2 * CHUNK, lambda _: None
        )


def test_a_fine_tune_fetches_only_what_its_base_does_not_have(tmp_path: Path) -> None:
    base = bytearray(CONTENT)
    base[5 * CHUNK : 7 * CHUNK] = bytes(2 * CHUNK)
    (tmp_path / "base").write_bytes(base)
    copies = {chunk.blake3: (tmp_path / "base", chunk.offset) for chunk in index_of(bytes(base)).chunks}
    remote = Bytes()
    source = LocalFirst(VerifiedSource(remote, INDEX), INDEX, copies)
    _fetch(source, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert sum(length for _, length in remote.reads) == 2 * CHUNK
    assert source.copied_bytes == len(CONTENT) - 2 * CHUNK


def test_a_local_copy_that_is_gone_or_damaged_is_fetched(tmp_path: Path) -> None:
    damaged = bytearray(CONTENT)
    damaged[10] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    copies = {chunk.blake3: (tmp_path / "damaged", chunk.offset) for chunk in INDEX.chunks[:10]}
    copies |= {chunk.blake3: (tmp_path / "gone", chunk.offset) for chunk in INDEX.chunks[10:]}
    remote = Bytes()
    _fetch(LocalFirst(VerifiedSource(remote, INDEX), INDEX, copies), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert sum(length for _, length in remote.reads) == len(CONTENT) - 9 * CHUNK
