"""What the scalable driver knows of nodes and replicas, and where replicas may go.

The core hands every node to `place`. Here it gets those that can be the best: nodes that have the weights in memory or
on disk, and the one where the least is left over; only where none of them has room, all nodes. That is enough, because
nodes are alike but for these, which is how `place` compares them.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from helios.mesh.gangs import GangDevice
from helios.proxy.activation.turns import Line
from helios.proxy.placement.place import Placed, Plan, place
from helios.proxy.placement.workers import Occupant, WorkerCapacity
from helios.proxy.scaling.ladder import Rung
from helios.proxy.scaling.load import LoadScaler
from tests.simulator.world import Hardware, Model, node_name

DEVICE: Final = "cuda:0"


@dataclass(eq=False, slots=True)
class Replica:
    """An engine with one model, on its way, serving, or on its way out."""

    state: "ModelState"
    node: int
    number: int
    ordered_at: float
    is_for_load: bool = False
    ready_at: float | None = None
    """When it was ready first."""
    is_draining: bool = False
    asleep_at: float | None = None
    """From when on it sleeps, since it was told to; None: it is awake, or is told to wake."""
    told_at: float = 0.0
    """When it was told to sleep, last."""
    is_waking: bool = False
    wake_count: int = 0
    booked_bytes: int = 0
    """Of its node's device."""
    counted_to: float = 0.0
    """Until when its booking is in the accounts."""
    running_count: int = 0
    queue: deque[int] = field(default_factory=deque)

    @property
    def is_ready(self) -> bool:
        return self.ready_at is not None and not self.is_draining and self.asleep_at is None and not self.is_waking

    @property
    def is_idle(self) -> bool:
        return not self.running_count and not self.queue


@dataclass(eq=False, slots=True)
class ModelState:
    """A model in use, or one that was."""

    index: int
    model: Model
    needed_bytes: int
    standing: list[Replica] = field(default_factory=list)
    """Replicas that are awake, or get there, and not on their way out."""
    sleeping: list[Replica] = field(default_factory=list)
    """Replicas that sleep, or are told to, in the order of their numbers."""
    held: deque[int] = field(default_factory=deque)
    request_count: int = 0
    """Requests that run, wait in engines, or are held."""
    last_used_at: float | None = None
    """None: never, or it was told to go to zero."""
    last_wanted_at: float = 0.0
    """When it was used last, whatever it was told since."""
    forecast_count: int = 0
    floor: Rung = Rung.DISK
    """The rung below which it is not to go, for what is expected of it."""
    promised_at: float = 0.0
    """Until when it was to be ready for that."""
    advised_idle_seconds: float | None = None
    check_at: float | None = None
    cool_at: float | None = None
    staged: set[int] = field(default_factory=set)
    fetched: set[int] = field(default_factory=set)
    scaler: LoadScaler | None = None
    """Set while its load may ask for more than one."""
    counts: deque[tuple[float, int]] = field(default_factory=deque)
    """What `request_count` became when, of the last minute."""
    observed_since: float = 0.0
    """When it got a replica after it had none."""
    roomless_until: float = 0.0

    @property
    def name(self) -> str:
        return self.model.entry.name

    def is_activating(self) -> bool:
        """Whether a replica is on its way that is not for load alone."""
        return any(not replica.is_ready and not replica.is_for_load for replica in self.standing)

    def use(self, now: float) -> None:
        """A request came to a replica, or left it."""
        self.last_used_at = self.last_wanted_at = now


@dataclass(eq=False, slots=True)
class Node:
    """A node's device, slots and staged revisions (models by index, with their bytes)."""

    index: int
    name: str
    free_bytes: int
    free_slots: int
    free_host_bytes: int
    replicas: dict[int, Replica] = field(default_factory=dict)
    staged: dict[int, int] = field(default_factory=dict)


class GivingWay(NamedTuple):
    """Who may make room at a node: the idle; those in use that have had their turn; those that will have had it."""

    victims: tuple[Occupant, ...] = ()
    turn_over: tuple[Occupant, ...] = ()
    in_turn: tuple[Occupant, ...] = ()


