"""What the scalable driver knows of nodes and replicas, and where replicas may go.

The core hands every node to `place`. Here it gets those that can be the best: nodes that have the weights in memory or
on disk, and the one where the least is left over; only where none of them has room, all nodes. That is enough, because
nodes are alike but for these, which is how `place` compares them.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from helios.mesh.gangs import GangDevice
from helios.proxy.placement.place import Placed, Plan, place
from helios.proxy.placement.workers import Occupant, WorkerCapacity
from helios.proxy.scaling.load import LoadScaler
from tests.simulator.world import Hardware, Model, node_name

_DEVICE: Final = "cuda:0"


@dataclass(eq=False, slots=True)
class Replica:
    """An engine with one model, on its way, serving, or on its way out."""

    state: "ModelState"
    node: int
    number: int
    ordered_at: float
    is_for_load: bool = False
    ready_at: float | None = None
    is_draining: bool = False
    running_count: int = 0
    queue: deque[int] = field(default_factory=deque)

    @property
    def is_ready(self) -> bool:
        return self.ready_at is not None and not self.is_draining

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
    """Replicas that are not on their way out."""
    held: deque[int] = field(default_factory=deque)
    request_count: int = 0
    """Requests that run, wait in engines, or are held."""
    last_used_at: float | None = None
    forecast_count: int = 0
    advised_idle_seconds: float | None = None
    check_at: float | None = None
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
        return any(replica.ready_at is None and not replica.is_for_load for replica in self.standing)


@dataclass(eq=False, slots=True)
class Node:
    """A node's device, slots and staged revisions (models by index, with their bytes)."""

    index: int
    free_bytes: int
    free_slots: int
    free_host_bytes: int
    replicas: dict[int, Replica] = field(default_factory=dict)
    staged: dict[int, int] = field(default_factory=dict)


class Nodes:
    """All nodes, and those with a slot in the order of what they have free."""

    def __init__(self, hardware: Hardware, count: int) -> None:
        self._hardware = hardware
        self.all = [
            Node(index, hardware.device_bytes, hardware.slot_count, hardware.host_bytes) for index in range(count)
        ]
        self._names = [node_name(index) for index in range(count)]
        self._index = {name: index for index, name in enumerate(self._names)}
        self.least_free_bytes = hardware.device_bytes
        """The least that any device had free."""
        self._by_free = [(hardware.device_bytes, index) for index in range(count)]

    def index(self, worker_id: str) -> int:
        return self._index[worker_id]

    def name(self, index: int) -> str:
        return self._names[index]

    def take(self, replica: Replica) -> None:
        """A replica was ordered."""
        node = self.all[replica.node]
        self._move(node, -replica.state.needed_bytes, -1)
        node.replicas[replica.number] = replica

    def give_back(self, replica: Replica) -> None:
        """A replica is gone."""
        node = self.all[replica.node]
        del node.replicas[replica.number]
        self._move(node, replica.state.needed_bytes, 1)

    def plan(
        self, state: ModelState, *, victims: Callable[[Node], Iterable[Occupant]] | None, is_another: bool
    ) -> Plan:
        """Where a replica goes.

        Args:
            state: The model.
            victims: Who may give way at a node; None: nobody.
            is_another: The model has replicas, and no device takes two.
        """
        homes = {replica.node for replica in state.standing} if is_another else set()
        near = [self.capacity(self.all[index], state) for index in sorted((state.staged | state.fetched) - homes)]
        tightest = self._tightest(state.needed_bytes, homes)
        if tightest is not None:
            near.append(self.capacity(tightest, state))
        plan = place("", near, may_preempt=False)
        if isinstance(plan, Placed) or is_another:
            return plan
        others = [self.capacity(node, state, victims(node) if victims is not None else ()) for node in self.all]
        return place("", others, may_preempt=victims is not None)

    def capacity(self, node: Node, state: ModelState, victims: Iterable[Occupant] = ()) -> WorkerCapacity:
        """What a node has left for a replica of a model."""
        draining = tuple(
            Occupant(str(one.number), one.state.needed_bytes, (_DEVICE,))
            for one in node.replicas.values()
            if one.is_draining
        )
        return WorkerCapacity(
            worker_id=self._names[node.index],
            engines=(),
            needed_bytes=state.needed_bytes,
            devices=(GangDevice(_DEVICE, "CUDA", node.free_bytes),),
            memory_bytes=self._hardware.device_bytes,
            free_slot_count=node.free_slots,
            draining=draining,
            victims=tuple(victims),
            same_model_count=sum(one.node == node.index for one in state.standing),
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
