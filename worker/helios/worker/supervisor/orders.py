"""What a worker goes by, and how a start becomes an order or is refused. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from helios.mesh.errors import InvalidRequest, PreconditionFailed
from helios.worker.replica.engines import split_engine
from helios.worker.supervisor.commands import Start
from helios.worker.supervisor.life_stages import Limits
from helios.worker.supervisor.records import Device, DeviceKind, Order, ReplicaState, ReplicaView

_REVISION: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Rules:
    """Who the worker is and what it goes by; times in seconds.

    Attributes:
        engines: Names of the engines that can run here.
        default_engine: Where a command names none, such as "vllm" or "custom:shouting:Shouting"; empty: the first one.
        replica_memory_bytes: Booked where a command names no memory.
        kv_cache_bytes: Given where a command names no KV cache.
        drain_seconds: Where a drain names no timeout, and at the end of the worker.
        return_seconds: How long a listed replica may take to say hello to a restarted supervisor.
        lease_ttl_seconds: How long weights stay leased when this process dies.
        sleep_left_bytes: Booked on each device of a replica that sleeps, where it can't measure what it leaves behind.
        sleep_cycle_limit: How often a replica may wake; then it is replaced instead.
        packed_weights_directory: Where weights are that starts map; empty: they load.
        zone: Of the node; empty: not known.
    """

    worker_id: str
    incarnation: str
    node: str
    version: str
    engines: tuple[str, ...]
    replica_memory_bytes: int
    kv_cache_bytes: int
    drain_seconds: float
    return_seconds: float
    lease_ttl_seconds: float
    limits: Limits
    sleep_left_bytes: int = 1 << 30
    sleep_cycle_limit: int = 20
    default_engine: str = ""
    packed_weights_directory: str = ""
    zone: str = ""


def order_of(start: Start, rules: Rules, now: datetime) -> Order:
    """Returns what a start asks for, with the worker's defaults filled in.

    Raises:
        InvalidRequest: START_INCOMPLETE, UNKNOWN_ENGINE, BAD_REVISION.
    """
    engine, options = split_engine(start.engine or rules.default_engine or rules.engines[0])
    if not start.replica_id or not start.model:
        raise InvalidRequest("a start needs a replica id and a model", reason="START_INCOMPLETE")
    if engine not in rules.engines:
        known = ", ".join(rules.engines)
        raise InvalidRequest(f"engine {engine!r} is not to be had here; there are: {known}", reason="UNKNOWN_ENGINE")
    if not _REVISION.fullmatch(start.revision):
        raise InvalidRequest(
            f"revision {start.revision!r} is not of the form sha256:<64 hexadecimal digits>", reason="BAD_REVISION"
        )
    return Order(
        replica_id=start.replica_id,
        model=start.model,
        revision=start.revision,
        engine=engine,
        memory_bytes=start.memory_bytes or rules.replica_memory_bytes,
        kv_cache_bytes=start.kv_cache_bytes or rules.kv_cache_bytes,
        max_context_tokens=start.max_context_tokens,
        created_at=now,
        options={**options, **start.options},
        settings=start.settings,
        served_names=start.served_names,
        memory_items=start.memory_items,
        host_memory_items=start.host_memory_items,
        device_ids=start.device_ids,
        device_count=len(start.device_ids) or max(1, start.device_count),
        requested_at=start.requested_at,
        traceparent=start.traceparent,
        is_background=start.is_background,
    )


def check_sleep(view: ReplicaView, devices: Sequence[Device | None], rules: Rules) -> None:
    """Checks that a replica may go to sleep.

    Raises:
        PreconditionFailed: SLEEP_UNSUPPORTED, REPLICA_NOT_READY, REPLICA_BUSY, SLEEP_CYCLES_USED_UP.
    """
    if view.state is not ReplicaState.READY:
        message = f"replica {view.replica_id} is {view.state.value.lower()}; only a ready one can be put to sleep"
        raise PreconditionFailed(message, reason="REPLICA_NOT_READY")
    if not view.can_sleep:
        is_cpu = any(device is not None and device.kind is DeviceKind.CPU for device in devices)
        why = "it runs on a CPU, which has no device memory to leave" if is_cpu else f"engine {view.order.engine} can't"
        message = (
            f"replica {view.replica_id} can't sleep: {why}; stage the model instead (weights in memory, no process)"
        )
        raise PreconditionFailed(message, reason="SLEEP_UNSUPPORTED")
    if view.load.running_requests or view.load.waiting_requests:
        raise PreconditionFailed(f"replica {view.replica_id} has requests", reason="REPLICA_BUSY")
    if view.wake_count >= rules.sleep_cycle_limit:
        message = f"replica {view.replica_id} woke {view.wake_count} times; it is to be replaced by a new one"
        raise PreconditionFailed(message, reason="SLEEP_CYCLES_USED_UP")
