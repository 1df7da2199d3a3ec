"""A node's life as a state machine: borrow, give back, expire, pin, evict, move, restart, in any order."""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from helios.mesh.errors import DiskFull, PreconditionFailed
from helios.storage.materializer import Loan, Materializer
from helios.storage.tiers import DiskRoom, TierKind, TierOptions
from tests.storage.harness import make_shelf
from tests.storage.local import TTL, SetClock, check_consistent, lend, local_agent, scratch, tiers_of, use

T = TypeVar("T")

# Blobs of some bytes each; models share them, and no tier holds them all.
PARTS = {name: name.encode() * size for name, size in zip("abcdef", (10, 20, 30, 40, 50, 60), strict=True)}
MODELS = ("a", "ab", "bc", "cd", "de", "f", "af", "abcdef")
TIERS = (
    TierOptions("disk", TierKind.SSD, 130),
    TierOptions("fast", TierKind.NVME, 100, high_ratio=0.9, low_ratio=0.6),
    TierOptions("memory", TierKind.MEMORY, 70, high_ratio=1.0, low_ratio=1.0),
)
models = st.sampled_from(MODELS)


@dataclass(frozen=True)
class Held:
    """A loan, and what its files have to be."""

    model: str
    loan: Loan


class NodeMachine(RuleBasedStateMachine):
    """Drives a real materializer on real files; the model is what was lent and pinned."""

    loans: Bundle[Held] = Bundle("loans")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.room = ExitStack()
        self.directory = self.room.enter_context(scratch())
        self.shelf = make_shelf(self.directory / "shelf")
        self.revisions = {name: self.shelf.add({part: PARTS[part] for part in name}) for name in MODELS}
        self.clock = SetClock()
        self.alive: dict[str, Held] = {}
        self.pinned: set[str] = set()
        self.stack = AsyncExitStack()
        self.agent: Materializer = self.run(self.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def start(self) -> Materializer:
        return await self.stack.enter_async_context(local_agent(self.directory, self.shelf, *TIERS, clock=self.clock))

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()
        self.room.close()

    @rule(target=loans, name=models)
    def borrow(self, name: str) -> Any:
        try:
            loan = self.run(lend(self.agent, self.revisions[name]))
        except DiskFull:
            return multiple()
        held = Held(name, loan)
        self.alive[loan.lease.id] = held
        return held

    @rule(name=models)
    def use(self, name: str) -> None:
        try:
            self.run(use(self.agent, self.revisions[name]))
        except DiskFull:
            return

    @rule(held=consumes(loans))
    def give_back(self, held: Held) -> None:
        self.run(self.agent.release(held.loan.lease.id))
        self.alive.pop(held.loan.lease.id, None)

    @rule(seconds=st.sampled_from([1, 30, 61]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.alive = {i: held for i, held in self.alive.items() if held.loan.lease.ends_at > self.clock()}

    @rule(name=models, number=st.integers(0, 7))
    def pin(self, name: str, number: int) -> None:
        """Rather one that is here: the others are not kept yet."""
        here = [found.revision for found in self.agent.residency()]
        if here:
            name = next(n for n in MODELS if self.revisions[n] == here[number % len(here)])
            self.pinned.add(name)
        self.run(self.agent.pin(self.revisions[name]))

    @rule(name=models)
    def unpin(self, name: str) -> None:
        self.run(self.agent.unpin(self.revisions[name]))
        self.pinned.discard(name)

    @rule(name=models)
    def evict(self, name: str) -> None:
        is_busy = name in self.pinned or any(held.model == name for held in self.alive.values())
        try:
            self.run(self.agent.evict(self.revisions[name]))
        except PreconditionFailed:
            assert is_busy or name not in self.pinned
        else:
            assert not is_busy
            assert tiers_of(self.agent, self.revisions[name]) == ()

    @rule()
    def move(self) -> None:
        self.run(self.agent.mover.look())

    @rule(free=st.integers(0, 200))
    def others_fill_the_disk(self, free: int) -> None:
        tier = self.agent.rooms[-1].tier
        tier.store.disk_room = lambda: DiskRoom(tier.inventory.used_bytes + 200, free)

    @rule()
    def restart(self) -> None:
        self.run(self.stack.aclose())
        self.stack = AsyncExitStack()
        self.agent = self.run(self.start())

    @invariant()
    def never_evicts_a_pinned_or_leased_blob(self) -> None:
        for held in self.alive.values():
            for part in held.model:
                assert (held.loan.path / part).read_bytes() == PARTS[part]
        for name in self.pinned:
            assert tiers_of(self.agent, self.revisions[name]), name

    @invariant()
    def lends_one_copy(self) -> None:
        for name in MODELS:
            assert len({held.loan.path for held in self.alive.values() if held.model == name}) <= 1

    @invariant()
    def tiers_keep_their_capacity_and_are_what_they_say(self) -> None:
        for room in self.agent.rooms:
            assert room.tier.inventory.used_bytes <= room.tier.options.capacity_bytes
        check_consistent(self.agent)


def _run(examples: int, steps: int) -> None:
    NodeMachine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        # Shrinking would run on for minutes; the steps of a failure are few enough to read.
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    case = NodeMachine.TestCase()
    case.runTest()


def test_never_evicts_a_pinned_or_leased_blob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.storage.blob_store.BlobStore.disk_room", lambda _: DiskRoom(1 << 40, 1 << 39))
    monkeypatch.setattr("os.fsync", lambda _: None)
    _run(30, 25)


@pytest.mark.soak
def test_never_evicts_a_pinned_or_leased_blob_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.storage.blob_store.BlobStore.disk_room", lambda _: DiskRoom(1 << 40, 1 << 39))
    monkeypatch.setattr("os.fsync", lambda _: None)
    _run(300, 60)


assert TTL.total_seconds() == 60, "the waits above end a lease, or not"
