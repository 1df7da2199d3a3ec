"""What is fetched ahead next, and what became of it. Pure: who calls does the fetching.

A forecast may be wrong, so it must be cheap: an hour's bytes are bounded, room is taken that is to spare, what was
fetched ahead and is expected no more is the first to go, and what it cost is counted as used or wasted.

    waiting → fetching → here → used, or gone and wasted
                  ↓
                failed, until the next plan
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum

_EPOCH = datetime.fromtimestamp(0, UTC)
_HOUR = timedelta(hours=1)


class State(IntEnum):
    """What became of an order; the values are the contract's."""

    WAITING = 1
    FETCHING = 2
    HERE = 3
    FAILED = 4


@dataclass(frozen=True, slots=True)
class Order:
    """A revision to fetch; `size_bytes` is that of all its blobs, `is_asked`: a person wants it."""

    revision: str
    size_bytes: int
    is_asked: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is best fetched, the most useful first, and how many uses are expected of revisions, until `expires_at`."""

    orders: tuple[Order, ...] = ()
    uses: Mapping[str, float] = field(default_factory=dict)
    expires_at: datetime = _EPOCH


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order, and why, for people."""

    revision: str
    state: State
    message: str = ""


@dataclass(frozen=True, slots=True)
class Account:
    """What fetching ahead has cost and brought on this node so far: what is kept over a restart.

    `unused` are revisions that were fetched ahead and are not wanted yet, with the bytes that came for them; `hour` is
    the one, since 1970, in which `spent_bytes` were booked.
    """

    hour: int = 0
    spent_bytes: int = 0
    unused: Mapping[str, int] = field(default_factory=dict)
    fetched_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the plan's orders, and bytes on this node so far: fetched, and of that used and wasted."""

    outcomes: tuple[Outcome, ...]
    fetched_bytes: int
    used_bytes: int
    wasted_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch this now."""

    order: Order


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Give this up: it was fetched ahead, nobody wanted it, nothing is expected of it, and others need the room."""

    revision: str


