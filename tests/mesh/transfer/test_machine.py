"""The machine of one transfer: every chunk is fetched, none is believed unread, nothing runs away from the hash."""

import random
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.transfer.machine import (
    Chunk,
    ChunkState,
    Fetch,
    Finished,
    RetryPolicy,
    TransferMachine,
    Verify,
    Wait,
    aligned_chunks,
    parts_of_chunks,
    uniform_chunks,
)

CHUNK_COUNT = 12
WINDOW = 4
POLICY = RetryPolicy(max_attempts=4, base_seconds=1.0, cap_seconds=4.0, max_retry_after_seconds=60.0)


@given(size=st.integers(0, 10_000), chunk=st.integers(1, 3000))
def test_chunks_cover_the_blob_once(size: int, chunk: int) -> None:
    chunks = uniform_chunks(size, chunk)
    assert sum(c.length for c in chunks) == size
    end = 0
    for index, c in enumerate(chunks):
        assert (c.index, c.offset) == (index, end)
        assert 0 < c.length <= chunk
        end += c.length


@given(lengths=st.lists(st.integers(1, 100), max_size=30), chunk_bytes=st.integers(1, 200))
def test_parts_are_never_cut(lengths: list[int], chunk_bytes: int) -> None:
    chunks = aligned_chunks(lengths, chunk_bytes)
    offsets = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    assert {chunk.offset for chunk in chunks} <= set(offsets)
    assert sum(chunk.length for chunk in chunks) == sum(lengths)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.length <= chunk_bytes or chunk.length in lengths for chunk in chunks)
    parts = parts_of_chunks(chunks, lengths, [bytes([index % 256]) for index in range(len(lengths))])
    assert [sum(part.length for part in of_chunk) for of_chunk in parts] == [chunk.length for chunk in chunks]
    assert [part.offset for of_chunk in parts for part in of_chunk] == offsets[:-1]
    assert [part.blake3[0] for of_chunk in parts for part in of_chunk] == [n % 256 for n in range(len(lengths))]


@given(
    attempt=st.integers(1, 10),
    jitter=st.floats(0, 1, exclude_max=True),
    retry_after=st.none() | st.floats(0, 200, allow_nan=False),
)
def test_a_pause_is_never_shorter_than_the_source_asked_for(
    attempt: int, jitter: float, retry_after: float | None
) -> None:
    delay = POLICY.delay_seconds(attempt, jitter, retry_after)
    if attempt >= POLICY.max_attempts or (retry_after or 0) > POLICY.max_retry_after_seconds:
        assert delay is None
    else:
        assert delay is not None
        assert (retry_after or 0) <= delay <= (retry_after or 0) + POLICY.cap_seconds


def test_a_retry_after_holds_back_all_chunks() -> None:
    machine = TransferMachine(uniform_chunks(30, 10), {}, policy=POLICY, window_count=3)
    assert machine.next_job(0.0) == Fetch(Chunk(0, 0, 10))
    assert machine.failed(0, 0.0, jitter=0.0, retry_after_seconds=5.0)
    assert machine.next_job(1.0) == Wait(4.0)
    assert machine.next_job(5.0) == Fetch(Chunk(0, 0, 10))


def test_a_blob_without_bytes_is_finished_at_once() -> None:
    machine = TransferMachine([], {}, policy=POLICY, window_count=3)
    assert machine.next_job(0.0) == Finished()
    assert machine.frontier_bytes == 0


def test_claims_of_chunks_that_do_not_exist_count_for_nothing() -> None:
    machine = TransferMachine(uniform_chunks(10, 10), {7: b"x"}, policy=POLICY, window_count=3)
    assert isinstance(machine.next_job(0.0), Fetch)


def test_the_last_failure_is_told() -> None:
    machine = TransferMachine(uniform_chunks(10, 10), {}, policy=POLICY, window_count=3)
    now = 0.0
    for attempt in range(1, POLICY.max_attempts + 1):
        job = machine.next_job(now)
        assert isinstance(job, Fetch), attempt
        assert machine.failed(0, now, jitter=0.999) == (attempt < POLICY.max_attempts)
        now += 100.0


def test_only_what_was_begun_can_end() -> None:
    machine = TransferMachine(uniform_chunks(10, 10), {}, policy=POLICY, window_count=3)
    with pytest.raises(AssertionError):
        machine.written(0)


