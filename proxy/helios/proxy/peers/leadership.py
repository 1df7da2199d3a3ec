"""What it means for a core to lead or to follow. Pure; times are monotonic seconds.

| | leads | follows |
|---|---|---|
| picks, holds, admits, publishes endpoints | yes | yes |
| orders anything of workers | yes, once they are fenced | no: believes what workers say |
| who waits | its own, and those of followers | tells the leader how many |
| answers those who wait | its own starts' failures | the leader's word |
| limits of keys | buckets, of which it grants slices | slices |

A proxy without leases leads from the start, in epoch 0, and nothing here is ever called.

Whoever takes the lead sends each worker a `Fence` and orders nothing before all have answered: from then on a worker
refuses what a leader before it orders, and has told of all that it accepted. So a start in flight is known, and is
adopted rather than made twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from helios.proxy import actions
from helios.proxy.activation.machine import ActivationState
from helios.proxy.admission.bucket import Bucket
from helios.proxy.admission.keyring import Caller, Keyring
from helios.proxy.admission.quotas import Limit, own_limits
from helios.proxy.catalogue import Catalogue
from helios.proxy.fleet.commands import CommandBook, Fence
from helios.proxy.holds import Holds
from helios.proxy.lifecycle import Lifecycle
from helios.proxy.peers.claims import Claims
from helios.proxy.peers.escrow import Buckets, Escrow, Slices
from helios.proxy.peers.followers import Followers
from helios.proxy.peers.following import Following
from helios.proxy.peers.messages import Failure, Hello, News, Outlook, Report, SliceKey
from helios.proxy.refusals import start_error
from helios.proxy.traffic import Traffic

_ASK_WORKERS_SECONDS: Final = 2.0
"""How often a leader whose lease is over asks its workers whether they have heard of another one."""
_AT_REST: Final = (ActivationState.IDLE, ActivationState.PLACING)


@dataclass(frozen=True, slots=True)
class Parts:
    """The core's parts that leading and following are about."""

    lifecycle: Lifecycle
    traffic: Traffic
    catalogue: Catalogue
    holds: Holds
    commands: CommandBook
    keyring: Keyring


