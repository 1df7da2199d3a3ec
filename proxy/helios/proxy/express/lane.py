"""Which replicas are in the express lane, and what must wait until they have left it.

A replica enters when its model has been fit for a while and is asked for often; it leaves with the first look that
finds it unfit. Both are one new set of routes for every Envoy. Until all of them have acknowledged a set without it,
requests may still come to it that nobody picked: so what would make it refuse them (drain, sleep, stop) is kept back
until then, and its endpoint stays.

    out ──fit, asked for──▶ in (published) ──unfit──▶ leaving (a set without it is published) ──acknowledged──▶ out

A model with several replicas has a place without any: the set says only that Envoy picks, and a lease among which, for
half a second at a time. What is kept back from a replica of a lease waits until that is over.

A set that no Envoy acknowledges holds nothing up for longer than `withdraw_seconds`. Pure.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from helios.proxy.actions import Action, Send
from helios.proxy.fleet.commands import DrainReplica, SleepReplica, StopReplica, WakeReplica

# A request that began in the lane may be told of, or end, as long after the lane was left.
_CARRIED_SECONDS = 60.0
# The weight of the newest second in a model's requests a second.
_SMOOTHING = 0.3
# Sets that are told apart until they are acknowledged, which takes milliseconds.
_SET_COUNT = 64
# One that is in it gives its place to one that is asked for so many times as often. What is asked for alike by chance
# changes places with each second else, and each change is a set of routes for every Envoy.
_STAYS_RATIO = 2.0
# Below this share of what lets a model in, it goes.
_LEAVES_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class ExpressPolicy:
    """Who takes the express lane.

    Attributes:
        model_count: models that may be in it at once, those asked for most; 0: there is no lane. Envoy compares each
            request with the name of each.
        per_second: requests a second that let a model in.
        settle_seconds: how long it must have been fit.
        withdraw_seconds: how long a drain waits at most for Envoys to acknowledge that a replica has left.
    """

    model_count: int = 0
    per_second: float = 1.0
    settle_seconds: float = 2.0
    withdraw_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """A model in the lane, the names that requests call it, its revision, and its replica and that one's address, which
    are empty where Envoy picks among several.
    """

    replica_id: str
    model: str
    names: tuple[str, ...]
    address: str
    revision: str

    @property
    def is_shared(self) -> bool:
        """Whether Envoy picks among several replicas."""
        return not self.replica_id


Places = frozenset[Place]


@dataclass(frozen=True, slots=True)
class _KeptBack:
    """An order that waits until its replica has left the lane."""

    since: float
    replica_id: str
    send: Send


class Lane:
    """The state of the lane. Times are monotonic seconds.

    Invariants: a replica that some Envoy may have in its lane (in a set since the last one that all acknowledged, or in
    a lease that is not over) gets no drain, sleep or stop, but for `withdraw_seconds`; an order that is kept back is
    let go exactly once.
    """

    def __init__(self, policy: ExpressPolicy, *, has_past: bool) -> None:
        """``has_past``: Envoys may still have the lane of an earlier run of this proxy; its leases are over by now."""
        self._policy = policy
        self.places: Places = frozenset()
        self.version = 1 if has_past and policy.model_count else 0
        """Grows with each set; 0: none was ever wanted."""
        self.changes = 0
        """Grows with whatever changes `addresses`."""
        self._is_past_open = bool(self.version)
        self._since_acknowledged: deque[tuple[int, Places]] = deque([(0, self.places)])
        self._fit_since: dict[str, float] = {}
        self._per_second: dict[str, float] = {}
        self._heard: dict[str, int] = {}
        self._kept_back: list[_KeptBack] = []
        self._left_at: dict[str, float] = {}
        # When the last lease of a replica ends, or ended; addresses of those whose lease nobody has seen end.
        self._leased_until: dict[str, float] = {}
        self._leased: dict[str, str] = {}

    def heard(self, model: str, count: int) -> None:
        """So many requests of a model reached its replicas."""
        if self._policy.model_count:
            self._heard[model] = self._heard.get(model, 0) + count

    def asked_for(self) -> list[str]:
        """Models that are asked for often enough to be in the lane, the most first, those in it before others alike."""
        held = {place.model for place in self.places}
        bound = self._policy.per_second
        rates = {
            model: rate
            for model, rate in self._per_second.items()
            if rate >= (bound * _LEAVES_RATIO if model in held else bound)
        }
        return sorted(rates, key=lambda model: -rates[model] * (_STAYS_RATIO if model in held else 1.0))

    def count(self) -> None:
        """A second is over."""
        for model in self._per_second.keys() | self._heard.keys():
            rate = self._per_second.get(model, 0.0) * (1.0 - _SMOOTHING) + self._heard.get(model, 0) * _SMOOTHING
            if rate < self._policy.per_second * _LEAVES_RATIO / 2:
                self._per_second.pop(model, None)
            else:
                self._per_second[model] = rate
        self._heard.clear()

    def choose(self, fit: Mapping[str, Place], now: float) -> None:
        """Sets who is in the lane: of the fit ones, the most asked for first, those that have been fit for a while."""
        self._fit_since = {model: self._fit_since.get(model, now) for model in fit}
        settled = [
            place
            for model, place in fit.items()
            if place in self.places or now - self._fit_since[model] >= self._policy.settle_seconds
        ]
        self._set(frozenset(settled[: self._policy.model_count]), now)

    def leave(self, unfit: Iterable[Place], now: float) -> None:
        """Takes replicas out at once."""
        gone = frozenset(unfit)
        for place in gone:
            self._fit_since.pop(place.model, None)
        self._set(self.places - gone, now)

    def _set(self, places: Places, now: float) -> None:
        if places == self.places:
            return
        for place in self.places - places:
            if not place.is_shared:
                self._left_at[place.replica_id] = now
        self.places = places
        self.version += 1
        self.changes += 1
        self._since_acknowledged.append((self.version, places))
        if len(self._since_acknowledged) > _SET_COUNT:
            # No Envoy takes them up. The oldest two become one, which is gone once a newer one is acknowledged.
            (_, oldest), (version, older) = self._since_acknowledged.popleft(), self._since_acknowledged.popleft()
            self._since_acknowledged.appendleft((version, oldest | older))

    def leased(self, addresses: Mapping[str, str], until: float) -> None:
        """Until then some Envoy picks by itself among these replicas, which are at these addresses."""
        for replica_id in addresses:
            self._leased_until[replica_id] = max(until, self._leased_until.get(replica_id, until))
        if not addresses.items() <= self._leased.items():
            self._leased.update(addresses)
            self.changes += 1

    def acknowledged(self, version: int, now: float) -> list[Send]:
        """Every Envoy has this set or a newer one; returns the orders that need not wait any more."""
        self._settle(version)
        return self._due(now)

    def _settle(self, version: int) -> None:
        self._is_past_open = False
        while len(self._since_acknowledged) > 1 and self._since_acknowledged[1][0] <= version:
            self._since_acknowledged.popleft()
        self.changes += 1

    def _due(self, now: float) -> list[Send]:
        """Takes out of what is kept back what need not wait any more, or has waited for as long as it may."""
        kept, self._kept_back = self._kept_back, []
        due: list[Send] = []
        for one in kept:
            is_late = now - one.since >= self._policy.withdraw_seconds
            if not is_late and self.may_get_requests(one.replica_id, now):
                self._kept_back.append(one)
            else:
                due.append(one.send)
        return due

    def expire(self, now: float) -> list[Send]:
        """Follows the time, about every second; returns the orders that need not wait any more.

        Gives up on Envoys that do not answer once one has waited for as long as it may.
        """
        for over in (self._left_at, self._leased_until):
            for replica_id in [key for key, at in over.items() if now - at > _CARRIED_SECONDS]:
                del over[replica_id]
        for replica_id in [key for key in self._leased if now >= self._leased_until.get(key, now)]:
            del self._leased[replica_id]
            self.changes += 1
        if self._kept_back and now - self._kept_back[0].since >= self._policy.withdraw_seconds:
            self._settle(self.version)
        return self._due(now)

    def may_get_requests(self, replica_id: str, now: float) -> bool:
        """Whether an Envoy may send requests to a replica that nobody picked."""
        if self._is_past_open or now < self._leased_until.get(replica_id, now):
            return True
        return any(place.replica_id == replica_id for _, places in self._since_acknowledged for place in places)

    def has_carried(self, replica_id: str) -> bool:
        """Whether a request that is told of now may have come by the lane."""
        if self._is_past_open:
            return True
        is_known = replica_id in self._leased_until or replica_id in self._left_at
        return is_known or self._has_alone(replica_id)

    def has_shared(self, replica_id: str) -> bool:
        """Whether a request that came by the lane and is told of now was one for several replicas."""
        return replica_id in self._leased_until and not self._has_alone(replica_id)

    def _has_alone(self, replica_id: str) -> bool:
        return any(place.replica_id == replica_id for place in self.places)

    def addresses(self) -> frozenset[str]:
        """Addresses that Envoys may send to by the lane, whatever is believed of their replicas."""
        sets = (places for _, places in self._since_acknowledged)
        alone = (place.address for places in sets for place in places if not place.is_shared)
        return frozenset((*alone, *self._leased.values()))

    def keep_back(self, actions: list[Action], now: float) -> list[Action]:
        """Takes out of a list of actions the orders that have to wait."""
        if not self.version:
            return actions
        passed: list[Action] = []
        for action in actions:
            replica_id = _stopped_by(action)
            if self._is_behind(action) or (replica_id and self.may_get_requests(replica_id, now)):
                assert isinstance(action, Send)
                # A worker's hello has its commands sent again.
                if all(kept.send != action for kept in self._kept_back):
                    self._kept_back.append(_KeptBack(now, replica_id or _woken_by(action), action))
            else:
                passed.append(action)
        return passed

    def _is_behind(self, action: Action) -> bool:
        """Whether an action wakes a replica whose order to sleep is kept back: the other way round, it would sleep."""
        woken = _woken_by(action)
        return bool(woken) and any(kept.replica_id == woken for kept in self._kept_back)


def _woken_by(action: Action) -> str:
    """The replica that an action wakes; empty: none."""
    match action:
        case Send(command):
            match command.order:
                case WakeReplica(replica_id):
                    return replica_id
    return ""


def _stopped_by(action: Action) -> str:
    """The replica that takes no requests once an action is carried out; empty: none."""
    match action:
        case Send(command):
            match command.order:
                case DrainReplica(replica_id) | SleepReplica(replica_id) | StopReplica(replica_id):
                    return replica_id
    return ""
