"""What the proxy's tests share: fast policies, models, hellos, and an outside that acknowledges at once."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

from helios.proxy.activation.machine import ActivationPolicy
from helios.proxy.breaker import BreakerPolicy
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core, CorePolicy
from helios.proxy.fleet.state import Device, DeviceKind, Replica, ReplicaState, WorkerHello
from helios.proxy.holds import HoldLimits
from helios.proxy.lifecycle import LifecyclePolicy
from helios.proxy.sizing import SizingPolicy
from helios.proxy.traffic import RoutingPolicy

MIB = 1 << 20
GIB = 1 << 30


def policy(
    *,
    holds: HoldLimits | None = None,
    idle_seconds: float = 900.0,
    residency_seconds: float = 0.0,
    worker_grace_seconds: float = 30.0,
    resync_seconds: float = 5.0,
    wait_seconds: float = 30.0,
    reservation_seconds: float = 15.0,
) -> CorePolicy:
    """A policy with replicas of one GiB plus KV cache."""
    return CorePolicy(
        holds=holds or HoldLimits(),
        breaker=BreakerPolicy(),
        lifecycle=LifecyclePolicy(
            activation=ActivationPolicy(wait_seconds=wait_seconds),
            sizing=SizingPolicy(
                overhead_bytes=768 * MIB, context_count=1, min_kv_cache_bytes=256 * MIB, max_kv_cache_bytes=GIB
            ),
            engine="",
            idle_seconds=idle_seconds,
            residency_seconds=residency_seconds,
            drain_seconds=30.0,
            start_base_seconds=5.0,
            start_bytes_per_second=1e9,
        ),
        reservation_seconds=reservation_seconds,
        silence_seconds=3.0,
        worker_grace_seconds=worker_grace_seconds,
        resync_seconds=resync_seconds,
        routing=RoutingPolicy(),
    )


def counter() -> Callable[[], str]:
    """Ids that a test can foresee: id-1, id-2, …"""
    numbers = itertools.count(1)
    return lambda: f"id-{next(numbers)}"


def core(settings: CorePolicy | None = None, *, known_workers: Iterable[str] = (), now: float = 0.0) -> Core:
    """A core."""
    return Core(settings or policy(), new_id=counter(), known_workers=known_workers, now=now)


def entry(
    name: str = "m",
    *,
    revision: str = "sha256:1",
    aliases: tuple[str, ...] = (),
    min_replicas: int = 0,
    engine_settings: str = "",
) -> ModelEntry:
    """A model that books one GiB."""
    return ModelEntry(
        name=name,
        revision=revision,
        aliases=aliases,
        min_replicas=min_replicas,
        max_context_tokens=2048,
        engine_settings=engine_settings,
    )


def hello(
    worker_id: str = "w", *, replicas: tuple[Replica, ...] = (), memory_bytes: int = 8 * GIB, incarnation: str = "1"
) -> WorkerHello:
    """A worker with one CPU device."""
    booked = sum(replica.memory_bytes for replica in replicas)
    device = Device("cpu:0", DeviceKind.CPU, memory_bytes, booked)
    return WorkerHello(worker_id, incarnation, "node", (device,), ("vllm",), 8, replicas)


def replica(
    replica_id: str = "r",
    *,
    model: str = "m",
    revision: str = "sha256:1",
    state: ReplicaState = ReplicaState.READY,
    worker_id: str = "w",
    address: str = "127.0.0.1:1000",
) -> Replica:
    """A replica of one GiB."""
    return Replica(replica_id, model, revision, state, worker_id, address, "vllm", memory_bytes=GIB)


def ready(asked: Replica, address: str = "127.0.0.1:1000") -> Replica:
    """The same replica, ready."""
    return replace(asked, state=ReplicaState.READY, address=address)
