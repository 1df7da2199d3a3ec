"""Chunks of a blob: verified wherever they come from, copied where they are, and no source that lies is asked twice."""

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import BlobNotFound, InvalidRequest, Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.mesh.transfer.source import ChunkMismatch, RangeSource, Sink, SourceState
from helios.storage.chunk_index import ChunkIndex
from helios.storage.swarm import Member, SourceBook, Swarm
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


def _swarm(*sources: Bytes, ranks: tuple[int, ...] = ()) -> Swarm:
    ranks = ranks or (0,) * len(sources)
    members = [
        Member(str(number), VerifiedSource(source, INDEX), rank)
        for number, (source, rank) in enumerate(zip(sources, ranks, strict=True))
    ]
    return Swarm(members, len(CONTENT))


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


def test_several_sources_are_read_at_once(tmp_path: Path) -> None:
    sources = Bytes(), Bytes(), Bytes()
    _fetch(_swarm(*sources), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert sum(length for source in sources for _, length in source.reads) == len(CONTENT)


def test_a_source_that_lies_is_asked_once_and_costs_no_byte(tmp_path: Path) -> None:
    liar, honest = Bytes(CONTENT[::-1]), Bytes()
    swarm = _swarm(liar, honest)
    for number in range(3):
        _fetch(swarm, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == CONTENT
    assert len(liar.reads) <= OPTIONS.in_flight
    assert swarm.read_bytes()["0"] == 0


def test_a_source_that_fails_or_sends_too_little_is_replaced_by_the_next_rank(tmp_path: Path) -> None:
    broken, short, cloud = Bytes(fail_count=1000), Bytes(short_bytes=1), Bytes()
    swarm = _swarm(broken, short, cloud, ranks=(0, 0, 1))
    _fetch(swarm, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert swarm.read_bytes() == {"0": 0, "1": 0, "2": len(CONTENT)}


def test_when_all_sources_lie_the_blob_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ChunkMismatch, Unavailable)):
        _fetch(_swarm(Bytes(CONTENT[::-1])), tmp_path / "blob")


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


class BookRules(RuleBasedStateMachine):
    """Reads begin and end in any way."""

    RANKS = (0, 0, 0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.book = SourceBook(self.RANKS)
        self.now = 0.0
        self.reads: list[int] = []
        self.liars: set[int] = set()
        self.resting: dict[int, float] = {}
        self.failures = dict.fromkeys(range(4), 0)

    @rule()
    def begin(self) -> None:
        index = self.book.pick(self.now)
        usable = {i for i in range(4) if i not in self.liars and self.failures[i] < 3}
        assert (index is None) == (not usable)
        if index is None:
            return
        assert index in usable
        awake = {i for i in usable if self.resting.get(i, 0.0) <= self.now}
        if awake:
            assert self.RANKS[index] == min(self.RANKS[i] for i in awake)
            peers = [i for i in awake if self.RANKS[i] == self.RANKS[index]]
            assert self.reads.count(index) == min(self.reads.count(i) for i in peers)
        self.book.begin(index)
        self.reads.append(index)

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "lied", "ended"]))
    def end(self, data: st.DataObject, how: str) -> None:
        index = data.draw(st.sampled_from(self.reads))
        self.reads.remove(index)
        if how == "succeeded":
            self.book.succeeded(index)
            self.failures[index] = 0 if self.failures[index] < 3 else 3
        elif how == "failed":
            was_dropped = index in self.liars or self.failures[index] >= 3
            if self.resting.get(index, 0.0) <= self.now:
                self.failures[index] += 1
                self.resting[index] = self.now + 0.5 * 2.0 ** (self.failures[index] - 1)
            is_dropped = self.failures[index] >= 3 and not was_dropped
            assert self.book.failed(index, self.now) == is_dropped
        elif how == "lied":
            self.liars.add(index)
            self.book.lied(index)
        else:
            self.book.ended(index)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def never_picks_a_liar(self) -> None:
        assert self.book.pick(self.now) not in self.liars


TestSourceBook = BookRules.TestCase


def test_reads_that_fail_together_are_one_failure() -> None:
    """A store that resets all of a node's connections at once is asked again."""
    book = SourceBook((1,))
    for _ in range(8):
        book.begin(0)
    assert [book.failed(0, 10.0) for _ in range(8)] == [False] * 8
    assert book.pick(10.5) == 0
    for now, is_dropped in ((10.5, False), (11.5, True)):
        book.begin(0)
        assert book.failed(0, now) is is_dropped
    assert book.pick(20.0) is None
