"""A core, a worker that does as it is told and an Envoy, for the tests of swaps."""

import json
from collections.abc import Iterable
from dataclasses import replace

from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core, CorePolicy
from helios.proxy.fleet.commands import Command, DrainReplica, Order, StartReplica, StopReplica
from helios.proxy.fleet.state import Form, Load, Replica, ReplicaState
from helios.proxy.starts import asked_replica
from helios.proxy.swap import SwapFailures, SwapPolicy
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, counter, entry, hello, policy

S = ReplicaState
BOTH = json.dumps({"compilation": "COMPILATION_MODE_EAGER_THEN_COMPILED"})
SWAP = SwapPolicy(after_seconds=20, recent_seconds=60, overlap_seconds=2, back_off_seconds=60, start_seconds=2000)


def both(name: str = "m", **changes: object) -> ModelEntry:
    return replace(entry(name, engine_settings=BOTH), **changes)  # type: ignore[arg-type]


def swap_policy(idle_seconds: float = 900.0) -> CorePolicy:
    base = policy(idle_seconds=idle_seconds, residency_seconds=1.0)
    return replace(base, lifecycle=replace(base.lifecycle, swap=SWAP))


class SwapWorld:
    """A core with one worker, whose replicas do as they are told, and an Envoy that acknowledges when told to."""

    def __init__(self, *models: ModelEntry, memory_bytes: int = 8 * GIB, idle_seconds: float = 900.0) -> None:
        self.policy = swap_policy(idle_seconds)
        self.models = models or (both(),)
        self.memory_bytes = memory_bytes
        self.now = 0.0
        self.replicas: dict[str, Replica] = {}
        self.settings: dict[str, str] = {}
        self.orders: list[Order] = []
        self.reports: list[actions.Action] = []
        self.released: list[str] = []
        self.sequence = 0
        self.requests = 0
        self.new_id = counter()
        self.restart()

    def restart(self, remembered: Iterable[SwapFailures] = (), *, incarnation: str = "") -> None:
        """A new proxy, which remembers that, and to which the worker says hello; by default, one that runs anew."""
        self.core = Core(self.policy, new_id=self.new_id, known_workers=(), now=self.now)
        self.core.lifecycle.swaps.restore(remembered)
        self.apply(self.core.models_replaced(self.models, self.now, is_synced=True))
        self.sequence = 0
        self.greet(incarnation or str(self.now))

    def greet(self, incarnation: str) -> None:
        """The worker says hello."""
        told = hello(replicas=tuple(self.replicas.values()), memory_bytes=self.memory_bytes, incarnation=incarnation)
        self.incarnation = incarnation
        self.apply(self.core.worker_hello(told, self.now))

    def apply(self, todo: list[actions.Action]) -> None:
        for action in todo:
            match action:
                case actions.Send(command):
                    self.orders.append(command.order)
                    self.obey(command)
                case actions.Release(hold, _):
                    self.released.append(hold.request_id)
                case _:
                    self.reports.append(action)

    def obey(self, command: Command) -> None:
        match command.order:
            case StartReplica() as order:
                item = replace(asked_replica("w", order), state=S.LOADING, engine="vllm")
                self.settings[order.replica_id] = order.engine_settings
                self.tell(item)
            case DrainReplica(replica_id, seconds) if replica_id in self.replicas:
                if seconds == SWAP.drain_seconds:
                    self.check_swap(self.replicas[replica_id])
                self.tell(replace(self.replicas[replica_id], state=S.DRAINING))
            case StopReplica(replica_id) if replica_id in self.replicas:
                self.tell(replace(self.replicas[replica_id], state=S.DRAINING))
                self.tell(replace(self.replicas[replica_id], state=S.STOPPED))
        self.apply(self.core.command_acknowledged("w", command.command_id, refused_reason="", message="", now=self.now))

    def check_swap(self, drained: Replica) -> None:
        """An eager replica gives its place to nothing but a compiled one that takes requests."""
        assert drained.form is Form.EAGER
        candidates = [one for one in self.replicas.values() if self.core.traffic.is_candidate(one.replica_id)]
        assert any(one.form is Form.COMPILED for one in candidates)

    def tell(self, item: Replica) -> None:
        self.sequence += 1
        self.replicas[item.replica_id] = item
        if item.state.is_gone:
            del self.replicas[item.replica_id]
        self.apply(self.core.replica_event("w", self.sequence, item, self.now))

    def become_ready(self, item: Replica, *, is_acknowledged: bool = True) -> Replica:
        changed = replace(item, state=S.READY, address=f"127.0.0.1:{1000 + len(self.settings)}")
        self.tell(changed)
        if is_acknowledged:
            self.acknowledge()
        return changed

    def acknowledge(self) -> None:
        self.apply(self.core.endpoints_acknowledged(self.core.fleet.endpoints(), self.now))

    def fail(self, item: Replica, reason: str = "ENGINE_START_FAILED") -> None:
        self.end(replace(item, state=S.FAILED, failure_reason=reason, failure_message="no compiler"))

    def end(self, ended: Replica) -> None:
        """A replica ends as a worker tells of it: draining until its last process is gone."""
        self.tell(replace(ended, state=S.DRAINING))
        self.pass_time(0.1)
        self.tell(ended)

    def ask(self, model: str = "m") -> str:
        """One request: the replica that it is sent to and that ends it at once, or empty where it is held."""
        self.requests += 1
        request_id = f"q{self.requests}"
        known = next(one for one in self.models if one.name == model)
        pick = self.core.pick(known, request_id, self.now)
        if pick is None:
            _, todo = self.core.hold(known, request_id, size_bytes=0, deadline=self.now + 300, now=self.now)
            self.apply(todo)
            return ""
        replica_id = pick.choices[0].replica_id
        self.apply(self.core.load_report([LoadDelta(replica_id, Load(), (request_id,), ((request_id, 0),))], self.now))
        return replica_id

    def pass_time(self, seconds: float, *, is_used: bool = False) -> None:
        """Time in steps of a second, as the runtime lets it pass."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            if is_used:
                self.ask()
            self.apply(self.core.worker_seen("w", self.now))
            self.apply(self.core.tick(self.now))

    def starts(self) -> list[StartReplica]:
        return [order for order in self.orders if isinstance(order, StartReplica)]

    def spare(self) -> Replica:
        (found,) = [item for item in self.replicas.values() if item.is_spare]
        return found

    def eager(self) -> Replica:
        (found,) = [item for item in self.replicas.values() if item.form is Form.EAGER]
        return found

    def serve(self) -> Replica:
        """Brings the model up and uses it until a compiled replica is on its way; returns that."""
        self.ask()
        self.become_ready(self.eager())
        self.pass_time(SWAP.after_seconds + 1, is_used=True)
        return self.spare()

    def of(self, kind: type[actions.Action]) -> list[actions.Action]:
        return [action for action in self.reports if isinstance(action, kind)]
