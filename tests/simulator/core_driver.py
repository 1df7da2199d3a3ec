"""The real core over virtual time, second by second: too slow for a large fleet, the judge of the driver that is not.

Workers and engines are those of `world`; what workers report arrives at once, Envoy acknowledges at once, and the
registry's targets come to the second.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from helios.proxy import actions
from helios.proxy.core import Core, CorePolicy
from helios.proxy.fleet.commands import (
    DrainReplica,
    Order,
    SleepReplica,
    StageRevision,
    StartReplica,
    StopReplica,
    UnstageRevision,
    WakeReplica,
)
from helios.proxy.fleet.state import Device, DeviceKind, Replica, ReplicaState, StagedState, WorkerHello
from helios.proxy.fleet.state import Load as EngineLoad
from helios.proxy.holds import Hold
from helios.proxy.routing.pick import Pick
from helios.proxy.scaling.forecast import Expected
from helios.proxy.traffic import LoadDelta
from helios.proxy.usage.advice import RUNGS
from helios.registry.client import Target
from tests.simulator.clock import Clock
from tests.simulator.expected import FORECAST_DELAY_SECONDS
from tests.simulator.loads import HOUR, Load
from tests.simulator.outcome import Decision
from tests.simulator.world import Hardware, Model, Stores, node_name

# Two hours without news, and a target counts for nothing.
_TARGET_SECONDS = 2 * HOUR


@dataclass(eq=False, slots=True)
class _Engine:
    """A replica as its worker has it."""

    replica: Replica
    model: int
    running_count: int = 0
    queue: deque[int] = field(default_factory=deque)
    is_draining: bool = False
    booked_bytes: int = 0
    asleep_at: float | None = None
    """From when on it sleeps, since it was told to; None: it was not, or is told to wake."""
    wake_count: int = 0


class CoreRun:
    """A run of the core over a load. Call `run` once; `decisions` are in the order in which they were made."""

    def __init__(
        self,
        policy: CorePolicy,
        hardware: Hardware,
        models: Sequence[Model],
        load: Load,
        *,
        node_count: int,
        targets: Sequence[Sequence[Target]] | None = None,
    ) -> None:
        """As `Fleet`, with a fleet in which nothing ran before; the policy's mode says whether targets are followed."""
        numbers = itertools.count(1)
        self._core = Core(policy, new_id=lambda: f"{next(numbers):09d}", known_workers=(), now=0.0)
        self._hardware = hardware
        self._models = models
        self._index = {model.entry.name: index for index, model in enumerate(models)}
        self._by_revision = {model.entry.revision: index for index, model in enumerate(models)}
        self._load = load
        self._targets = targets
        self._stores = Stores(hardware, models, node_count)
        self._workers = [node_name(index) for index in range(node_count)]
        self._engines: dict[str, _Engine] = {}
        self._sequences = dict.fromkeys(self._workers, 0)
        self._clock = Clock()
        self._envoy: frozenset[str] = frozenset()
        self._lane_version = 0
        self.first_token_seconds: dict[int, float] = {}
        self.decisions: list[Decision] = []

    def run(self) -> None:
        """Plays the load to its end."""
        for worker in self._workers:
            device = Device("cuda:0", DeviceKind.CUDA, self._hardware.device_bytes, 0)
            hello = WorkerHello(
                worker, "1", worker, (device,), ("vllm",), self._hardware.slot_count, (),
                host_memory_bytes=self._hardware.host_bytes,
            )  # fmt: skip
            self._do(self._core.worker_hello(hello, 0.0), 0.0)
        entries = [model.entry for model in self._models]
        self._do(self._core.models_replaced(entries, 0.0, is_synced=True), 0.0)
        for index, time in enumerate(self._load.times):
            self._clock.at(time, partial(self._arrive, index))
        for second in range(1, int(self._load.span.simulated_hours * HOUR)):
            self._clock.at(float(second), self._tick, is_round=True)
        self._clock.run_until(self._load.span.simulated_hours * HOUR)

    def _tick(self, now: float) -> None:
        hour, seconds = divmod(int(now), int(HOUR))
        if self._targets is not None and seconds == FORECAST_DELAY_SECONDS:
            expected = {
                target.model: Expected(
                    RUNGS[target.rung], target.replica_count, target.reason, now + _TARGET_SECONDS, target.idle_seconds
                )
                for target in self._targets[hour]
            }
            self._do(self._core.expect(expected, now), now)
        if seconds % 2:
            # Often enough for a proxy that gives workers up after three seconds.
            for worker in self._workers:
                self._do(self._core.worker_seen(worker, now), now)
        self._do(self._core.expire_holds(now), now)
        self._do(self._core.tick(now), now)

    # Requests.
    def _arrive(self, index: int, now: float) -> None:
        entry = self._models[self._load.models[index]].entry
        chosen = self._core.pick(entry, str(index), now)
        if chosen is not None:
            self._send(index, chosen, now)
            return
        _, todo = self._core.hold(entry, str(index), size_bytes=0, deadline=now + 300.0, now=now)
        self._do(todo, now)

    def _send(self, index: int, chosen: Pick, now: float) -> None:
        engine = self._engines[chosen.choices[0].replica_id]
        if engine.running_count < self._hardware.running_count:
            self._run_request(index, engine, now)
        else:
            engine.queue.append(index)
        self._report(engine, now, started=(str(index),))

    def _run_request(self, index: int, engine: _Engine, now: float) -> None:
        load = self._load
        first, whole = self._models[engine.model].times(
            load.prompt_tokens[index], load.completion_tokens[index], engine.running_count
        )
        engine.running_count += 1
        self.first_token_seconds[index] = now + first - load.times[index] + self._hardware.edge_seconds
        self._clock.at(now + whole, lambda at: self._finished(index, engine, at))

    def _finished(self, index: int, engine: _Engine, now: float) -> None:
        engine.running_count -= 1
        if engine.queue:
            self._run_request(engine.queue.popleft(), engine, now)
        self._report(engine, now, finished=((str(index), 0),))
        self._stop_if_idle(engine, now)

    def _report(
        self, engine: _Engine, now: float, *, started: tuple[str, ...] = (), finished: tuple[tuple[str, int], ...] = ()
    ) -> None:
        load = EngineLoad(engine.running_count, len(engine.queue))
        delta = LoadDelta(engine.replica.replica_id, load, started, finished)
        self._do(self._core.load_report([delta], now), now)

    # What the core wants done.
    def _do(self, todo: Iterable[actions.Action], now: float) -> None:
        for action in todo:
            match action:
                case actions.Send(command):
                    refused = self._order(command.worker_id, command.order, now)
                    acknowledged = self._core.command_acknowledged(
                        command.worker_id, command.command_id, refused_reason=refused, message=refused, now=now
                    )
                    self._do(acknowledged, now)
                case actions.Release(Hold() as hold, chosen):
                    self._send(int(hold.request_id), chosen, now)
                case _:
                    pass
        lane = self._core.express.lane
        if lane.version != self._lane_version:
            self._lane_version = lane.version
            self._do(self._core.express_acknowledged(lane.version, now), now)
        endpoints = self._core.fleet.endpoints() | lane.addresses()
        if endpoints != self._envoy:
            self._envoy = endpoints
            self._do(self._core.endpoints_acknowledged(endpoints, now), now)

    def _order(self, worker: str, order: Order, now: float) -> str:
        """Has a worker carry an order out; returns why it is refused, if it is."""
        node = self._workers.index(worker)
        match order:
            case SleepReplica(replica_id):
                return self._sleep(self._engines[replica_id], now)
            case WakeReplica(replica_id):
                return self._wake(self._engines[replica_id], now)
            case StartReplica(replica_id, model):
                self._note(now, "start", model, worker)
                believed = self._core.fleet.replica(replica_id)
                assert believed is not None
                self._engines[replica_id] = _Engine(believed, self._index[model], booked_bytes=believed.memory_bytes)
                _, seconds = self._stores.start(self._index[model], node, now)
                self._clock.at(now + seconds, lambda at: self._ready(replica_id, at))
            case DrainReplica(replica_id) | StopReplica(replica_id):
                engine = self._engines[replica_id]
                if not engine.is_draining:
                    engine.is_draining = True
                    self._note(now, "drain", engine.replica.model, worker)
                    self._stop_if_idle(engine, now)
            case StageRevision(revision, model):
                self._note(now, "stage", model, worker)
                is_loaded = any(
                    one.replica.revision == revision and one.replica.worker_id == worker and one.asleep_at is None
                    for one in self._engines.values()
                )
                self._stores.stage(self._index[model], node, now, is_loaded=is_loaded)
                staged = self._core.fleet.worker(worker)
                assert staged is not None
                done = replace(staged.staged[revision], state=StagedState.STAGED)
                self._do(self._core.staged_event(worker, self._next(worker), done, now), now)
            case UnstageRevision(revision):
                self._stores.unstage(self._by_revision[revision], node)
            case _:
                raise AssertionError(f"nobody simulates {order}")
        return ""

    def _ready(self, replica_id: str, now: float) -> None:
        engine = self._engines.get(replica_id)
        if engine is None or engine.is_draining:
            return
        can_sleep = self._hardware.can_sleep
        self._changed(engine, now, state=ReplicaState.READY, address=f"10.0.0.1:{int(replica_id)}", can_sleep=can_sleep)

    def _sleep(self, engine: _Engine, now: float) -> str:
        if engine.wake_count >= self._hardware.wake_limit:
            return "SLEEP_CYCLES_USED_UP"
        self._note(now, "sleep", engine.replica.model, engine.replica.worker_id)
        engine.asleep_at = now + self._hardware.sleep_seconds
        self._clock.at(engine.asleep_at, partial(self._fell_asleep, engine, engine.asleep_at))
        return ""

    def _fell_asleep(self, engine: _Engine, asleep_at: float, now: float) -> None:
        if engine.asleep_at == asleep_at and not engine.is_draining:
            engine.booked_bytes = self._hardware.asleep_bytes
            self._changed(engine, now, state=ReplicaState.ASLEEP, memory_bytes=engine.booked_bytes)

    def _wake(self, engine: _Engine, now: float) -> str:
        worker_id = engine.replica.worker_id
        believed = self._core.fleet.replica(engine.replica.replica_id)
        assert believed is not None
        assert engine.asleep_at is not None
        booked = sum(one.booked_bytes for one in self._engines.values() if one.replica.worker_id == worker_id)
        if booked - engine.booked_bytes + believed.memory_bytes > self._hardware.device_bytes:
            return "NO_CAPACITY"
        self._note(now, "wake", engine.replica.model, worker_id)
        begun = max(now, engine.asleep_at)
        engine.asleep_at, engine.booked_bytes = None, believed.memory_bytes
        engine.replica = replace(believed, state=ReplicaState.WAKING)
        seconds = self._stores.wake(engine.model, self._workers.index(worker_id), begun)
        self._clock.at(begun + seconds, partial(self._awake, engine))
        return ""

    def _awake(self, engine: _Engine, now: float) -> None:
        if not engine.is_draining:
            engine.wake_count += 1
            self._changed(engine, now, state=ReplicaState.READY, wake_count=engine.wake_count)

    def _changed(self, engine: _Engine, now: float, **changes: Any) -> None:
        """Tells the core of a replica."""
        engine.replica = replace(engine.replica, **changes)
        worker = engine.replica.worker_id
        self._do(self._core.replica_event(worker, self._next(worker), engine.replica, now), now)

    def _stop_if_idle(self, engine: _Engine, now: float) -> None:
        if engine.is_draining and not engine.running_count and not engine.queue:
            self._clock.at(now + self._hardware.stop_seconds, lambda at: self._gone(engine, at))

    def _gone(self, engine: _Engine, now: float) -> None:
        if self._engines.pop(engine.replica.replica_id, None) is not None:
            gone = replace(engine.replica, state=ReplicaState.STOPPED)
            self._do(self._core.replica_event(gone.worker_id, self._next(gone.worker_id), gone, now), now)

    def _next(self, worker: str) -> int:
        self._sequences[worker] += 1
        return self._sequences[worker]

    def _note(self, now: float, what: str, model: str, worker: str) -> None:
        self.decisions.append(Decision(round(now, 6), what, model, worker))
