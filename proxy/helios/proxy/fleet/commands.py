"""Commands to workers, kept until they are acknowledged.

A command may be lost with the stream that carried it, so each is sent again, with the same id, after its worker's next
hello; workers carry a command out once however often it comes. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from helios.proxy.fleet.state import Adapter, Replica, ReplicaState


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start a replica. `engine_settings` is the contract's JSON; `served_names` are the model's aliases.

    `requested_at` (seconds since the epoch) and `traceparent` are of the request that asked for it; 0 and empty: none.
    `memory_items` is what `memory_bytes` is made of: the contract's kinds, and bytes. `is_background`: it is to take
    another one's place, and nobody waits for it. `device_ids` is empty where the worker is to choose.
    """

    replica_id: str
    model: str
    revision: str
    engine: str
    memory_bytes: int
    kv_cache_bytes: int
    max_context_tokens: int
    engine_settings: str = ""
    served_names: tuple[str, ...] = ()
    requested_at: float = 0.0
    traceparent: str = ""
    memory_items: tuple[tuple[str, int], ...] = ()
    host_memory_items: tuple[tuple[str, int], ...] = ()
    device_count: int = 1
    device_ids: tuple[str, ...] = ()
    is_background: bool = False


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Let a replica finish its requests, then stop it."""

    replica_id: str
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class StopReplica:
    """Stop a replica now."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class EvictRevision:
    """Drop a revision's bytes from the node."""

    revision: str


@dataclass(frozen=True, slots=True)
class StageRevision:
    """Bring a revision's weights to host memory."""

    revision: str
    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class UnstageRevision:
    """Give a staged revision's memory back."""

    revision: str


@dataclass(frozen=True, slots=True)
class SleepReplica:
    """Take a replica's weights and KV cache off its device."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class WakeReplica:
    """Bring a sleeping replica back."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class SetAdapters:
    """Have these LoRA adapters, and no others."""

    replica_id: str
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """Refuse what leaders before this one ordered: nothing but the command's epoch. Its answer says that it holds."""


Order = (
    Fence
    | StartReplica
    | DrainReplica
    | StopReplica
    | EvictRevision
    | StageRevision
    | UnstageRevision
    | SleepReplica
    | WakeReplica
    | SetAdapters
)


@dataclass(frozen=True, slots=True)
class Command:
    """An order, its id and the worker that it is for.

    `epoch` is that of the leader when it gave the order: one that is sent late is the worker's to judge by that.
    """

    command_id: str
    worker_id: str
    order: Order
    epoch: int = 0


class CommandBook:
    """Commands that were issued and not acknowledged, by worker, in the order of issue."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._pending: dict[str, dict[str, Command]] = {}
        self.epoch = 0
        """In which this proxy leads, or led last; 0: there are no leases."""

    def issue(self, worker_id: str, order: Order) -> Command:
        """Makes a command."""
        command = Command(self._new_id(), worker_id, order, self.epoch)
        self._pending.setdefault(worker_id, {})[command.command_id] = command
        return command

    def acknowledge(self, worker_id: str, command_id: str) -> Command | None:
        """Strikes a command off; None where it was struck off before."""
        return self._pending.get(worker_id, {}).pop(command_id, None)

    def pending(self, worker_id: str) -> list[Command]:
        """What a worker has not acknowledged."""
        return list(self._pending.get(worker_id, {}).values())

    def renew(self, worker_id: str) -> list[Command]:
        """What a worker has not acknowledged, to be sent again: as orders of this epoch."""
        orders = self._pending.get(worker_id, {})
        orders |= {command_id: replace(command, epoch=self.epoch) for command_id, command in orders.items()}
        return list(orders.values())

    def has_pending_drain(self, worker_id: str, replica_id: str) -> bool:
        """Whether a replica's drain is still on its way."""
        orders = (command.order for command in self._pending.get(worker_id, {}).values())
        return any(isinstance(order, DrainReplica) and order.replica_id == replica_id for order in orders)

    def as_ordered(self, worker_id: str, replica: Replica) -> Replica:
        """A replica as its worker told it, and as the newest order that it has not answered leaves it.

        What was said before an order arrived must not undo what is believed since the order.
        """
        orders = (command.order for command in self._pending.get(worker_id, {}).values())
        own = [o for o in orders if isinstance(o, SleepReplica | WakeReplica) and o.replica_id == replica.replica_id]
        match own[-1] if own else None, replica.state:
            case SleepReplica(), ReplicaState.READY:
                return replace(replica, state=ReplicaState.ASLEEP)
            case WakeReplica(), ReplicaState.ASLEEP:
                return replace(replica, state=ReplicaState.WAKING)
            case _:
                return replica

    def forget_worker(self, worker_id: str) -> None:
        """Drops the commands of a worker that is no longer believed in."""
        self._pending.pop(worker_id, None)
