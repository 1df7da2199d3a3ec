"""From a replica that started at once to one that runs compiled code: the swap. Pure.

A model that is set to have both forms starts eager, because a request at zero waits for that start; compiled code makes
a sixth more tokens a second, and takes a hundred times as long to be there. So once a model proves to be used, a
compiled replica is ordered in the background: a *spare*. It does not count, is not picked, and gives way to whatever
else is started. When every Envoy knows it, the eager one drains in its favour.

    nothing ──order──▶ starts ──ready──▶ known to every Envoy ──overlap──▶ counts ──▶ an eager one drains
       ▲                 │
       └── failed (pause), gave way, idle, other settings, nothing left to replace

Everything is decided by what is believed now; what workers report of a replica (its form, and that it is one of the
background) is enough to go on with a swap that an earlier run of this process began. Remembered beside are failures
and how long compiled starts take, by revision and settings. Failures are counted over restarts of this process (their
pauses are not): a model that can't be compiled would cost minutes of every core after each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from helios.proxy import actions
from helios.proxy.activation.ends import OF_THE_WORKER
from helios.proxy.activation.machine import Gone, is_permanent
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of, with_form
from helios.proxy.fleet.state import Form, Replica, ReplicaState
from helios.proxy.traffic import Traffic

# For the others both forms are the same, and a swap would gain nothing.
_COMPILING_ENGINES: Final = frozenset({"vllm", "simulated"})
# Whether it can be compiled is not known: it never came to that, or never got the processors' time.
_TOO_SLOW: Final = "START_TIMEOUT"
# A node that left no time for a compile may be as busy for a while: 16 minutes, by default.
_BUSY_PAUSES: Final = 16
# A spare that takes so much longer than the last one is not about to be ready.
_OVERDUE_RATIO: Final = 1.5


@dataclass(frozen=True, slots=True)
class SwapPolicy:
    """When eager replicas give their place to compiled ones.

    Attributes:
        after_seconds: how long a model must be used since its eager replica got ready; less where a compiled start is
            known to take less.
        recent_seconds: how long ago its last use may be then.
        attempt_count: failed compiled replicas of a revision and its settings, after which it stays eager.
        back_off_seconds: pause after the first failure; four times as long after each further one.
        start_seconds: how long a compiled start may take before it is given up, beside what its bytes take.
        least_bytes_per_second: how slowly it may load what it books.
        overlap_seconds: how long both are picked before one drains; a request that was sent to that one alone, or would
            be refused by it, has arrived or names the other one, too.
        drain_seconds: how long requests at the replica that is replaced may go on.
        nearly_done_ratio: share of a compiled start's usual time after which it goes on though nobody uses the model.
        proven_seconds: a compiled replica that was ready for so long was no failure of compiling.
    """

    after_seconds: float = 30.0
    recent_seconds: float = 60.0
    attempt_count: int = 3
    back_off_seconds: float = 60.0
    start_seconds: float = 2400.0
    least_bytes_per_second: float = 64 << 20
    overlap_seconds: float = 2.0
    drain_seconds: float = 600.0
    nearly_done_ratio: float = 0.8
    proven_seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class SwapFailures:
    """How many compiled replicas of a model failed, of this revision with these settings; and where, last."""

    model: str
    revision: str
    settings: str
    failure_count: int
    worker_id: str
    incarnation: str


@dataclass(slots=True)
class _Spare:
    """A replica that was ordered in the background, until it is gone.

    Attributes:
        since: when it was ordered, or first seen.
        settings: what it was ordered with; empty: an earlier run of this process did it.
        ready_at: when it was first seen ready.
        candidate_at: when it was first seen as a candidate.
        has_taken_over: it counts like any other.
    """

    since: float
    settings: str = ""
    ready_at: float | None = None
    candidate_at: float | None = None
    has_taken_over: bool = False


@dataclass(slots=True)
class _Attempts:
    """What became of the compiled replicas of one revision and its settings.

    Attributes:
        failed_on: worker and its incarnation, of the last failure.
    """

    key: tuple[str, str]
    failure_count: int = 0
    failed_on: tuple[str, str] = ("", "")
    pause_until: float = 0.0
    start_seconds: float | None = None


class Swaps:
    """The swaps of all models.

    Invariants: nothing is ordered for a model that has a spare; no eager replica drains in favour of one that is not a
    candidate.
    """

    def __init__(
        self,
        policy: SwapPolicy,
        *,
        traffic: Traffic,
        order: Callable[[ModelEntry, float], Replica | None],
        stop: Callable[[Replica, float], None],
        report: Callable[[actions.Action], None],
    ) -> None:
        """Takes how a compiled replica is ordered (None: there is no room that nothing else wants), and stopped."""
        self._policy = policy
        self._traffic = traffic
        self._order = order
        self._stop = stop
        self._report = report
        self._spares: dict[str, _Spare] = {}
        self._attempts: dict[str, _Attempts] = {}

    @property
    def failures(self) -> tuple[SwapFailures, ...]:
        """What is to be remembered over a restart; `SwapFailuresChanged` says when there is something new."""
        return tuple(
            SwapFailures(model, *attempts.key, attempts.failure_count, *attempts.failed_on)
            for model, attempts in sorted(self._attempts.items())
            if attempts.failure_count
        )

    def restore(self, failures: Iterable[SwapFailures]) -> None:
        """Goes on with what an earlier run counted; call it before anything else."""
        for counted in failures:
            key, failed_on = (counted.revision, counted.settings), (counted.worker_id, counted.incarnation)
            self._attempts[counted.model] = _Attempts(key, counted.failure_count, failed_on)

    def worker_started(self, worker_id: str, incarnation: str) -> None:
        """A worker came that runs anew, maybe with a compiler: what failed on its predecessor last, is tried again."""
        for attempts in self._attempts.values():
            is_other = attempts.failed_on[0] == worker_id and attempts.failed_on[1] != incarnation
            if is_other and attempts.failure_count:
                attempts.failure_count, attempts.pause_until = 0, 0.0
                self._report(actions.SwapFailuresChanged())

    def split(self, replicas: Sequence[Replica], now: float) -> tuple[list[Replica], list[Replica]]:
        """Splits a model's replicas, those asleep left out, into those that count and spares."""
        ready_count = sum(replica.state is ReplicaState.READY for replica in replicas)
        standing: list[Replica] = []
        spares: list[Replica] = []
        for replica in replicas:
            if replica.state is not ReplicaState.ASLEEP:
                counts = self._counts(replica, now, is_alone=ready_count == 1)
                (standing if counts else spares).append(replica)
        return standing, spares

    def replaced(self, entry: ModelEntry, standing: Sequence[Replica]) -> frozenset[str]:
        """Eager replicas that are the first to go where there are too many, since a compiled one takes requests."""
        if not needs_of(entry.engine_settings).has_both_forms:
            return frozenset()
        if not any(r.form is Form.COMPILED and self._traffic.is_candidate(r.replica_id) for r in standing):
            return frozenset()
        return frozenset(r.replica_id for r in standing if r.form is Form.EAGER)

    def follow(
        self, entry: ModelEntry, standing: Sequence[Replica], spares: Sequence[Replica], now: float, *, is_wanted: bool
    ) -> None:
        """Does the next step of a model's swap: stops a spare that is of no use, or orders one.

        Args:
            entry: the model.
            standing: its replicas of the served revision that count, awake and not on their way out.
            spares: those that do not.
            now: monotonic seconds.
            is_wanted: whether it is to have any replica.
        """
        has_both = needs_of(entry.engine_settings).has_both_forms
        if not has_both and not spares:
            return
        settings = _of_compiled(entry.engine_settings)
        attempts = self._attempts_of(entry, settings)
        # In an order that does not depend on who looks: of two, each proxy stops the same one.
        starting = sorted((r for r in spares if r.is_spare), key=lambda r: r.replica_id)
        for replica in starting:
            spare = self._spare(replica, now)
            why = "" if has_both else "the model is not to have both forms any more"
            why = why or ("" if replica is starting[0] else "another one is on its way")
            why = why or self._of_no_use(spare, attempts, standing, now, is_wanted=is_wanted)
            limit_seconds = self._policy.start_seconds + replica.memory_bytes / self._policy.least_bytes_per_second
            if not why and now - spare.since > limit_seconds:
                why = f"it was not ready after {limit_seconds:.0f} s"
                self._failed(entry.name, attempts, _TOO_SLOW, why, now)
            if why:
                self._report(actions.SwapStopped(entry.name, replica.replica_id, why))
                self._stop(replica, now)
        if not spares and is_wanted and self._is_due(entry, standing, attempts, now):
            ordered = self._order(entry, now)
            if ordered is not None:
                self._spares[ordered.replica_id] = _Spare(now, settings)

    def ready(self, replica: Replica, now: float) -> None:
        """A replica is ready; nothing happens where it is no spare, or was ready before."""
        if not replica.is_background or self._spare(replica, now).ready_at is not None:
            return
        spare = self._spare(replica, now)
        spare.ready_at = now
        attempts = self._attempts.get(replica.model)
        if attempts is None or spare.settings != attempts.key[1]:
            return
        attempts.start_seconds = now - spare.since
        self._report(actions.SwapReady(replica.model, replica.replica_id, now - spare.since, replica.phases))

    def gone(self, replica: Replica, gone: Gone, now: float) -> None:
        """A replica is gone: a compiled one that failed is not tried again at once, and not for ever."""
        spare = self._spares.pop(replica.replica_id, None)
        attempts = self._attempts.get(replica.model)
        is_failure = bool(replica.failure_reason) and not gone.is_worker_lost
        if replica.form is not Form.COMPILED or attempts is None or not is_failure:
            return
        spare = spare or _Spare(now)
        if replica.revision != attempts.key[0] or spare.settings not in ("", attempts.key[1]):
            return
        if gone.reason in OF_THE_WORKER:
            attempts.pause_until = now + self._policy.back_off_seconds
            return
        worker = self._traffic.fleet.worker(replica.worker_id)
        attempts.failed_on = (replica.worker_id, worker.hello.incarnation if worker is not None else "")
        if spare.ready_at is not None and now - spare.ready_at >= self._policy.proven_seconds:
            attempts.failure_count = 0
        self._failed(replica.model, attempts, replica.failure_reason, replica.failure_message, now)

    def forget(self, model: str) -> None:
        """The model is gone."""
        self._drop(self._attempts.pop(model, None))

    def _spare(self, replica: Replica, now: float) -> _Spare:
        return self._spares.setdefault(replica.replica_id, _Spare(now))

    def _counts(self, replica: Replica, now: float, *, is_alone: bool) -> bool:
        """Whether a replica counts. `is_alone`: no other one of its model is ready."""
        if replica.is_spare or not replica.is_background or replica.state is not ReplicaState.READY:
            return not replica.is_spare
        spare = self._spare(replica, now)
        if self._traffic.is_candidate(replica.replica_id):
            spare.candidate_at = now if spare.candidate_at is None else spare.candidate_at
            spare.has_taken_over |= now - spare.candidate_at >= self._policy.overlap_seconds
        # What holds it back (an acknowledgement, its breaker) holds back no request while there is another one.
        spare.has_taken_over |= is_alone
        return spare.has_taken_over

    def _of_no_use(
        self, spare: _Spare, attempts: _Attempts, standing: Sequence[Replica], now: float, *, is_wanted: bool
    ) -> str:
        """Why a spare that starts is to be stopped; empty where it is not."""
        if spare.settings and spare.settings != attempts.key[1]:
            return "the model's settings changed"
        if not is_wanted and not self._is_nearly_done(spare, attempts, now):
            return "the model is not used any more"
        # Where nothing stands, what was to be replaced died. It is started again, eager, for whoever asks: in about a
        # second, where nobody can tell how long a compile still takes. The compile goes on beside it.
        if standing and all(other.form is not Form.EAGER for other in standing):
            return "nothing is left that it could replace"
        return ""

    def _is_nearly_done(self, spare: _Spare, attempts: _Attempts, now: float) -> bool:
        expected, elapsed = attempts.start_seconds, now - spare.since
        if expected is None:
            return False
        return self._policy.nearly_done_ratio * expected <= elapsed <= _OVERDUE_RATIO * expected

    def _is_due(self, entry: ModelEntry, standing: Sequence[Replica], attempts: _Attempts, now: float) -> bool:
        """Whether a compiled replica is to be ordered, if there is room."""
        if attempts.failure_count >= self._policy.attempt_count or now < attempts.pause_until:
            return False
        fleet, is_draining = self._traffic.fleet, self._traffic.is_draining
        if any(r.is_background and is_draining(r) for r in fleet.replicas_of(entry.name)):
            # Whether it failed is told when it is gone.
            return False
        last_used_at = self._traffic.last_used_at(entry.name)
        if any(not self._traffic.is_idle(replica) for replica in standing):
            last_used_at = now
        # Where compiled code is on the node, a compiled start takes seconds, and pays for itself after a short use.
        after_seconds = min(self._policy.after_seconds, attempts.start_seconds or self._policy.after_seconds)
        for replica in standing:
            since = self._traffic.ready_since(replica.replica_id)
            is_eager = replica.form is Form.EAGER and replica.engine in _COMPILING_ENGINES
            if not is_eager or since is None or not self._traffic.is_candidate(replica.replica_id):
                continue
            if entry.min_replicas and now - since >= after_seconds:
                # It is to be kept whether it is used or not, and compiling disturbs least while it is not.
                return True
            if last_used_at is None or now - last_used_at > self._policy.recent_seconds:
                continue
            # Not: ready for so long. A single request would then be followed by a compile.
            if last_used_at - since >= after_seconds:
                return True
        return False

    def _attempts_of(self, entry: ModelEntry, settings: str) -> _Attempts:
        key = (entry.revision, settings)
        attempts = self._attempts.get(entry.name)
        if attempts is None or attempts.key != key:
            self._drop(attempts)
            attempts = self._attempts[entry.name] = _Attempts(key)
        return attempts

    def _drop(self, attempts: _Attempts | None) -> None:
        if attempts is not None and attempts.failure_count:
            self._report(actions.SwapFailuresChanged())

    def _failed(self, model: str, attempts: _Attempts, reason: str, message: str, now: float) -> None:
        policy = self._policy
        if reason == _TOO_SLOW:
            pause = policy.back_off_seconds * _BUSY_PAUSES
        else:
            attempts.failure_count = policy.attempt_count if is_permanent(reason) else attempts.failure_count + 1
            pause = policy.back_off_seconds * 4.0 ** (attempts.failure_count - 1)
            self._report(actions.SwapFailuresChanged())
        attempts.pause_until = now + pause
        is_last = attempts.failure_count >= policy.attempt_count
        self._report(actions.SwapFailed(model, reason, message, 0.0 if is_last else pause))


@lru_cache(maxsize=1024)
def _of_compiled(settings: str) -> str:
    """What makes a compiled replica another one: its settings, but for the adapters that come and go while it runs."""
    values = json.loads(with_form(settings, Form.COMPILED) or "{}")
    values.get("lora", {}).pop("adapters", None)
    return json.dumps(values, sort_keys=True)
