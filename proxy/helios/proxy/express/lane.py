"""Which replicas are in the express lane, and what must wait until they have left it.

A replica enters when its model has been fit for a while and is asked for often; it leaves with the first look that
finds it unfit. Both are one new set of routes for every Envoy. Until all of them have acknowledged a set without it,
requests may still come to it that nobody picked: so what would make it refuse them (drain, sleep, stop) is kept back
until then, and its endpoint stays.

    out ──fit, asked for──▶ in (published) ──unfit──▶ leaving (a set without it is published) ──acknowledged──▶ out

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
    """A replica in the lane: its model, the names that requests call it, its address and revision."""

    replica_id: str
    model: str
    names: tuple[str, ...]
    address: str
    revision: str


Places = frozenset[Place]


@dataclass(frozen=True, slots=True)
class _KeptBack:
    """An order that waits until its replica has left the lane."""

    since: float
    replica_id: str
    send: Send


class Lane:
    """The state of the lane. Times are monotonic seconds.

    Invariants: a replica that some Envoy may have in its lane (in a set since the last one that all acknowledged) gets
    no drain, sleep or stop, but for `withdraw_seconds`; an order that is kept back is let go exactly once.
    """

    def __init__(self, policy: ExpressPolicy, *, has_past: bool) -> None:
        """``has_past``: Envoys may still have the lane of an earlier run of this proxy."""
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
            self._left_at[place.replica_id] = now
        self.places = places
        self.version += 1
        self.changes += 1
        self._since_acknowledged.append((self.version, places))
        if len(self._since_acknowledged) > _SET_COUNT:
            # No Envoy takes them up. The oldest two become one, which is gone once a newer one is acknowledged.
            (_, oldest), (version, older) = self._since_acknowledged.popleft(), self._since_acknowledged.popleft()
            self._since_acknowledged.appendleft((version, oldest | older))

    def acknowledged(self, version: int) -> list[Send]:
        """Every Envoy has this set or a newer one; returns the orders that need not wait any more."""
        self._is_past_open = False
        while len(self._since_acknowledged) > 1 and self._since_acknowledged[1][0] <= version:
            self._since_acknowledged.popleft()
        self.changes += 1
        kept, self._kept_back = self._kept_back, []
        due: list[Send] = []
        for one in kept:
            if self.may_get_requests(one.replica_id):
                self._kept_back.append(one)
            else:
                due.append(one.send)
        return due

    def expire(self, now: float) -> list[Send]:
        """Gives up on Envoys that do not answer once an order has waited for as long as it may; returns the orders."""
        for replica_id in [key for key, at in self._left_at.items() if now - at > _CARRIED_SECONDS]:
            del self._left_at[replica_id]
        if self._kept_back and now - self._kept_back[0].since >= self._policy.withdraw_seconds:
            return self.acknowledged(self.version)
        return []

    def may_get_requests(self, replica_id: str) -> bool:
        """Whether an Envoy may send requests to a replica that nobody picked."""
        if self._is_past_open:
            return True
        return any(place.replica_id == replica_id for _, places in self._since_acknowledged for place in places)

    def has_carried(self, replica_id: str) -> bool:
        """Whether a request that is told of now may have come by the lane."""
        if self._is_past_open:
            return True
        return replica_id in self._left_at or any(place.replica_id == replica_id for place in self.places)

    def addresses(self) -> frozenset[str]:
        """Addresses that Envoys may send to by the lane, whatever is believed of their replicas."""
        return frozenset(place.address for _, places in self._since_acknowledged for place in places)

    def keep_back(self, actions: list[Action], now: float) -> list[Action]:
        """Takes out of a list of actions the orders that have to wait."""
        if not self.version:
            return actions
        passed: list[Action] = []
        for action in actions:
            replica_id = _stopped_by(action)
            if self._is_behind(action) or (replica_id and self.may_get_requests(replica_id)):
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
