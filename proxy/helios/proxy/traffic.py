"""Where requests go: the fleet, who may be picked, what was sent where.

This is the one place that knows whether a replica is eligible. Everything that bears on it (its state, its worker, a
drain that was asked, its endpoint, its breaker) is noted here, and the routing table follows at once. Pure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from helios.mesh.routing import USUAL_ROUTING, Choice
from helios.proxy.admission.quotas import Quotas, Usage
from helios.proxy.breaker import BreakerPolicy, Breakers
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of
from helios.proxy.express.lane import ExpressPolicy
from helios.proxy.fleet.state import Adapter, Change, FleetState, Load, Replica, ReplicaState
from helios.proxy.ledger import Ledger
from helios.proxy.outliers import OutlierPolicy, Outliers
from helios.proxy.retries import RetryBudgets, RetryPolicy
from helios.proxy.routing.corrections import Corrections, KvNews
from helios.proxy.routing.holders import Holders
from helios.proxy.routing.pick import NO_WISHES, Affinity, Pick, Wishes, pick
from helios.proxy.routing.prefix import BLOCK_TOKENS, Blocks, PrefixIndex
from helios.proxy.routing.rules import LOW_BAND, NORMAL_BAND, Rules, Weights
from helios.proxy.routing.sites import Sites
from helios.proxy.routing.table import Candidate, Facts, Locality, RoutingTable, exclusion, score, with_room

# gRPC codes that speak of the replica and not of the request: UNKNOWN, INTERNAL, UNAVAILABLE, DATA_LOSS.
_REPLICA_FAULTS = frozenset({2, 13, 14, 15})
_UNAVAILABLE = 14
# Looked up once: each pick compares with it.
_POWER_OF_TWO = Choice.POWER_OF_TWO
# Until a word of an operator is at all proxies. What they sent to replicas before that needs no other replica, and what
# comes after it waits, which counts by itself.
_UNHEARD_SECONDS = 0.5
# Blocks of a cache whose size no worker told: 16,384 tokens.
_UNKNOWN_CAPACITY = 256


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """How requests are routed.

    Attributes:
        rules: how one of a model's replicas is chosen where its policy says nothing else.
        max_blocks: blocks of prompts that are remembered, of all replicas.
        queue_count: requests that may wait inside a replica's engine before others wait here, in their tenants' and
            priorities' order; 0: any number.
        retries: how many requests are tried a second time.
        outliers: which replica fails more than its neighbours.
        locality: where the gateway is.
        draw: draws a number below its argument, where the best one of two candidates that are drawn is to be taken;
            None: the best of all is.
        express: which models Envoy routes by itself.
    """

    rules: Rules = field(default_factory=Rules)
    max_blocks: int = 500_000
    queue_count: int = 32
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    outliers: OutlierPolicy = field(default_factory=OutlierPolicy)
    locality: Locality = field(default_factory=Locality)
    draw: Callable[[int], int] | None = None
    express: ExpressPolicy = field(default_factory=ExpressPolicy)


@dataclass(frozen=True, slots=True)
class LoadDelta:
    """What changed at a replica: its load now, ids that started, and ids that finished with their gRPC code.

    `usage` is what the finished ones took; `kv` what its KV cache lost, None where nothing is said of it.
    """

    replica_id: str
    load: Load
    started: tuple[str, ...] = ()
    finished: tuple[tuple[str, int], ...] = ()
    usage: tuple[Usage, ...] = ()
    kv: KvNews | None = None


class Traffic:
    """Eligibility, picks and the ledger.

    Invariant: the table holds exactly the replicas that `exclusion` lets through.
    """

    def __init__(self, *, reservation_seconds: float, breaker: BreakerPolicy, routing: RoutingPolicy) -> None:
        self.fleet = FleetState()
        self.table = RoutingTable()
        self.ledger = Ledger(reservation_seconds)
        self.breakers = Breakers(breaker)
        self.quotas = Quotas()
        self.retries = RetryBudgets(routing.retries)
        self.outliers = Outliers(routing.outliers)
        self.routing = routing
        self._usual = routing.rules.of_model(USUAL_ROUTING, 0, knows_place=routing.locality.is_known)
        # Of models whose rules are others than the usual ones.
        self._rules: dict[str, Rules] = {}
        self._prefixes = PrefixIndex(routing.max_blocks)
        self.losses = self._prefixes.losses
        self.corrections = Corrections(self._prefixes)
        # Of all replicas that were ever scored: no request below it has to be compared with any.
        self._least_context = sys.maxsize
        self._published: frozenset[str] = frozenset()
        self._draining: set[str] = set()
        self._last_used: dict[str, float] = {}
        self._last_wanted: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}
        self._ready_since: dict[str, float] = {}
        self._opened: set[str] = set()
        # Candidates in whose engines as many wait as may: no pick takes them, whatever else counts them as candidates.
        self._busy: set[str] = set()
        # Candidates that take no requests of the lowest bands, with the lowest one that they take.
        self._lowest: dict[str, int] = {}
        # By model, as a tuple that is made anew where it changes: a pick takes it as it is.
        self._excluded: dict[str, tuple[tuple[str, str], ...]] = {}
        self._holders = Holders()
        self._sites = Sites()

    def wants_prompt(self, entry: ModelEntry) -> bool:
        """Whether a request's prompt bears on where it goes."""
        return self.rules_of(entry.name).weights.prefix > 0 and self.table.count(entry.name, entry.revision) > 1

    def has_choice(self, entry: ModelEntry) -> bool:
        """Whether what a request says may bear on where it goes."""
        return self.table.count(entry.name, entry.revision) > 1

    def pick(
        self,
        entry: ModelEntry,
        request_id: str,
        now: float,
        adapter: Adapter | None,
        wishes: Wishes = NO_WISHES,
    ) -> Pick | None:
        """Picks replicas for a request and reserves a place at the first; None where there is no candidate.

        With an adapter, only replicas that have it are candidates. ``wishes`` counts where there are several.
        """
        snapshot = self.table.snapshot(entry.name, entry.revision)
        if adapter is not None:
            holders = self._holders.of(adapter)
            snapshot = tuple(candidate for candidate in snapshot if candidate.replica_id in holders)
        if self._busy:
            snapshot = tuple(candidate for candidate in snapshot if candidate.replica_id not in self._busy)
        if self._lowest:
            snapshot = tuple(candidate for candidate in snapshot if self._takes(candidate.replica_id, wishes.band))
        affinity, rules = None, self._rules.get(entry.name, self._usual) if self._rules else self._usual
        if len(snapshot) > 1:
            if wishes.context_tokens >= self._least_context:
                snapshot = with_room(snapshot, wishes.context_tokens)
            # After what a replica would refuse: a cordon must not send a request to where it does not fit.
            if self.fleet.cordoned:
                snapshot = self.uncordoned(entry.name, snapshot)
            affinity = self._affinity(entry, wishes.blocks, wishes.session, rules.weights)
        draw = self.routing.draw if rules.choice is _POWER_OF_TWO else None
        chosen = pick(entry.name, entry.revision, snapshot, affinity, draw, weights=rules.weights)
        if chosen is None:
            return None
        may_retry = self.retries.request(entry.name)
        if chosen.candidate_count > 1 and not may_retry:
            chosen = chosen._replace(choices=(chosen.choices[0],))
        best = chosen.choices[0].replica_id
        freed = self.ledger.reserve(request_id, best, now)
        if self.breakers.picked(best, now):
            self.refresh(best)
        else:
            self.rescore(best)
        if freed is not None and freed != best:
            # It was asked about again: its prompt never came there.
            self._prefixes.keep(freed, request_id, 0.0)
            self.rescore(freed)
        self._last_used[entry.name] = now
        return chosen

    def _affinity(self, entry: ModelEntry, blocks: Blocks, session: str, weights: Weights) -> Affinity | None:
        """What draws a request to some of several candidates; None: nothing does."""
        held = self._prefixes.match(blocks) if weights.prefix else {}
        home = self.table.home(entry.name, entry.revision, session) if session and weights.session else ""
        if not held and not home:
            return None
        weight, home_weight = weights.prefix if held else 0.0, weights.session if home else 0.0
        return Affinity(held, len(blocks), weight, home, home_weight)

    def rules_of(self, model: str) -> Rules:
        """How a model's replicas are chosen among."""
        return self._rules.get(model, self._usual) if self._rules else self._usual

    def model_changed(self, name: str, entry: ModelEntry | None) -> None:
        """A model is new, another one, or (None) gone: its replicas are scored by its rules from now on."""
        if entry is None:
            self.forget_model(name)
        rules = self._usual
        if entry is not None and (entry.routing != USUAL_ROUTING or self._usual.keeps_places):
            places = needs_of(entry.engine_settings).max_running_requests
            rules = self.routing.rules.of_model(entry.routing, places, knows_place=self.routing.locality.is_known)
        if rules == self.rules_of(name):
            return
        if rules == self._usual:
            del self._rules[name]
        else:
            self._rules[name] = rules
        for replica in self.fleet.replicas_of(name):
            self.refresh(replica.replica_id)

    def prompt_sent(self, entry: ModelEntry, replica_id: str, request_id: str, blocks: Blocks) -> None:
        """A request's prompt is on its way to a replica, which will have it in its cache."""
        if not blocks:
            return
        replica = self.fleet.replica(replica_id)
        if replica is None:
            return
        needs = needs_of(entry.engine_settings)
        token_bytes = needs.kv_bytes_per_token(entry.kv_bytes_per_token, entry.dtype)
        kv_cache_bytes = dict(replica.memory_items).get("KV_CACHE", 0)
        capacity = int(kv_cache_bytes / (token_bytes * BLOCK_TOKENS)) if token_bytes and kv_cache_bytes else 0
        room = self.corrections.room(replica_id, capacity or _UNKNOWN_CAPACITY)
        self._prefixes.add(replica_id, request_id, blocks, room)

    def prompt_ended(self, replica_id: str, request_id: str) -> None:
        """A request at a replica needs its prompt no more."""
        self._prefixes.ended(replica_id, request_id)

    def prompt_of(self, request_id: str) -> Blocks:
        """What is known of the prompt of a request that was sent to a replica."""
        return self._prefixes.sent(request_id)

    def changed(self, change: Change, now: float) -> None:
        """Follows a change of the fleet's state."""
        if change.before is None and change.after is None:
            return
        replica = change.replica
        if self._holders.follow(change):
            # What waits for the adapter can go on, if the replica is a candidate already.
            self._opened.add(replica.model)
        if change.after is None or change.after.state.is_gone:
            self._forget(replica, now)
            return
        if replica.state is ReplicaState.ASLEEP:
            self._prefixes.forget(replica.replica_id)
        if replica.state is ReplicaState.READY:
            self._ready_since.setdefault(replica.replica_id, now)
        if change.before is None and replica.state not in (ReplicaState.ASLEEP, ReplicaState.DRAINING):
            # A replica that was here before this proxy counts as used now: nobody knows better. One on its way out is
            # no reason to keep the model.
            self._last_used.setdefault(replica.model, now)
        self.refresh(replica.replica_id)

    def rehomed(self, before: Replica, after: Replica) -> None:
        """A replica is another model's now, of the same revision: what it was used for counts for that one."""
        self._note_exclusion(before, None)
        used_at = self._last_used.get(before.model)
        if used_at is not None:
            self._last_used[after.model] = max(used_at, self._last_used.get(after.model, used_at))
        self.refresh(after.replica_id)

    def resynchronised(self, replica_ids: Iterable[str], now: float) -> None:
        """A worker's hello is truth: what was believed to run at its replicas may have ended unheard."""
        for replica_id in replica_ids:
            self.quotas.lost(self.ledger.forget_running(replica_id), now)
            self.refresh(replica_id)

    def load(self, delta: LoadDelta, now: float) -> Replica | None:
        """Takes in a replica's delta; returns the replica, None where it is unknown."""
        replica = self.fleet.load(delta.replica_id, delta.load)
        if replica is None:
            return None
        replica_id, touched = delta.replica_id, {delta.replica_id}
        if delta.kv is not None:
            self.corrections.take(replica_id, delta.kv)
        for request_id in delta.started:
            self.quotas.started(request_id)
            freed = self.ledger.started(request_id, replica_id) or replica_id
            touched.add(freed)
            if freed != replica_id:
                # Envoy did not reach the replica that it was sent to.
                self.retries.retried(replica.model)
                self._prefixes.keep(freed, request_id, 0.0)
        for request_id, code in delta.finished:
            touched.add(self.ledger.finished(request_id, replica_id) or replica_id)
            if code != _UNAVAILABLE:  # Else another replica may go on with it, and is looked for by its prompt.
                self._prefixes.ended(replica_id, request_id)
            self._judge(replica, code, now)
        for usage in delta.usage:
            self.quotas.finished(usage, now)
        # What still ends at a replica on its way out is no reason to keep the model.
        if (delta.started or delta.finished) and not self.is_draining(replica):
            self._last_used[replica.model] = now
        for other in touched:
            self.refresh(other)
        return replica

    def unreached(self, request_id: str, now: float, *, is_failure: bool) -> bool:
        """A request got to no replica; ``is_failure``: none could be connected to. Returns whether it was picked here,
        and no replica has told of it.
        """
        reservation = self.ledger.withdraw(request_id)
        if reservation is None:
            return False
        self.quotas.lapse(request_id, now)
        self._prefixes.keep(reservation.replica_id, request_id, 0.0)
        if is_failure:
            self.breakers.failed(reservation.replica_id, now)
        self.refresh(reservation.replica_id)
        return True

    def _judge(self, replica: Replica, code: int, now: float) -> None:
        """What a request's end says of its replica."""
        replica_id, is_failure = replica.replica_id, code in _REPLICA_FAULTS
        self.outliers.note(replica_id, is_failure=is_failure)
        if not is_failure:
            self.breakers.succeeded(replica_id)
            return
        if code == _UNAVAILABLE and not self.is_draining(replica) and len(self.staying(replica.model)) > 1:
            # Envoy tries it elsewhere, where there is another one. What a draining replica refuses was to go anyway.
            self.retries.retried(replica.model)
        self.breakers.failed(replica_id, now)
        neighbours = (other.replica_id for other in self.fleet.replicas_of(replica.model))
        if self.outliers.is_outlier(replica_id, filter(self.is_candidate, neighbours)):
            self.breakers.trip(replica_id, now)
            # Once it is tried again, it begins anew.
            self.outliers.forget(replica_id)

    def reset_breaker(self, replica_id: str) -> None:
        """Has a replica picked again, whatever it failed at."""
        self.breakers.reset(replica_id)
        self.outliers.forget(replica_id)
        self.refresh(replica_id)

    def published(self, addresses: frozenset[str]) -> None:
        """Every Envoy knows exactly these addresses."""
        changed = self._published ^ addresses
        self._published = addresses
        for replica in self.fleet.replicas():
            if replica.address in changed:
                self.refresh(replica.replica_id)

    def drain_asked(self, replica_id: str) -> None:
        """Un-picks a replica for good: the first step of stopping it."""
        self._draining.add(replica_id)
        self.refresh(replica_id)

    @property
    def draining(self) -> frozenset[str]:
        """Replicas that were un-picked for good."""
        return frozenset(self._draining)

    def set_draining(self, replica_ids: frozenset[str]) -> None:
        """Has exactly these un-picked for good: what a leader says."""
        changed = self._draining ^ replica_ids
        self._draining = set(replica_ids)
        for replica_id in changed:
            self.refresh(replica_id)

    def is_draining(self, replica: Replica) -> bool:
        """Whether a replica is on its way out."""
        return replica.state is ReplicaState.DRAINING or replica.replica_id in self._draining

    def staying(self, model: str) -> list[Replica]:
        """A model's replicas that are not on their way out, of any revision and state."""
        return [replica for replica in self.fleet.replicas_of(model) if not self.is_draining(replica)]

    def tick(self, now: float) -> None:
        """Follows the time: breakers and reservations."""
        for replica_id in self.breakers.tick(now):
            self.refresh(replica_id)
        for reservation in self.ledger.expire(now):
            self.quotas.lapse(reservation.request_id, now)
            # Its prompt never came, as far as anybody knows.
            self._prefixes.keep(reservation.replica_id, reservation.request_id, 0.0)
            self.rescore(reservation.replica_id)
        self.quotas.tick(now)

    def is_idle(self, replica: Replica) -> bool:
        """Whether nothing runs at a replica, waits in it, or is on its way to it."""
        return (
            not replica.load.running_count
            and not replica.load.waiting_count
            and self.ledger.is_idle(replica.replica_id)
        )

    def takes_requests(self, entry: ModelEntry, band: int = NORMAL_BAND, adapter: Adapter | None = None) -> bool:
        """Whether a request for an entry's revision would be picked a replica now, and not wait for a busy one."""
        holders = self._holders.of(adapter) if adapter is not None else None
        return any(
            replica_id not in self._busy
            and self._takes(replica_id, band)
            and (holders is None or replica_id in holders)
            for replica_id, *_ in self.table.snapshot(entry.name, entry.revision)
        )

    def _takes(self, replica_id: str, band: int) -> bool:
        """Whether a candidate has a place that is not kept from a band."""
        return self._lowest.get(replica_id, LOW_BAND) <= band

    @property
    def busy(self) -> frozenset[str]:
        """Candidates that take no request for now."""
        return frozenset(self._busy)

    def is_candidate(self, replica_id: str) -> bool:
        """Whether a replica may be picked now."""
        return replica_id in self.table

    def has_candidates(self, model: str) -> bool:
        """Whether any replica of a model may be picked now."""
        return any(replica.replica_id in self.table for replica in self.fleet.replicas_of(model))

    def last_used_at(self, model: str) -> float | None:
        """When a request of the model was last picked or reported; None for never, or not since `forget_use`."""
        return self._last_used.get(model)

    def last_wanted_at(self, model: str) -> float:
        """When a request of the model was last picked or reported, whatever was forgotten since; 0 for never."""
        return self._last_used.get(model, self._last_wanted.get(model, 0.0))

    def use(self, model: str, now: float) -> None:
        """Counts as a use of the model, so that it is not drained as idle."""
        self._last_used[model] = now

    def used(self, model: str, at: float) -> None:
        """Another proxy used a model then; nothing where that says nothing against a later `forget_use`."""
        if not _is_before(at, self._forgotten.get(model)):
            self._last_used[model] = max(at, self._last_used.get(model, at))

    def uses(self) -> Iterable[tuple[str, float]]:
        """When each model was used last."""
        return self._last_used.items()

    def forget_use(self, model: str, now: float) -> None:
        """Lets a model go to zero at once, whatever other proxies still tell of its use before."""
        self._forgotten[model] = now
        self._last_wanted[model] = self._last_used.pop(model, self._last_wanted.get(model, 0.0))

    def forget_model(self, model: str) -> None:
        """A model is gone, and with it when it was used or let go."""
        self._last_used.pop(model, None)
        self._last_wanted.pop(model, None)
        self._forgotten.pop(model, None)

    def forgotten(self) -> dict[str, float]:
        """Models that were let go and not used since, and when."""
        return {model: at for model, at in self._forgotten.items() if model not in self._last_used}

    def told_forgotten(self, model: str, at: float) -> None:
        """The leader let a model go then: whoever leads next is not to bring it back for its use before."""
        if _is_before(self._last_used.get(model, at), at):
            self.forget_use(model, at)

    def ready_since(self, replica_id: str) -> float | None:
        """When a replica was first seen ready."""
        return self._ready_since.get(replica_id)

    def excluded(self, replica: Replica) -> str | None:
        """Why a replica can't be picked; None where it can."""
        worker = self.fleet.worker(replica.worker_id)
        facts = Facts(
            is_worker_reachable=worker is not None and worker.is_reachable,
            is_drain_asked=replica.replica_id in self._draining,
            is_published=replica.address in self._published,
            is_breaker_closed=self.breakers.allows(replica.replica_id),
            reserved_count=self.ledger.reserved_count(replica.replica_id),
        )
        return exclusion(replica, facts)

    def exclusions(self, model: str, band: int = NORMAL_BAND) -> tuple[tuple[str, str], ...]:
        """Replicas of a model that are not picked for a band now, each with its reason."""
        excluded = self._excluded.get(model, ())
        if self._lowest:
            kept = (one.replica_id for one in self.fleet.replicas_of(model) if not self._takes(one.replica_id, band))
            excluded += tuple((replica_id, "kept_for_higher_bands") for replica_id in kept)
        return excluded + self._left_alone(model) if self.fleet.cordoned else excluded

    def _left_alone(self, model: str) -> tuple[tuple[str, str], ...]:
        """Candidates on cordoned workers, where others take requests."""
        cordoned = dict.fromkeys(one for one in self._sites.on(model, self.fleet.cordoned) if one not in self._busy)
        if not cordoned or all(one in cordoned or one in self._busy for one in self._sites.of(model)):
            return ()
        return tuple((replica_id, "cordoned") for replica_id in cordoned)

    def uncordoned(self, model: str, snapshot: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """Candidates on workers that are not cordoned; all where there is none: a cordon makes nobody wait."""
        cordoned = frozenset(self._sites.on(model, self.fleet.cordoned))
        if not cordoned:
            return snapshot
        return tuple(candidate for candidate in snapshot if candidate.replica_id not in cordoned) or snapshot

    def take_opened(self) -> set[str]:
        """Models that got a candidate since the last call: what waits for them can go on."""
        opened, self._opened = self._opened, set()
        return opened

    def look_again(self, model: str) -> None:
        """Has those who wait for a model looked at, as if it had a new candidate: others came to it."""
        self._opened.add(model)

    def refresh(self, replica_id: str) -> None:
        """Filters and scores a replica anew."""
        replica = self.fleet.replica(replica_id)
        if replica is None:
            self._unlist(replica_id)
            return
        reason = self.excluded(replica)
        self._note_exclusion(replica, reason)
        if reason is not None:
            self._unlist(replica_id)
            return
        reserved_count, rules = self.ledger.reserved_count(replica_id), self.rules_of(replica.model)
        self._note_busy(replica, reserved_count, rules)
        candidate = self._scored(replica, reserved_count, rules.weights)
        self._sites.put(replica_id, replica.model, replica.worker_id)
        if self.table.put(replica.model, replica.revision, candidate):
            self._opened.add(replica.model)

    def _unlist(self, replica_id: str) -> None:
        self.table.remove(replica_id)
        self._sites.remove(replica_id)
        self._busy.discard(replica_id)
        self._lowest.pop(replica_id, None)

    def rescore(self, replica_id: str) -> None:
        """Scores a replica anew that may be picked as before."""
        if replica_id not in self.table:
            return
        replica = self.fleet.replica(replica_id)
        assert replica is not None
        reserved_count, rules = self.ledger.reserved_count(replica_id), self.rules_of(replica.model)
        self._note_busy(replica, reserved_count, rules)
        self.table.put(replica.model, replica.revision, self._scored(replica, reserved_count, rules.weights))

    def _scored(self, replica: Replica, reserved_count: int, weights: Weights) -> Candidate:
        context_tokens = replica.max_context_tokens
        candidate = score(
            replica.replica_id, replica.address, replica.load, reserved_count, context_tokens, weights=weights
        )
        if 0 < context_tokens < self._least_context:
            self._least_context = context_tokens
        if not weights.locality:
            return candidate
        worker, locality = self.fleet.worker(replica.worker_id), self.routing.locality
        nearness = locality.score_of(worker.hello.node, worker.hello.zone) if worker is not None else 0.0
        total = (1.0 - weights.locality) * candidate.score + weights.locality * nearness
        return candidate._replace(score=total, locality_score=nearness)

    def _note_busy(self, replica: Replica, reserved_count: int, rules: Rules) -> None:
        """An engine in which requests wait has no use for more than keep it busy until the next report.

        Those on their way to it will wait there, too. One in which none waits takes all: nobody knows how many it can.
        """
        waiting, bound = replica.load.waiting_count, self.routing.queue_count
        if waiting and bound and waiting + reserved_count >= bound:
            self._busy.add(replica.replica_id)
        elif replica.replica_id in self._busy:
            self._busy.discard(replica.replica_id)
            self._opened.add(replica.model)
        if rules.low_limit or (self._lowest and replica.replica_id in self._lowest):
            self._note_kept(replica, rules, replica.load.running_count + waiting + reserved_count)

    def _note_kept(self, replica: Replica, rules: Rules, request_count: int) -> None:
        """Which bands a replica with so many requests has no place for: they wait, and look again when it has."""
        replica_id = replica.replica_id
        before = self._lowest.pop(replica_id, LOW_BAND)
        lowest = rules.lowest_band(request_count, is_full=replica.load.waiting_count > 0)
        if lowest > LOW_BAND:
            self._lowest[replica_id] = lowest
        if lowest < before:
            self._opened.add(replica.model)

    def _note_exclusion(self, replica: Replica, reason: str | None) -> None:
        known = self._excluded.get(replica.model, ())
        if reason is None and not known:
            return
        others = tuple(entry for entry in known if entry[0] != replica.replica_id)
        noted = others if reason is None else (*others, (replica.replica_id, reason))
        if noted:
            self._excluded[replica.model] = noted
        else:
            self._excluded.pop(replica.model, None)

    def _forget(self, replica: Replica, now: float) -> None:
        replica_id = replica.replica_id
        self._note_exclusion(replica, None)
        self._unlist(replica_id)
        self.quotas.lost(self.ledger.forget_replica(replica_id), now)
        self.breakers.forget(replica_id)
        self.outliers.forget(replica_id)
        self._prefixes.forget(replica_id)
        self.corrections.forget(replica_id)
        self._draining.discard(replica_id)
        self._ready_since.pop(replica_id, None)


def _is_before(used_at: float, forgotten_at: float | None) -> bool:
    """Whether whoever used a model can't have heard yet that it was let go."""
    return forgotten_at is not None and used_at <= forgotten_at + _UNHEARD_SECONDS