class Leadership:
    """Who leads, and the sessions with other proxies.

    Invariants: the lifecycle is open only while this proxy leads and the fleet is resynchronised; it orders nothing
    with an epoch before each reachable worker has answered a fence of that epoch, or had `fence_seconds` to.
    """

    def __init__(self, parts: Parts, *, fence_seconds: float) -> None:
        self._lifecycle, self._traffic = parts.lifecycle, parts.traffic
        self._catalogue, self._holds, self._commands = parts.catalogue, parts.holds, parts.commands
        self._keyring = parts.keyring
        self._fence_seconds = fence_seconds
        self._fence_until = 0.0
        self._asked_workers_at = 0.0
        self._unfenced: set[str] = set()
        self._is_resynchronised = False
        self.epoch = 0
        """In which this proxy leads; 0: it does not, or there are no leases."""
        self.seen_epoch = 0
        """The highest that this proxy has heard of from the registry or another proxy."""
        self.claims = Claims()
        self.doubted_at: float | None = None
        """Since when a worker says that another proxy leads; nothing is ordered until the registry has been asked."""
        self._doubter = ""
        self.lease_until = 0.0
        """Until when the registry gives the lead to nobody else."""
        self.escrow = Escrow(self._buckets)
        self.followers = Followers(self.escrow, self, parts.holds.elsewhere)
        self.following: Following | None = None

    @property
    def leads(self) -> bool:
        """Whether this proxy decides what runs."""
        return self._lifecycle.leads

    # Who leads.
    def lead(self, epoch: int, now: float) -> None:
        """This proxy leads from now on, or in another epoch; the one before may have ended in the meantime."""
        # Where an epoch is missing in between, somebody else may have led meanwhile, and let requests in.
        goes_on = self.leads and 0 < self.epoch == epoch - 1
        self.epoch = self._commands.epoch = epoch
        self.doubted_at = None
        self.seen_epoch = max(self.seen_epoch, epoch)
        if not goes_on:
            self.following = None
            self.followers.clear(now)
            self._traffic.quotas.share(partial(own_limits, used_up_at=now if epoch > 1 else None), self.may_spend)
        self._lifecycle.lead()
        self._fence_until = now + self._fence_seconds
        self._unfenced = set()
        for worker in self._traffic.fleet.workers() if epoch else ():
            self._send_fence(worker.hello.worker_id)
            if worker.is_reachable:
                self._unfenced.add(worker.hello.worker_id)
        self._open(now)

    def _send_fence(self, worker_id: str) -> None:
        self._lifecycle.outbox.append(actions.Send(self._commands.issue(worker_id, Fence())))

    def follow(self, now: float) -> None:
        """This proxy leads no more, or not yet: another one does, or will."""
        self.epoch, self.lease_until, self.doubted_at = 0, 0.0, None
        self._unfenced = set()
        self._lifecycle.step_down()
        self.followers.clear(now)
        self.begin_session(now)

    def outdone(self, epoch: int, now: float) -> None:
        """Somebody has heard of a leader of this epoch: one of a lower epoch leads no more."""
        self.seen_epoch = max(self.seen_epoch, epoch)
        if self.epoch and epoch > self.epoch:
            self.follow(now)

    def claimed(self, worker_id: str, epoch: int, now: float) -> None:
        """A worker says that it has heard of a leader of this epoch."""
        if self.claims.note(worker_id, epoch) and epoch > self.epoch:
            self.doubt(worker_id, now)

    def doubt(self, worker_id: str, now: float) -> None:
        """A worker says that another proxy leads: what it would refuse is not ordered before the registry was asked."""
        if self.epoch and self.doubted_at is None and self.claims.counts(worker_id, now):
            self.doubted_at = now
            self._doubter = worker_id
            self._lifecycle.step_down()

    def confirmed(self, asked_at: float, now: float) -> bool:
        """The registry says that this proxy leads, asked then; False where most workers know of a later leader.

        It has forgotten that one, then, and this proxy is to ask for an epoch above.
        """
        if self.doubted_at is None or asked_at < self.doubted_at:
            return True
        if self.believed_epoch > self.epoch:
            return False
        self.doubted_at = None
        self.claims.refute(self.epoch, self._doubter, now)
        self._lifecycle.lead()
        self._open(now)
        return True

    @property
    def believed_epoch(self) -> int:
        """The highest that there was, by the word of the registry, of proxies, or of most workers."""
        workers = [worker.hello.worker_id for worker in self._traffic.fleet.workers() if worker.is_reachable]
        return max(self.seen_epoch, self.claims.believed(workers))

    def resynchronised(self, now: float) -> None:
        """The fleet is believed to be complete."""
        self._is_resynchronised = True
        self._open(now)

    def tick(self, now: float) -> None:
        """Follows the time."""
        self.claims.keep_only({worker.hello.worker_id for worker in self._traffic.fleet.workers()}, now)
        if self._unfenced and self.leads:
            reachable = {w.hello.worker_id for w in self._traffic.fleet.workers() if w.is_reachable}
            self._unfenced &= reachable if now < self._fence_until else set()
            self._open(now)
        if self.following is not None:
            self.following.slices.follow()
        if self.epoch:
            self.followers.tick(now)
            self._ask_workers(now)

    def _ask_workers(self, now: float) -> None:
        """Looks for another leader where the registry can't be asked: one that nobody here knew, such as a new proxy,
        has told all workers that it reaches, and counts the limits of keys, too.
        """
        if now < max(self.lease_until, self._asked_workers_at + _ASK_WORKERS_SECONDS):
            return
        self._asked_workers_at = now
        for worker in self._traffic.fleet.workers():
            worker_id = worker.hello.worker_id
            if worker.is_reachable and not self._has_fence(worker_id):
                self._send_fence(worker_id)

    def _has_fence(self, worker_id: str) -> bool:
        return any(isinstance(one.order, Fence) for one in self._commands.pending(worker_id))

    def may_spend(self, now: float) -> bool:
        """Whether no other proxy counts the limits of keys: by the lease, or by the word of all who could have it."""
        return now < self.lease_until or now < self.followers.promised_until()

    # Workers.
    def worker_hello(self, worker_id: str) -> None:
        """A worker introduces itself; what it has not answered is sent again after that."""
        if not self.epoch:
            return
        if not self._has_fence(worker_id):
            self._commands.issue(worker_id, Fence())
        if not self._lifecycle.is_open:
            self._unfenced.add(worker_id)

    def fenced(self, worker_id: str, now: float) -> None:
        """A worker answered a fence."""
        self._unfenced.discard(worker_id)
        self._open(now)

    def _open(self, now: float) -> None:
        if self.leads and self._is_resynchronised and not self._unfenced and not self._lifecycle.is_open:
            self._lifecycle.open(now)

    # The leader's end of sessions.
    def connect(self, hello: Hello, now: float) -> str:
        """A follower begins a session; returns its name."""
        self.seen_epoch = max(self.seen_epoch, hello.epoch)
        return self.followers.connect(hello, now)

    def disconnect(self, session: str, now: float, *, is_leaving: bool = False) -> None:
        """A session is over."""
        self.followers.disconnect(session, now, is_leaving=is_leaving)

    def report(self, session: str, report: Report, now: float) -> None:
        """Takes in what a follower says."""
        demands = self.followers.report(session, report, now)
        for model, seconds in demands.used:
            self._traffic.used(model, now - seconds)
        for model in (*demands.wished, *demands.changed):
            entry = self._catalogue.get(model)
            if entry is None:
                continue
            if model in demands.wished:
                self._lifecycle.want(entry, now)
            self._lifecycle.activation(model)
            self._lifecycle.reconcile(model, now)

    def news(self, session: str, now: float) -> News:
        """What is to be told a follower now."""
        return self.followers.take(session, self.epoch, now)

    def active_models(self) -> Iterable[str]:
        """Models with a start under way, or a failure."""
        activating = self._lifecycle.activating
        return [model for model in activating.models() if activating.of(model).state not in _AT_REST]

    def outlook(self, model: str, now: float) -> Outlook:
        """What is expected of a model."""
        entry = self._catalogue.get(model)
        activation = self._lifecycle.activating.find(model)
        if entry is None or activation is None:
            return Outlook(model, ActivationState.IDLE, 1.0)
        failure = self._lifecycle.failure(model)
        return Outlook(model, activation.state, self._lifecycle.remaining_seconds(entry, now), failure)

    def measured_seconds(self) -> dict[str, float]:
        """How long models take to start, as far as was measured."""
        return self._lifecycle.estimates.measured()

    def draining(self) -> frozenset[str]:
        """Replicas that are taken out."""
        return self._traffic.draining

    def forgotten(self) -> dict[str, float]:
        """Models that were let go and not used since, and when."""
        return self._traffic.forgotten()

    def _buckets(self, key: SliceKey, now: float) -> Buckets:
        # By the limits that this proxy knows: of a change that a follower hears of earlier or later, each of its
        # reports would begin a bucket anew, and each request here another one.
        caller = self._keyring.find(key.key_id) or Caller(
            key.key_id, requests_per_minute=key.requests_per_minute, tokens_per_minute=key.tokens_per_minute
        )
        requests, tokens = self._traffic.quotas.limits(caller, now)
        return _bucket(requests, key.requests_per_minute), _bucket(tokens, key.tokens_per_minute)

    # The follower's end.
    def begin_session(self, now: float) -> Following:
        """A session with a leader begins: what an earlier one was told, it is told again."""
        before, slices = self.following, Slices()
        self._traffic.quotas.share(slices.open, slices.is_valid)
        self.following = Following(
            slices,
            before.used_since if before is not None else now,
            before.promised_until if before is not None else 0.0,
        )
        return self.following

    def released(self) -> None:
        """The leader said that it leads no more: nothing is promised to it."""
        if self.following is not None:
            self.following.promised_until = 0.0

    def is_refused(self, key_id: str) -> bool:
        """Whether the leader has said that what a key's request needs will not be there soon."""
        return self.following is not None and self.following.slices.is_refused(key_id)

    def has_changes(self) -> bool:
        """Whether there is something to tell the leader at once."""
        following = self.following
        return following is not None and following.has_changes(self._holds.own_counts(), self._lifecycle.wished)

    def own_report(self, now: float) -> Report:
        """What is to be told the leader now."""
        assert self.following is not None
        wished, self._lifecycle.wished = self._lifecycle.wished, set()
        return self.following.report(self._holds.own_counts(), self._traffic.uses(), sorted(wished), now)

    def heard(self, news: News, now: float) -> bool:
        """Takes in what the leader says; False where it leads by an epoch lower than one that was heard of."""
        if self.following is None or news.epoch < self.seen_epoch:
            return False
        self.seen_epoch = news.epoch
        if not self.following.has_heard:
            # The first news of a session is of all that is not at rest: what an earlier one told of the rest is over.
            self._lifecycle.outlooks.clear()
        self.following.heard(news, now)
        if news.draining is not None:
            self._traffic.set_draining(frozenset(news.draining))
        for model, seconds in news.forgotten:
            self._traffic.told_forgotten(model, now - seconds)
        for model, seconds in news.estimates:
            self._lifecycle.estimates.believe(model, seconds)
        for outlook in news.outlooks:
            self._lifecycle.outlooks.take(outlook, now)
        for failure in news.failures:
            self._answer(failure)
        return True

    def _answer(self, failure: Failure) -> None:
        assert self.following is not None
        self.following.answered(failure)
        # What waits for a replica that is busy, or for an adapter, does not wait for this start.
        if self._traffic.has_candidates(failure.model):
            return
        for hold in self._holds.take_all(failure.model):
            told = start_error(failure.model, failure.reason, failure.message, failure.retry_after_seconds)
            self._lifecycle.outbox.append(actions.Fail(hold, told))


def _bucket(limit: Limit | None, per_minute: int) -> Bucket | None:
    """What a follower's slice is of; a limit that is none any more is the follower's alone until it hears of that."""
    if isinstance(limit, Bucket):
        return limit
    return Bucket(per_minute) if per_minute else None
