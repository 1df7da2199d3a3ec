"""How many replicas a model is to have now, and how warm it is kept: by its policy, its use, and what is expected.

What each of them asks for is decided in `scaling/`; this is where they come together, and where what was decided is
taken down. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.fleet.state import Replica
from helios.proxy.holds import Holds
from helios.proxy.scaling.bounds import Bounds
from helios.proxy.scaling.decisions import Cause, Decisions, Scaled
from helios.proxy.scaling.desired import Desired, Usage, desired_replicas, idle_after
from helios.proxy.scaling.forecast import Expected, Forecasts, WarmPoolMode
from helios.proxy.scaling.ladder import Cooldowns, Rung
from helios.proxy.traffic import Traffic


class Wants:
    """What is wanted of models."""

    def __init__(
        self,
        cooldowns: Cooldowns,
        warm_pool: WarmPoolMode,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
        tell: Callable[[Scaled], None],
    ) -> None:
        """``cooldowns`` are those of models whose policies say nothing; ``tell`` hears of each decision."""
        self._usual = cooldowns
        self._traffic = traffic
        self._holds = holds
        self._wall_offset = 0.0
        self.decisions = Decisions(tell)
        self.forecasts = Forecasts(warm_pool)
        self.bounds = Bounds(catalogue, self.decide)
        self.is_deciding = True
        """Whether what is decided here is done; else another proxy decides, and takes it down."""

    def decide(self, decision: Scaled) -> None:
        """Takes a decision down."""
        if self.is_deciding:
            self.decisions.add(decision)

    def set_clock(self, wall_offset: float, now: float) -> None:
        """Says by how many seconds the clock on the wall, since 1970, is ahead of ``now``'s."""
        self._wall_offset = wall_offset
        self.follow_clock(now)

    def follow_clock(self, now: float) -> None:
        """Has windows begin and end."""
        self.bounds.follow(int((now + self._wall_offset) // 60), now)

    def expect(self, expected: Mapping[str, Expected], now: float) -> None:
        """Takes in how warm models are best kept for what is expected of them."""
        is_advice = not self.forecasts.is_followed
        for change in self.forecasts.replace(expected):
            before, after = change.before, change.after
            count = after.replica_count if after is not None else 0
            reason = f"{after.rung.name.lower()}: {after.reason}" if after is not None else "nothing is expected of it"
            from_count = before.replica_count if before is not None else 0
            self.decide(Scaled(now, change.model, from_count, count, reason, is_advice, Cause.FORECAST))

    def desired(
        self,
        entry: ModelEntry,
        current: list[Replica],
        now: float,
        *,
        load_count: int,
        is_failing: bool,
        is_asked_for: bool,
    ) -> Desired:
        """How many replicas a model is to have.

        Args:
            entry: the model.
            current: its replicas of the served revision.
            now: monotonic seconds.
            load_count: how many its load asks for.
            is_failing: whether its last start failed.
            is_asked_for: whether a start is under way that somebody asked for.
        """
        usage = Usage(
            held_count=self._holds.count(entry.name),
            in_flight_count=sum(1 for replica in current if not self._traffic.is_idle(replica)),
            last_used_at=self._traffic.last_used_at(entry.name),
            is_failing=is_failing,
            load_count=load_count,
            forecast_count=self.expected_count(entry.name, now),
            is_asked_for=is_asked_for,
        )
        return desired_replicas(
            min_replicas=entry.min_replicas,
            max_replicas=entry.max_replicas,
            usage=usage,
            idle_seconds=self._idle_seconds(entry, now),
            now=now,
        )

    def put_down(self, entry: ModelEntry, count: int, kept_count: int, now: float) -> None:
        """Takes down that of a model's replicas so many stay, where the rest goes because nobody used it for so long.

        What load does not ask for any more was taken down when it did not.
        """
        last_used_at = self._traffic.last_used_at(entry.name)
        unused_seconds = now - last_used_at if last_used_at is not None else 0.0
        idle_seconds = self._idle_seconds(entry, now)
        if idle_seconds and unused_seconds >= idle_seconds:
            reason = f"nobody used it for {unused_seconds:.0f} s, {idle_seconds:.0f} are enough"
            self.decide(Scaled(now, entry.name, count, kept_count, reason, is_advice=False, cause=Cause.COOLDOWN))

    def expected_count(self, model: str, now: float) -> int:
        """How many replicas what is expected of a model asks for."""
        expected = self.forecasts.followed(model, now)
        return expected.replica_count if expected is not None and expected.rung is Rung.READY else 0

    def floor(self, model: str, now: float) -> Rung:
        """The rung below which a model is not to go, for what is expected of it."""
        expected = self.forecasts.followed(model, now)
        return expected.rung if expected is not None else Rung.DISK

    def cooldowns(self, entry: ModelEntry) -> Cooldowns:
        """How long a model stays on each rung: its own policy's times, else those of all."""
        usual, own = self._usual, entry.scaling
        if own is None:
            return usual
        return Cooldowns(
            usual.idle_seconds if own.idle_seconds is None else own.idle_seconds,
            usual.asleep_seconds if own.asleep_seconds is None else own.asleep_seconds,
            usual.staged_seconds if own.staged_seconds is None else own.staged_seconds,
        )

    def _idle_seconds(self, entry: ModelEntry, now: float) -> float:
        expected = self.forecasts.followed(entry.name, now)
        advised_seconds = expected.idle_seconds if expected is not None else None
        return idle_after(self.cooldowns(entry).idle_seconds, advised_seconds)