class Nodes:
    """All nodes, and those with a slot in the order of what they have free."""

    def __init__(self, hardware: Hardware, count: int) -> None:
        self._hardware = hardware
        self.all = [
            Node(index, node_name(index), hardware.device_bytes, hardware.slot_count, hardware.host_bytes)
            for index in range(count)
        ]
        self._by_name = {node.name: node for node in self.all}
        self.least_free_bytes = hardware.device_bytes
        """The least that any device had free."""
        self._by_free = [(hardware.device_bytes, index) for index in range(count)]

    def named(self, name: str) -> Node:
        return self._by_name[name]

    def take(self, replica: Replica) -> None:
        """A replica was ordered."""
        node = self.all[replica.node]
        replica.booked_bytes = replica.state.needed_bytes
        self._move(node, -replica.booked_bytes, -1)
        node.replicas[replica.number] = replica

    def rebook(self, replica: Replica, size_bytes: int) -> bool:
        """A replica fell asleep, or is to wake and has so much from now on; False where there is no room for that."""
        node = self.all[replica.node]
        if size_bytes - replica.booked_bytes > node.free_bytes:
            return False
        self._move(node, replica.booked_bytes - size_bytes, 0)
        replica.booked_bytes = size_bytes
        return True

    def give_back(self, replica: Replica) -> None:
        """A replica is gone."""
        node = self.all[replica.node]
        del node.replicas[replica.number]
        self._move(node, replica.booked_bytes, 1)

    def plan(
        self,
        state: ModelState,
        *,
        line: Line,
        giving_way: Callable[[Node], GivingWay] | None,
        is_another: bool,
    ) -> Plan:
        """Where a replica goes.

        Args:
            state: The model.
            line: Models that room is being made for.
            giving_way: Who may give way at a node: idle, in use for long enough, and others; None: nobody.
            is_another: The model has replicas, and no device takes two.
        """
        homes = {replica.node for replica in state.standing} if is_another else set()
        nodes = [self.all[index] for index in sorted((state.staged | state.fetched) - homes)]
        # A node where the model sleeps, and can't be woken, is the last to be chosen.
        beds = {replica.node for replica in state.sleeping}
        tightest = self._tightest(state.needed_bytes, homes | beds) or self._tightest(state.needed_bytes, homes)
        if len(line):
            # What is claimed may be where the least is left over.
            nodes = [node for node in self.all if node.index not in homes]
        elif tightest is not None:
            nodes.append(tightest)
        plan = place("", [self.capacity(node, state, line) for node in nodes], may_preempt=False)
        if isinstance(plan, Placed) or is_another:
            return plan
        others = [self.capacity(node, state, line, giving_way and giving_way(node)) for node in self.all]
        return place("", others, may_preempt=giving_way is not None)

    def capacity(
        self,
        node: Node,
        state: ModelState,
        line: Line,
        giving_way: GivingWay | None = None,
    ) -> WorkerCapacity:
        """What a node has left for a replica of a model."""
        giving_way = giving_way or GivingWay()
        claims = line.claims_on(node.name, state.name)
        devices: tuple[GangDevice, ...] = (GangDevice(DEVICE, "CUDA", node.free_bytes),)
        for claim in claims:
            devices = claim.book(devices)
        draining = tuple(
            Occupant(str(one.number), one.booked_bytes, (DEVICE,)) for one in node.replicas.values() if one.is_draining
        )
        return WorkerCapacity(
            worker_id=node.name,
            engines=(),
            needed_bytes=state.needed_bytes,
            devices=devices,
            memory_bytes=self._hardware.device_bytes,
            free_slot_count=node.free_slots - len(claims),
            draining=draining,
            victims=giving_way.victims,
            turn_over=giving_way.turn_over,
            in_turn=giving_way.in_turn,
            same_model_count=sum(one.node == node.index for one in (*state.standing, *state.sleeping)),
            is_staged=node.index in state.staged,
            is_on_disk=node.index in state.fetched,
            has_gpus=True,
        )

    def _tightest(self, needed_bytes: int, homes: set[int]) -> Node | None:
        place_of = bisect_left(self._by_free, (needed_bytes, -1))
        while place_of < len(self._by_free):
            index = self._by_free[place_of][1]
            if index not in homes:
                return self.all[index]
            place_of += 1
        return None

    def _move(self, node: Node, free_bytes: int, free_slots: int) -> None:
        if node.free_slots > 0:
            del self._by_free[bisect_left(self._by_free, (node.free_bytes, node.index))]
        node.free_bytes += free_bytes
        node.free_slots += free_slots
        self.least_free_bytes = min(self.least_free_bytes, node.free_bytes)
        if node.free_slots > 0:
            insort(self._by_free, (node.free_bytes, node.index))
