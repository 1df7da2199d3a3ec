"""The composition root of a replica: engine, server, session with the supervisor, and how all of it ends.

Order of the end: refuse new calls → let running ones end, with a deadline → close the server → end the engine.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from helios.api.inference.v1 import (
    continuation_service_pb2_grpc,
    inference_service_pb2_grpc,
    openai_service_pb2_grpc,
    prefill_service_pb2_grpc,
)
from helios.mesh.identity import IdentityFiles
from helios.mesh.ops import OpsServer
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.telemetry import setup_telemetry
from helios.worker.artifacts.asking import tell_proven
from helios.worker.artifacts.requests import COMPILE_CACHE, PACKED_WEIGHTS
from helios.worker.replica import metrics, tracing
from helios.worker.replica.adapters import Adapters
from helios.worker.replica.artifact_directory import mark_proven
from helios.worker.replica.attachment import Attachment
from helios.worker.replica.condition import Condition, State
from helios.worker.replica.continuation_servicer import ContinuationServicer
from helios.worker.replica.engine import Engine, EngineLoad
from helios.worker.replica.gate import CallGate
from helios.worker.replica.inference_servicer import InferenceServicer
from helios.worker.replica.kv_disk import keep_within
from helios.worker.replica.ledger import RequestLedger
from helios.worker.replica.openai_servicer import OpenAIServicer
from helios.worker.replica.packed_weights import end_trials, is_unfit
from helios.worker.replica.prefill import PrefillClient, PrefillServicer
from helios.worker.replica.priority import step_forward
from helios.worker.replica.scratch import kv_directory
from helios.worker.replica.settings import Role
from helios.worker.replica.sleeping import Sleeping
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.replica.start import EngineStart

log = structlog.get_logger()

OPENAI_SERVICE: Final = "helios.api.inference.v1.OpenAIService"
INFERENCE_SERVICE: Final = "helios.api.inference.v1.InferenceService"
PREFILL_SERVICE: Final = "helios.api.inference.v1.PrefillService"
CONTINUATION_SERVICE: Final = "helios.api.inference.v1.ContinuationService"
# The edge brings users' calls, the proxy probes.
_CALLERS: Final = frozenset({"edge", "proxy"})
_REPLICAS: Final = frozenset({"worker"})
_RELAYS: Final = frozenset({"relay"})
_HEALTH_CHECK_SECONDS: Final = 0.5
# Time for the supervisor to hear why, before the process is gone.
_LAST_WORDS_SECONDS: Final = 5.0
_FLUSH_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Ending:
    """Why and how the replica ends. ``drain_seconds`` None ends at once."""

    reason: str
    drain_seconds: float | None
    is_clean: bool = True


async def serve(spec: ReplicaSpec, start: EngineStart, *, requested_at: float, forked_at: float) -> bool:
    """Serves until told to end; returns whether that was a clean end."""
    return await _Replica(spec, start, requested_at=requested_at, forked_at=forked_at).run()


class _Replica:
    def __init__(self, spec: ReplicaSpec, start: EngineStart, *, requested_at: float, forked_at: float) -> None:
        self._spec = spec
        self._start = start
        self._engine: Engine | None = None
        self._engine_moved_at = 0.0
        self._sleeping: Sleeping | None = None
        self._condition = Condition(os.getpid(), _own_start_ticks(), requested_at)
        self._condition.add_phase("fork", requested_at, forked_at)
        self._ledger = RequestLedger()
        self._adapters = Adapters(spec, on_change=self._note_adapters)
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._attachment = Attachment(
            spec,
            self._condition,
            self._ledger,
            engine_load=lambda: self._engine.load() if self._engine else EngineLoad(),
            on_drain=lambda seconds: self._end(Ending("told to drain", seconds)),
            on_stop=lambda: self._end(Ending("told to stop", None)),
            on_sleep=self._order_sleep,
            adapters=self._adapters,
        )

    async def run(self) -> bool:
        """The whole life; cancel-safe, but nobody cancels it."""
        loop = asyncio.get_running_loop()
        stop_telemetry = setup_telemetry(process="replica", otlp_endpoint=self._spec.otlp_endpoint)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._end, Ending(signum.name, self._spec.drain_seconds))
        loop.add_reader(self._start.phase_descriptor, self._take_phases)
        loop.add_reader(self._start.losses, self._start.losses.read, self._ledger.losses)
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self._watch(), name="watch engine and supervisor")]
            offload = self._spec.settings.kv_offload
            if offload is not None and offload.disk_bytes:
                keeping = keep_within(kv_directory(), offload.disk_bytes)
                background.append(group.create_task(keeping, name="keep KV blocks within their bound"))
            if self._spec.supervisor_address:
                background.append(group.create_task(self._attachment.run(), name="attachment"))
            ending = await self._live()
            log.info("replica ends", reason=ending.reason, is_clean=ending.is_clean)
            if not ending.is_clean and self._spec.supervisor_address:
                await self._say_last_words()
            for task in background:
                task.cancel()
        if self._engine is not None:
            self._engine.close()
        stop_telemetry()
        return ending.is_clean

    async def _live(self) -> Ending:
        engine = await self._wait_engine()
        if engine is None:
            ending = self._ending.result()
            if ending.is_clean and self._spec.packed_weights_directory:
                end_trials(Path(self._spec.packed_weights_directory), self._spec.replica_id)
            return ending
        self._engine = engine
        async with contextlib.AsyncExitStack() as stack:
            prefills = PrefillClient(stack, identity=_identity(self._spec), revision=self._spec.revision)
            return await self._serve(engine, prefills)

    async def _serve(self, engine: Engine, prefills: PrefillClient) -> Ending:
        gate = CallGate(
            names=self._spec.names,
            role=self._spec.settings.role,
            prefill=prefills.prefill if self._spec.settings.role is Role.DECODE else None,
            revision=self._spec.revision,
            ledger=self._ledger,
            on_change=self._attachment.wake,
        )
        await self._adapters.open(engine, gate)
        self._note_engine_moved()
        self._start.on_load = self._note_engine_moved
        async with self._server(engine, gate) as server, self._ops() as ops_address:
            self._become_ready(server.address, ops_address, engine)
            self._sleeping = Sleeping(engine, gate, self._condition, on_change=self._attachment.wake, fail=self._fail)
            ending = await self._run_until_end(self._sleeping)
            if ending.is_clean:
                # Also without a request: compiled code ran when the engine was sized.
                for artifact in self._start.artifacts:
                    self._mark_proven(artifact.kind, artifact.key)
            if ending.drain_seconds is not None and ending.is_clean:
                self._condition.state = State.DRAINING
                self._attachment.wake()
                await server.set_serving(is_serving=False)
                is_idle = await gate.drain(ending.drain_seconds)
                log.info("replica drained", is_idle=is_idle, running_count=self._ledger.running_count)
            return ending

    async def _run_until_end(self, sleeping: Sleeping) -> Ending:
        async with asyncio.TaskGroup() as group:
            orders = (
                group.create_task(sleeping.run(), name="sleep and wake"),
                group.create_task(self._adapters.run(), name="adapters"),
                group.create_task(self._prove_artifacts(), name="prove artifacts"),
            )
            ending = await self._ending
            for task in orders:
                task.cancel()
        return ending

    async def _prove_artifacts(self) -> None:
        """Tells what the start used or made that others can use, once a request was answered with it."""
        if self._start.artifacts:
            await tell_proven(
                self._spec.artifact_door,
                self._start.artifacts,
                has_answered=lambda: self._ledger.has_answered,
                prove=self._mark_proven,
            )

    def _mark_proven(self, kind: str, key: str) -> bool:
        directory = self._artifact(kind, key)
        # The engine did not use it.
        if kind == PACKED_WEIGHTS and is_unfit(directory):
            return False
        try:
            mark_proven(directory)
        except OSError:
            return False
        return True

    def _artifact(self, kind: str, key: str) -> Path:
        roots = {
            COMPILE_CACHE: self._spec.compile_cache_directory,
            PACKED_WEIGHTS: self._spec.packed_weights_directory,
        }
        return Path(roots[kind], key)

    def _note_adapters(self) -> None:
        self._attachment.wake()

    def _order_sleep(self, level: int | None) -> None:
        if self._sleeping is None:
            return
        if level is None:
            self._sleeping.order_wake()
        else:
            self._sleeping.order_sleep(level)

    def _server(self, engine: Engine, gate: CallGate) -> MeshServer:
        spec = self._spec
        server = MeshServer(
            listen=f"{spec.host}:{spec.port}",
            identity=_identity(spec),
            policy={
                OPENAI_SERVICE: _CALLERS,
                INFERENCE_SERVICE: _CALLERS,
                PREFILL_SERVICE: _REPLICAS,
                CONTINUATION_SERVICE: _RELAYS,
            },
            # The gate has drained by then; what still runs is over its time.
            options=ServerOptions(drain_seconds=0.0, transport="http2"),
        )
        openai = OpenAIServicer(engine, gate)
        inference = InferenceServicer(engine, gate, model=spec.model, revision=spec.revision)
        openai_service_pb2_grpc.add_OpenAIServiceServicer_to_server(openai, server.grpc)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server.grpc)
        continuation_service_pb2_grpc.add_ContinuationServiceServicer_to_server(
            ContinuationServicer(openai, inference), server.grpc
        )
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(
            PrefillServicer(engine, gate, role=spec.settings.role, revision=spec.revision, directory=spec.kv_directory),
            server.grpc,
        )
        server.serve(OPENAI_SERVICE, INFERENCE_SERVICE, PREFILL_SERVICE, CONTINUATION_SERVICE)
        return server

    async def _wait_engine(self) -> Engine | None:
        """Returns the engine, or None when the replica ends before there is one."""
        made = asyncio.wrap_future(self._start.engine)
        await asyncio.wait((made, self._ending), return_when=asyncio.FIRST_COMPLETED)
        self._take_phases()
        asyncio.get_running_loop().remove_reader(self._start.phase_descriptor)
        if self._ending.done():
            made.cancel()
            return None
        error = made.exception()
        if error is not None:
            log.error("engine failed to start", exc_info=error)
            self._fail(*self._start.why(error))
            return None
        return made.result()

    @contextlib.asynccontextmanager
    async def _ops(self) -> AsyncIterator[str]:
        if not self._spec.ops_listen:
            yield ""
            return
        is_ready = lambda: self._condition.state is State.READY  # noqa: E731
        async with OpsServer(self._spec.ops_listen, is_ready=is_ready, registry=metrics.REGISTRY) as server:
            yield server.address

    def _become_ready(self, address: str, ops_address: str, engine: Engine) -> None:
        condition = self._condition
        condition.address, condition.max_context_tokens = address, engine.facts.max_context_tokens
        condition.can_sleep = engine.facts.can_sleep
        if self._spec.is_background:
            step_forward()
        now = time.monotonic()
        condition.add_phase("serve", self._start.ended_at, now)
        condition.end_phases(now)
        condition.state = State.READY
        self._attachment.wake()
        tracing.record_start(self._spec, condition)
        log.info(
            "replica ready",
            address=address,
            ops_address=ops_address,
            phases={name: round(seconds, 4) for name, seconds in condition.phases},
            start_seconds=round(time.monotonic() - condition.requested_at, 4),
            max_context_tokens=engine.facts.max_context_tokens,
            kv_cache_tokens=engine.facts.kv_cache_tokens,
        )

    def _take_phases(self) -> None:
        for name, began_at, ended_at in self._start.read_phases():
            self._condition.add_phase(name, began_at, ended_at)
            if name == "load":
                self._condition.state = State.WARMING
        self._attachment.wake()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_CHECK_SECONDS)
            if self._engine is not None:
                self._check_engine(self._engine.load())
            lost_at = self._attachment.lost_at
            if not self._spec.supervisor_address or lost_at is None:
                continue
            if time.monotonic() - lost_at > self._attachment.orphan_seconds:
                self._end(Ending("orphaned: the supervisor is gone", self._spec.drain_seconds))

    def _note_engine_moved(self) -> None:
        self._engine_moved_at = time.monotonic()

    def _check_engine(self, load: EngineLoad) -> None:
        limit = self._spec.stall_seconds
        if load.is_dead:
            self._fail("ENGINE_DIED", "a process of the engine died")
        elif (load.running_requests or load.waiting_requests) and time.monotonic() - self._engine_moved_at > limit:
            self._fail("ENGINE_STALLED", f"the engine has requests and did nothing for {limit:g} s")

    def _fail(self, reason: str, message: str) -> None:
        if not self._ending.done():
            self._condition.fail(reason, message)
            self._attachment.wake()
        self._end(Ending(message, None, is_clean=False))

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _say_last_words(self) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self._condition.failure_told.wait()
                # gRPC says when it has taken a message, not when it has sent it; the process ends right after this.
                await asyncio.sleep(_FLUSH_SECONDS)
        except TimeoutError:
            log.warning("supervisor did not hear of the failure")


def _identity(spec: ReplicaSpec) -> IdentityFiles | None:
    return IdentityFiles(Path(spec.identity_directory)) if spec.identity_directory else None


def _own_start_ticks() -> int:
    # Source: proc_pid_stat(5), field 22; the second field may hold spaces.
    return int(Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