class Ahead:
    """Decides.

    Invariants: at most one fetch at a time; in an hour no more than the budget is fetched, what people asked for aside;
    what was given up was fetched ahead, never wanted, and is in no plan.
    """

    def __init__(self, bytes_per_hour: int) -> None:
        """Takes the budget of an hour; 0: nothing is fetched but what people ask for."""
        self._bytes_per_hour = bytes_per_hour
        self._hour = 0
        self._spent_bytes = 0
        self._plan = Plan()
        self._fetching: Order | None = None
        self._waits: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._unused: dict[str, int] = {}
        self._here: frozenset[str] = frozenset()
        self._fetched_bytes = 0
        self._used_bytes = 0
        self._wasted_bytes = 0

    def recall(self, account: Account) -> None:
        """Goes on from what an earlier run has kept; to be called before anything else."""
        self._hour, self._spent_bytes = account.hour, account.spent_bytes
        self._unused = dict(account.unused)
        self._fetched_bytes = account.fetched_bytes
        self._used_bytes = account.used_bytes
        self._wasted_bytes = account.wasted_bytes

    def account(self) -> Account:
        """What is to be kept."""
        return Account(
            self._hour,
            self._spent_bytes,
            dict(self._unused),
            self._fetched_bytes,
            self._used_bytes,
            self._wasted_bytes,
        )

    def take(self, plan: Plan) -> None:
        """Replaces the plan; what failed is tried again."""
        self._plan = plan
        self._failures.clear()
        self._waits.clear()

    def expected_uses(self, revision: str, now: datetime) -> float:
        """How many uses of a revision are expected; 0 where the plan is over."""
        return self._plan.uses.get(revision, 0.0) if now < self._plan.expires_at else 0.0

    def is_at_rest(self, now: datetime) -> bool:
        """Whether there is nothing to decide and nothing to count: no orders, and nothing that awaits its use."""
        return not self._orders(now) and not self._unused

    def is_wanted(self, revision: str, now: datetime) -> bool:
        """Whether the plan has a revision."""
        return any(order.revision == revision for order in self._orders(now))

    def next(self, now: datetime, *, here: Collection[str], spare_bytes: int) -> Fetch | GiveUp | None:
        """Returns what to do now; None: nothing. ``spare_bytes`` is what can be taken without anything going."""
        self._here = frozenset(here)
        self._waits.clear()
        if self._fetching is not None:
            return None
        for order in self._orders(now):
            if order.revision in self._here or order.revision in self._failures:
                continue
            if order.is_asked:
                return Fetch(order)
            if order.size_bytes > self._bytes_per_hour:
                self._waits[order.revision] = "it is larger than the budget of an hour"
            elif order.size_bytes > self.budget_bytes(now):
                self._waits[order.revision] = "the budget of this hour is used up"
            elif order.size_bytes <= spare_bytes:
                return Fetch(order)
            elif (useless := self._useless(now)) is not None:
                return GiveUp(useless)
            else:
                self._waits[order.revision] = "no tier has room to spare"
        return None

    def began(self, order: Order, now: datetime) -> None:
        """The fetch of an order begins; its bytes are booked."""
        self._fetching = order
        if not order.is_asked:
            self._roll(now)
            self._spent_bytes += order.size_bytes

    def ended(self, order: Order, now: datetime, *, fetched_bytes: int | None, failure: str = "") -> None:
        """The fetch has ended: the bytes that came, or None where it failed or was broken off.

        Its bytes stay booked then: some came, nobody knows how many, and the budget is a bound.
        """
        self._fetching = None
        if failure:
            self._failures[order.revision] = failure
        if fetched_bytes is None:
            return
        if not order.is_asked and self._hour == _hour_of(now):
            self._spent_bytes = max(0, self._spent_bytes - order.size_bytes + fetched_bytes)
        self._fetched_bytes += fetched_bytes
        self._here |= {order.revision}
        if fetched_bytes:
            self._unused[order.revision] = self._unused.get(order.revision, 0) + fetched_bytes

    def stays(self, revision: str) -> None:
        """Somebody keeps a revision that was to be given up: it is of use."""
        self._used_bytes += self._unused.pop(revision, 0)

    def look(self, *, here: Collection[str], is_used: Callable[[str], bool]) -> None:
        """Counts what was fetched ahead as used or wasted, as far as that is known now."""
        self._here = frozenset(here)
        for revision, size_bytes in list(self._unused.items()):
            if revision in self._here and not is_used(revision):
                continue
            del self._unused[revision]
            if revision in self._here:
                self._used_bytes += size_bytes
            else:
                self._wasted_bytes += size_bytes

    def budget_bytes(self, now: datetime) -> int:
        """What may still be fetched in this hour."""
        spent = self._spent_bytes if self._hour == _hour_of(now) else 0
        return max(0, self._bytes_per_hour - spent)

    def report(self, now: datetime) -> Report:
        """What became of the plan."""
        outcomes = tuple(self._outcome(order) for order in self._orders(now))
        return Report(outcomes, self._fetched_bytes, self._used_bytes, self._wasted_bytes, self.budget_bytes(now))

    def _orders(self, now: datetime) -> tuple[Order, ...]:
        return self._plan.orders if now < self._plan.expires_at else ()

    def _outcome(self, order: Order) -> Outcome:
        revision = order.revision
        if revision in self._here:
            return Outcome(revision, State.HERE)
        if self._fetching is not None and self._fetching.revision == revision:
            return Outcome(revision, State.FETCHING)
        if revision in self._failures:
            return Outcome(revision, State.FAILED, self._failures[revision])
        return Outcome(revision, State.WAITING, self._waits.get(revision, "others come first"))

    def _useless(self, now: datetime) -> str | None:
        for revision in self._unused:
            if not self.is_wanted(revision, now) and not self.expected_uses(revision, now):
                return revision
        return None

    def _roll(self, now: datetime) -> None:
        if self._hour != _hour_of(now):
            self._hour, self._spent_bytes = _hour_of(now), 0


def _hour_of(now: datetime) -> int:
    return (now - _EPOCH) // _HOUR
