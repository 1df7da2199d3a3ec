"""How long one routing decision takes: resolve, pick, reserve, note it, as the picker does it for each request.

A fleet of 1,000 replicas on 100 workers and 10,000 models; the model that is asked for has 10 replicas, then 100, then
all 1,000. Between picks a load report changes one of the replicas, as workers' reports do; it is not timed. The value
is the median; the 99th percentile is reported beside it.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.fleet.state import Device, DeviceKind, Load, Replica, ReplicaState, WorkerHello
from helios.proxy.settings import ProxySettings
from helios.proxy.traffic import LoadDelta

REPLICA_COUNT = 1_000
WORKER_COUNT = 100
MODEL_COUNT = 10_000
SAMPLES = 4_000
GIB = 1 << 30


def run() -> list[dict[str, Any]]:
    """Measures the three cases."""
    results: list[dict[str, Any]] = []
    for count in (10, 100, 1_000):
        core, model = fleet(count)
        spent = sorted(measure(core, model))
        median, slow = statistics.median(spent), spent[int(len(spent) * 0.99)]
        name = f"proxy.pick_{count}_replicas"
        common = {"unit": "us", "baseline": None, "samples": len(spent)}
        results.append({"name": name, "value": median, **common})
        results.append({"name": f"{name}_p99", "value": slow, **common})
    return results


def fleet(replicas_of_model: int) -> tuple[Core, str]:
    """A core with the fleet believed and published; returns it with the name of the model that is asked for."""
    numbers = itertools.count()
    policy = ProxySettings().core_policy()
    core = Core(policy, new_id=lambda: f"id-{next(numbers)}", known_workers=(), now=0.0)
    # Without a policy the surplus over one replica would be drained.
    counts = [replicas_of_model] + [0] * (MODEL_COUNT - 1)
    entries = [
        ModelEntry(name=f"model-{number}", revision=f"sha256:{number}", min_replicas=count)
        for number, count in enumerate(counts)
    ]
    core.models_replaced(entries, 0.0, is_synced=True)
    models = [f"model-{0 if index < replicas_of_model else index}" for index in range(REPLICA_COUNT)]
    per_worker = REPLICA_COUNT // WORKER_COUNT
    device = Device("cpu:0", DeviceKind.CPU, 64 * GIB, 0)
    for number in range(WORKER_COUNT):
        worker_id = f"worker-{number}"
        held = range(number * per_worker, (number + 1) * per_worker)
        replicas = tuple(_replica(index, models[index], worker_id) for index in held)
        core.worker_hello(WorkerHello(worker_id, "1", "node", (device,), ("vllm",), 16, replicas), 0.0)
    core.endpoints_acknowledged(core.fleet.endpoints(), 0.0)
    assert len(core.traffic.table.snapshot("model-0", "sha256:0")) == replicas_of_model
    return core, "model-0"


def measure(core: Core, model: str) -> list[float]:
    """Times picks, each after a change; in microseconds."""
    replicas = core.fleet.replicas_of(model)
    limits = JournalLimits()
    journal = Journal(limits)
    for number in range(limits.request_count):
        # A journal that is full, as it is from the first minutes on: each pick drops the oldest.
        _pick(core, journal, model, f"old {number}")
        core.load_report([LoadDelta(replicas[0].replica_id, Load(), started=(f"old {number}",))], 1.0)
        core.load_report([LoadDelta(replicas[0].replica_id, Load(), finished=((f"old {number}", 0),))], 1.0)
    spent: list[float] = []
    for number in range(SAMPLES):
        replica = replicas[number % len(replicas)]
        load = Load(running_count=number % 7, waiting_count=number % 3, kv_usage_ratio=(number % 10) / 10)
        # Every request is told of, so that reservations do not pile up.
        delta = LoadDelta(replica.replica_id, load, started=(f"q{number - 1}",), finished=((f"q{number - 1}", 0),))
        core.load_report([delta], 1.0)
        spent.append(_time(lambda: _pick(core, journal, model, f"q{number}")))  # noqa: B023 (called at once)
    return spent


def _pick(core: Core, journal: Journal, model: str, request_id: str) -> None:
    entry = core.resolve(model)
    assert entry is not None
    pick = core.pick(entry, request_id, 1.0)
    assert pick is not None
    journal.picked(request_id, (model, pick, core.traffic.exclusions(entry.name), "", 1.0, 1.0))


def _time(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e6


def _replica(index: int, model: str, worker_id: str) -> Replica:
    revision = f"sha256:{model.removeprefix('model-')}"
    address = f"10.0.{index // 250}.{index % 250 + 1}:8000"
    return Replica(f"replica-{index}", model, revision, ReplicaState.READY, worker_id, address, memory_bytes=GIB)