class TransferRules(RuleBasedStateMachine):
    """Workers in any order, with any failures; a claim is true or not."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks = uniform_chunks(CHUNK_COUNT * 10 - 3, 10)
        self.claims = {1: b"true", 2: b"false", 5: b"true"}
        self.machine = TransferMachine(self.chunks, self.claims, policy=POLICY, window_count=WINDOW)
        self.now = 0.0
        self.fetching: set[int] = set()
        self.verifying: set[int] = set()
        self.written: set[int] = set()
        self.verified: set[int] = set()
        self.frontier = 0
        self.has_failed = False

    @precondition(lambda self: not self.has_failed)
    @rule()
    def begin(self) -> None:
        job = self.machine.next_job(self.now)
        match job:
            case Fetch(chunk):
                assert chunk.index not in self.fetching | self.verifying | self.written
                assert chunk.index not in self.claims or self.claims[chunk.index] == b"false"
                self.fetching.add(chunk.index)
            case Verify(chunk, blake3):
                assert self.claims[chunk.index] == blake3
                self.verifying.add(chunk.index)
            case Finished():
                assert self.written == set(range(CHUNK_COUNT))
            case Wait(seconds):
                assert seconds is None or seconds > 0
                # Whoever waits for an event must have one to wait for.
                assert seconds is not None or self.fetching or self.verifying
        begun = self.fetching | self.verifying
        assert all(index < self.first_unwritten + WINDOW for index in begun)

    @precondition(lambda self: self.fetching)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.remove(index)
        self.written.add(index)
        self.machine.written(index)

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), jitter=st.floats(0, 0.99), retry_after=st.none() | st.floats(0, 10))
    def fail(self, data: st.DataObject, jitter: float, retry_after: float | None) -> None:
        index = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.remove(index)
        if not self.machine.failed(index, self.now, jitter=jitter, retry_after_seconds=retry_after):
            self.has_failed = True

    @precondition(lambda self: self.verifying)
    @rule(data=st.data())
    def verify(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.verifying)))
        self.verifying.remove(index)
        if self.claims[index] == b"true":
            self.written.add(index)
            self.verified.add(index)
            self.machine.written(index)
        else:
            self.machine.refuted(index)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @property
    def first_unwritten(self) -> int:
        return next((index for index in range(CHUNK_COUNT) if index not in self.written), CHUNK_COUNT)

    @invariant()
    def every_byte_before_the_frontier_is_written_and_it_never_goes_back(self) -> None:
        frontier = self.machine.frontier_bytes
        assert frontier >= self.frontier
        self.frontier = frontier
        assert frontier == sum(chunk.length for chunk in self.chunks[: self.first_unwritten])
        assert self.machine.written_bytes == sum(self.chunks[index].length for index in self.written)

    @invariant()
    def a_claim_counts_only_after_it_was_read_back(self) -> None:
        for index, claim in self.claims.items():
            if claim == b"true" and self.machine.state(index) is ChunkState.WRITTEN:
                assert index in self.verified

    def teardown(self) -> None:
        """Whatever happened, a transfer whose source answers from now on comes to its end."""
        if self.has_failed:
            return
        for _ in range(10 * CHUNK_COUNT):
            for index in list(self.fetching):
                self.fetching.remove(index)
                self.machine.written(index)
            for index in list(self.verifying):
                self.verifying.remove(index)
                self.machine.refuted(index)
            job = self.machine.next_job(self.now)
            match job:
                case Fetch(chunk):
                    self.fetching.add(chunk.index)
                case Verify(chunk, _):
                    self.verifying.add(chunk.index)
                case Finished():
                    return
                case Wait(seconds):
                    assert seconds is not None, "nothing runs, so nothing can end"
                    self.now += seconds + 1e-6
        raise AssertionError("the transfer does not end")


TestTransferMachine = TransferRules.TestCase


@given(seed=st.integers(0, 10**9), claimed=st.sets(st.integers(0, 19)), window_count=st.integers(1, 6))
def test_a_guided_transfer_begins_what_is_chosen_within_the_window(
    seed: int, claimed: set[int], window_count: int
) -> None:
    rng = random.Random(seed)
    chunks = uniform_chunks(200, 10)
    machine = TransferMachine(
        chunks, dict.fromkeys(claimed, b"x"), policy=RetryPolicy(max_attempts=1000), window_count=window_count
    )
    first, now = 0, 0.0
    busy: list[int] = []
    verified: set[int] = set()

    def choose(offered: Sequence[Chunk]) -> int | None:
        assert [chunk.index for chunk in offered] == sorted({chunk.index for chunk in offered} - {*busy})
        assert all(first <= chunk.index < first + window_count for chunk in offered)
        return rng.choice([None, rng.randrange(len(offered))])

    while not machine.is_finished:
        first = next(chunk.index for chunk in chunks if machine.state(chunk.index) is not ChunkState.WRITTEN)
        job = machine.next_job(now, choose)
        match job:
            case Verify(chunk):
                assert chunk.index in claimed - verified, "once each"
                verified.add(chunk.index)
                machine.written(chunk.index) if rng.random() < 0.5 else machine.refuted(chunk.index)
            case Fetch(chunk):
                assert verified == claimed, "what is here is looked at first"
                busy.append(chunk.index)
        now += 30.0
        if busy and rng.random() < 0.5:
            index = busy.pop(rng.randrange(len(busy)))
            if rng.random() < 0.5:
                machine.failed(index, now, jitter=0.5)
            else:
                machine.written(index)
    assert machine.next_job(now, choose) == Finished()
