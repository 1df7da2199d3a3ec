"""A replica's session with its supervisor: hello, phases, ready, load; drain and stop back.

The replica outlives the supervisor: it dials again for ever, with a hello that holds all a new supervisor must know,
and ends by itself only when nobody has answered for the orphan time. What could not be sent is sent after the next
hello.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC
from pathlib import Path
from typing import Final

import structlog

from helios.api.engine.v1 import engine_settings_pb2
from helios.api.fleet.v1 import types_pb2 as fleet
from helios.api.worker.v1 import supervisor_service_pb2 as pb
from helios.api.worker.v1 import supervisor_service_pb2_grpc
from helios.mesh.channel import Dialer
from helios.mesh.durations import seconds_from_proto, seconds_to_proto
from helios.mesh.errors import Unavailable
from helios.mesh.identity import IdentityFiles
from helios.mesh.tasks import keep_running
from helios.worker.replica.adapter_wire import files_from_proto, status_to_proto
from helios.worker.replica.adapters import Adapters
from helios.worker.replica.condition import Condition, State
from helios.worker.replica.engine import EngineLoad
from helios.worker.replica.ledger import Changes, RequestLedger
from helios.worker.replica.loss_wire import losses_to_proto
from helios.worker.replica.settings import Compilation
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

_FORMS: Final = {
    Compilation.DEFAULT: engine_settings_pb2.COMPILATION_MODE_UNSPECIFIED,
    Compilation.EAGER: engine_settings_pb2.COMPILATION_MODE_EAGER,
    Compilation.COMPILED: engine_settings_pb2.COMPILATION_MODE_COMPILED,
}
_STATES: Final = {
    State.LOADING: fleet.REPLICA_STATE_LOADING,
    State.WARMING: fleet.REPLICA_STATE_WARMING,
    State.READY: fleet.REPLICA_STATE_READY,
    State.DRAINING: fleet.REPLICA_STATE_DRAINING,
    State.FAILED: fleet.REPLICA_STATE_FAILED,
    State.ASLEEP: fleet.REPLICA_STATE_ASLEEP,
    State.WAKING: fleet.REPLICA_STATE_WAKING,
}
# A supervisor on the same node comes back within a second or two; dialling is cheap.
_REDIAL_BASE_SECONDS: Final = 0.05
_REDIAL_CAP_SECONDS: Final = 1.0
# A peer on the same node that is gone is noticed well within this; reports have no acks of their own.
_UNSURE_SECONDS: Final = 2.0
# Every request that starts or ends carries the load with it. In between it moves with each token, and a message costs
# as much as several tokens.
_LOAD_SECONDS: Final = 1.0
_SHORTEST_REPORT_SECONDS: Final = 0.01
_SUPERVISOR: Final = "worker"


class Attachment:
    """The session. ``run`` is its whole life; the callbacks are called from it. ``on_sleep`` gets a level, None: wake.

    Attributes:
        lost_at: Monotonic time since when there is no session, None while there is one.
        orphan_seconds: How long to live on without one.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        condition: Condition,
        ledger: RequestLedger,
        *,
        engine_load: Callable[[], EngineLoad],
        on_drain: Callable[[float], None],
        on_stop: Callable[[], None],
        on_sleep: Callable[[int | None], None],
        adapters: Adapters,
    ) -> None:
        self._spec = spec
        self._condition = condition
        self._ledger = ledger
        self._engine_load = engine_load
        self._on_drain = on_drain
        self._on_stop = on_stop
        self._on_sleep = on_sleep
        self._adapters = adapters
        self._changed = asyncio.Event()
        self._session_number = 0
        self._report_seconds = _SHORTEST_REPORT_SECONDS
        self._sent: deque[tuple[float, Changes]] = deque()
        self.lost_at: float | None = time.monotonic()
        self.orphan_seconds = spec.orphan_seconds

    def wake(self) -> None:
        """Says that there is something to report at once."""
        self._changed.set()

    async def run(self) -> None:
        """Keeps a session until cancelled."""
        files = IdentityFiles(Path(self._spec.identity_directory)) if self._spec.identity_directory else None
        async with Dialer(self._spec.supervisor_address, identity=files, peer=_SUPERVISOR) as dialer:
            await keep_running(
                "attach to supervisor",
                lambda: self._session(dialer),
                base_seconds=_REDIAL_BASE_SECONDS,
                cap_seconds=_REDIAL_CAP_SECONDS,
            )

    async def _session(self, dialer: Dialer) -> None:
        stub = dialer.stub(supervisor_service_pb2_grpc.SupervisorServiceStub)
        welcomed = asyncio.Event()
        self._session_number += 1
        # An iterator of requests rather than stream.write: on a channel with interceptors, grpcio's write leaves a task
        # behind when the server ends the stream.
        stream = stub.Attach(self._speak(welcomed, self._session_number))
        try:
            async for response in stream:
                self._listen(response)
                welcomed.set()
            raise Unavailable("the supervisor ended the session")
        finally:
            stream.cancel()
            # grpcio closes the iterator some time later; until then it must take nothing that the next session is to
            # tell.
            self._session_number += 1
            if self.lost_at is None:
                self.lost_at = time.monotonic()
            # It may have arrived: the supervisor counts by request id, so twice is harmless and lost is not.
            while self._sent:
                self._ledger.give_back(self._sent.pop()[1])

    def _listen(self, response: pb.AttachResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                welcome = response.welcome
                self._report_seconds = max(_SHORTEST_REPORT_SECONDS, seconds_from_proto(welcome.report_interval))
                if welcome.HasField("orphan_timeout"):
                    self.orphan_seconds = seconds_from_proto(welcome.orphan_timeout)
                self.lost_at = None
                log.info("attached to supervisor")
            case "drain":
                self._on_drain(seconds_from_proto(response.drain.timeout))
            case "stop":
                self._on_stop()
            case "sleep":
                self._on_sleep(response.sleep.level)
            case "wake":
                self._on_sleep(None)
            case "adapters":
                self._adapters.want([files_from_proto(files) for files in response.adapters.adapters])

    async def _speak(self, welcomed: asyncio.Event, number: int) -> AsyncIterator[pb.AttachRequest]:
        """Yields hello, and after the welcome what changed, at most once in a report interval while ready."""
        condition = self._condition
        phase_count, state, ready_count = len(condition.phases), condition.state, condition.ready_count
        statuses, told = self._adapters.statuses, None
        yield pb.AttachRequest(hello=self._hello())
        await welcomed.wait()
        while number == self._session_number:
            # Others may end while these are told.
            ended = condition.phases[phase_count:]
            for phase in ended:
                yield pb.AttachRequest(progress=self._progress(phase))
            phase_count += len(ended)
            if statuses != self._adapters.statuses:
                # Before READY, which is then told with the adapters that it has.
                statuses = self._adapters.statuses
                yield pb.AttachRequest(adapters=pb.ReplicaAdapters(adapters=map(status_to_proto, statuses)))
            if condition.state is not state or condition.ready_count != ready_count:
                state, ready_count = condition.state, condition.ready_count
                yield self._announce(state)
                if state is State.FAILED:
                    condition.failure_told.set()
            delta = self._load_delta(self._take())
            told = self._tell_losses(delta, told)
            yield pb.AttachRequest(load=delta)
            if state is State.READY:
                await asyncio.sleep(self._report_seconds)
            await self._wait_changed(number)

    def _tell_losses(self, delta: fleet.LoadDelta, told: int | None) -> int | None:
        """Adds what the KV cache lost since number ``told``, and returns the last number; None: nothing was told yet.

        Losses wait for a report: what they are worth is not worth a message of their own.
        """
        losses = self._ledger.losses
        if not losses.is_told:
            return None
        news = losses.since(told or 0)
        if news.sequence != told:
            delta.kv_cache.CopyFrom(losses_to_proto(news))
        return news.sequence

    async def _wait_changed(self, number: int) -> None:
        """Waits for something worth a message at once; the load is told once in a while, whether it moved or not.

        The supervisor takes a ready replica that is silent for one that hangs.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOAD_SECONDS):
                await self._changed.wait()
        # A session that is over leaves the mark for the next one.
        if number == self._session_number:
            self._changed.clear()

    def _take(self) -> Changes:
        """Takes what changed, and remembers it for as long as nobody can know whether it arrived."""
        changes, now = self._ledger.take(), time.monotonic()
        while self._sent and now - self._sent[0][0] > _UNSURE_SECONDS:
            self._sent.popleft()
        if changes.started or changes.finished:
            self._sent.append((now, changes))
        return changes

    def _announce(self, state: State) -> pb.AttachRequest:
        match state:
            case State.READY:
                return pb.AttachRequest(ready=self._ready())
            case State.FAILED:
                return pb.AttachRequest(failed=self._failure())
            case State.ASLEEP:
                return pb.AttachRequest(asleep=pb.ReplicaAsleep(left_bytes=self._condition.left_bytes))
            case _:
                return pb.AttachRequest(progress=pb.ReplicaProgress(state=_STATES[state]))

    def _failure(self) -> fleet.ReplicaFailure:
        return fleet.ReplicaFailure(reason=self._condition.failure_reason, message=self._condition.failure_message)

    def _hello(self) -> pb.ReplicaHello:
        spec, condition = self._spec, self._condition
        replica = fleet.Replica(
            replica_id=spec.replica_id,
            model=spec.model,
            revision=spec.revision,
            state=_STATES[condition.state],
            address=condition.address,
            engine=spec.engine,
            pid=condition.pid,
            phases=[_phase_to_proto(name, seconds) for name, seconds in condition.phases],
            memory_bytes=spec.memory_bytes,
            max_context_tokens=condition.max_context_tokens,
            load=self._load(),
            device_ids=spec.device_ids,
            memory_items=self._memory_items(),
            host_memory_items=_items_to_proto(spec.host_memory_items),
            can_sleep=condition.can_sleep,
            wake_count=condition.wake_count,
            adapters=map(status_to_proto, self._adapters.statuses),
            compilation=_FORMS[spec.settings.compilation],
            in_background=spec.is_background,
        )
        replica.created_at.FromDatetime(spec.created_at.astimezone(UTC))
        if condition.state is State.FAILED:
            replica.failure.CopyFrom(self._failure())
        return pb.ReplicaHello(replica=replica, start_ticks=condition.start_ticks, lease_id=spec.lease_id)

    def _progress(self, phase: tuple[str, float]) -> pb.ReplicaProgress:
        return pb.ReplicaProgress(state=_STATES[self._condition.state], phase=_phase_to_proto(*phase))

    def _ready(self) -> pb.ReplicaReady:
        condition = self._condition
        return pb.ReplicaReady(
            address=condition.address,
            max_context_tokens=condition.max_context_tokens,
            can_sleep=condition.can_sleep,
        )

    def _memory_items(self) -> list[fleet.MemoryItem]:
        items = _items_to_proto(self._spec.memory_items)
        if self._condition.state is State.ASLEEP:
            items.append(fleet.MemoryItem(kind=fleet.MEMORY_KIND_SLEEPING, size_bytes=self._condition.left_bytes))
        return items

    def _load(self) -> fleet.ReplicaLoad:
        load = self._engine_load()
        return fleet.ReplicaLoad(
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            kv_usage_ratio=load.kv_usage_ratio,
            generated_tokens=self._ledger.generated_tokens,
        )

    def _load_delta(self, changes: Changes) -> fleet.LoadDelta:
        delta = fleet.LoadDelta(replica_id=self._spec.replica_id, load=self._load())
        wall_offset_ns = time.time_ns() - time.monotonic_ns()
        for started in changes.started:
            arrival = delta.started.add(request_id=started.request_id)
            arrival.arrived_at.FromNanoseconds(round(started.arrived_at * 1e9) + wall_offset_ns)
        for finished in changes.finished:
            message = delta.finished.add(
                request_id=finished.request_id,
                status_code=finished.status_code,
                prompt_tokens=finished.prompt_tokens,
                completion_tokens=finished.completion_tokens,
            )
            message.duration.FromNanoseconds(round(finished.duration * 1e9))
            if finished.time_to_first_token is not None:
                message.time_to_first_token.FromNanoseconds(round(finished.time_to_first_token * 1e9))
        return delta


def _items_to_proto(items: Mapping[str, int]) -> list[fleet.MemoryItem]:
    return [
        fleet.MemoryItem(kind=fleet.MemoryKind.Value(f"MEMORY_KIND_{kind}"), size_bytes=size)
        for kind, size in items.items()
    ]


def _phase_to_proto(name: str, seconds: float) -> fleet.PhaseTiming:
    return fleet.PhaseTiming(phase=name, duration=seconds_to_proto(seconds))
