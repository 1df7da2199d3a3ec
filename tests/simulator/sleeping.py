"""Replicas that sleep: what `Lifecycle`, `Warmth` and `Cooling` do about them, over the scalable driver's nodes.

A sleeping replica books what it leaves on its device and a slot of its node; its weights are staged, and give way there
as all that is staged. When it goes is `rung_after`'s to say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, floor
from typing import Final

from helios.proxy.cooling import SLOTS_PER_SPARE
from helios.proxy.scaling.ladder import Cooldowns, Rung, rung_after
from helios.proxy.warmth import WarmthPolicy
from tests.simulator.clock import Clock
from tests.simulator.nodes import ModelState, Nodes, Replica
from tests.simulator.staging import Staging
from tests.simulator.world import Hardware, Stores

Note = Callable[[float, str, ModelState, int], None]
# The core looks at each model once a second.
_ROUND_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Outside:
    """What becomes of replicas: one is awake, one is to go, one books so much from now on (False: there is no room);
    and who is told of decisions.
    """

    ready: Callable[[Replica, float], None]
    drain: Callable[[Replica, float], None]
    rebook: Callable[[Replica, int, float], bool]
    note: Note


class Sleepers:
    """Sleep, wake, and the end of sleep."""

    def __init__(
        self,
        policy: WarmthPolicy,
        idle_seconds: float,
        hardware: Hardware,
        *,
        clock: Clock,
        nodes: Nodes,
        stores: Stores,
        staging: Staging,
        outside: Outside,
    ) -> None:
        """``idle_seconds`` is how long a replica that nobody uses stays awake."""
        self._policy = policy
        self._cooldowns = Cooldowns(idle_seconds, policy.asleep_seconds, policy.staged_seconds)
        self._hardware = hardware
        self._clock = clock
        self._nodes = nodes
        self._stores = stores
        self._staging = staging
        self._outside = outside
        self._can_not_wake: set[int] = set()
        # Nodes that the next round looks at.
        self._short: set[int] = set()

    def may_sleep(self, replica: Replica) -> bool:
        """Whether an idle replica goes to sleep rather than goes."""
        hardware = self._hardware
        is_able = hardware.can_sleep and replica.wake_count < hardware.wake_limit
        return self._policy.sleeps and is_able and replica.is_ready and replica.is_idle

    def sleep(self, replica: Replica, now: float) -> None:
        """Puts a replica to sleep; its weights stay in memory."""
        state = replica.state
        self._staging.keep(state, replica.node, now)
        state.standing.remove(replica)
        state.sleeping.append(replica)
        state.sleeping.sort(key=lambda one: one.number)
        self._outside.note(now, "sleep", state, replica.node)
        replica.told_at, replica.asleep_at = now, now + self._hardware.sleep_seconds
        self._clock.at(replica.asleep_at, partial(self._fell_asleep, replica, replica.asleep_at))
        self.cool_later(state, now)
        self.relieve_later(replica.node, now)

    def find(self, state: ModelState) -> Replica | None:
        """A replica that can be woken."""
        return next((replica for replica in state.sleeping if replica.number not in self._can_not_wake), None)

    def wake(self, replica: Replica, now: float) -> bool:
        """Wakes a replica; False where its memory was given away: it sleeps on until room comes."""
        state = replica.state
        if not self._outside.rebook(replica, state.needed_bytes, now):
            self._can_not_wake.add(replica.number)
            return False
        assert replica.asleep_at is not None
        # While it still falls asleep, it wakes as soon as it sleeps.
        begun = max(now, replica.asleep_at)
        replica.asleep_at, replica.is_waking = None, True
        state.sleeping.remove(replica)
        state.standing.append(replica)
        self._outside.note(now, "wake", state, replica.node)
        seconds = self._stores.wake(state.index, replica.node, begun)
        self._clock.at(begun + seconds, partial(self._awake, replica))
        return True

    def look_again(self) -> None:
        """Room may have come."""
        self._can_not_wake.clear()

    def cool_later(self, state: ModelState, now: float) -> None:
        """Looks at a model's sleepers at the first second at which they may have slept for long enough."""
        if not state.sleeping or state.floor >= Rung.ASLEEP or not self._policy.asleep_seconds:
            return
        due = max(state.last_wanted_at, state.promised_at) + self._cooldowns.idle_seconds + self._policy.asleep_seconds
        due = max(ceil(due), ceil(now))
        if state.cool_at is None or due < state.cool_at:
            state.cool_at = due
            self._clock.at(due, partial(self._cool, state, due), is_round=True)

    def relieve_later(self, node: int, now: float) -> None:
        """Looks in the next round whether sleepers leave a node too few slots."""
        if node not in self._short and self._is_short(node):
            self._short.add(node)
            self._clock.at(floor(now) + _ROUND_SECONDS, partial(self._relieve, node), is_round=True)

    def _is_short(self, node: int) -> bool:
        staying_count = sum(not replica.is_draining for replica in self._nodes.all[node].replicas.values())
        slot_count = self._hardware.slot_count
        return staying_count + slot_count // SLOTS_PER_SPARE > slot_count

    def _relieve(self, node: int, now: float) -> None:
        self._short.discard(node)
        replicas = self._nodes.all[node].replicas.values()
        sleepers = [one for one in replicas if one.asleep_at is not None and not one.is_draining]
        # What is told to sleep in this round is seen asleep in the next.
        able = [one for one in sleepers if not one.state.held and one.told_at < now]
        if able and self._is_short(node):
            oldest = min(able, key=lambda one: one.state.last_wanted_at)
            self._staging.keep(oldest.state, node, now, is_loaded=False)
            self._outside.drain(oldest, now)
        if sleepers:
            self.relieve_later(node, now)

    def _cool(self, state: ModelState, due: float, now: float) -> None:
        if state.cool_at != due:
            return
        state.cool_at = None
        unused_seconds = now - max(state.last_wanted_at, state.promised_at)
        rung = rung_after(unused_seconds, self._cooldowns, state.floor)
        if state.held or rung >= Rung.ASLEEP:
            self.cool_later(state, now + _ROUND_SECONDS)
            return
        for replica in list(state.sleeping):
            if rung is Rung.STAGED:
                self._staging.keep(state, replica.node, now, is_loaded=False)
            self._outside.drain(replica, now)

    def _fell_asleep(self, replica: Replica, asleep_at: float, now: float) -> None:
        if replica.asleep_at == asleep_at and not replica.is_draining:
            self._outside.rebook(replica, self._hardware.asleep_bytes, now)

    def _awake(self, replica: Replica, now: float) -> None:
        if replica.is_draining:
            return
        replica.is_waking = False
        replica.wake_count += 1
        self._outside.ready(replica, now)
