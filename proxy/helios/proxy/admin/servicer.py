"""AdminService: what operators order, ask and watch. A dry run is answered by `plans` and changes nothing."""

import bisect
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final, TypeVar

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceServicer
from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.mesh.audit import audit
from helios.mesh.errors import HeliosError, InvalidRequest, NotFound
from helios.proxy.admin.plans import plan_evict, plan_preload, plan_stage, plan_unstage
from helios.proxy.admin.watch import EventWatches
from helios.proxy.breaker import BreakerState
from helios.proxy.catalog.servicer import find_model
from helios.proxy.catalog.session import ModelSource
from helios.proxy.catalogue import ModelEntry, shown
from helios.proxy.explain.wire import explanation_to_proto, failure_to_proto, state_from_proto, summary_to_proto
from helios.proxy.fleet.state import Replica, ReplicaState
from helios.proxy.fleet.wire import device_to_proto, replica_to_proto, staged_to_proto, timestamp
from helios.proxy.registry_away import REGISTRY_AWAY, registry_away
from helios.proxy.runtime import Runtime

ADMIN_SERVICE: Final = "helios.api.admin.v1.AdminService"
MAX_REPLICA_COUNT: Final = 1_000
DEFAULT_PAGE_SIZE: Final = 100
_MAX_PAGE_SIZE: Final = 1_000

_BREAKER_STATES: Final = {
    BreakerState.CLOSED: pb.BREAKER_STATE_CLOSED,
    BreakerState.OPEN: pb.BREAKER_STATE_OPEN,
    BreakerState.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
    BreakerState.PROBING: pb.BREAKER_STATE_HALF_OPEN,
}

T = TypeVar("T")


class AdminServicer(AdminServiceServicer):
    """Carries out what operators ask for."""

    def __init__(self, runtime: Runtime, models: ModelSource) -> None:
        self._runtime = runtime
        self._core = runtime.core
        self._models = models
        self._watches = EventWatches(runtime)

    async def PreloadModel(self, request: pb.PreloadModelRequest, context: Any) -> pb.PreloadModelResponse:
        """Starts a replica unless there is one."""
        entry = await self._find(request.model)
        if request.dry_run:
            plan = plan_preload(self._core, entry, time.monotonic())
            replicas = [replica_to_proto(replica) for replica in self._current(entry)]
            return pb.PreloadModelResponse(replicas=replicas, worker_id=plan.worker_id, placement=plan.placement)
        try:
            self._runtime.apply(self._core.preload(entry, time.monotonic()))
        except HeliosError:
            # What came of it before that: a whole round at once would hold up every pick.
            self._runtime.apply(self._core.expire_holds(time.monotonic()))
            raise
        _note("preload model", model=entry.name)
        return pb.PreloadModelResponse(replicas=[replica_to_proto(replica) for replica in self._current(entry)])

    async def ScaleModel(self, request: pb.ScaleModelRequest, context: Any) -> pb.ScaleModelResponse:
        """Writes the count to the registry and follows it at once."""
        if not request.HasField("replica_count"):
            raise InvalidRequest("replica_count is required; 0 stops the model", metadata={"param": "replica_count"})
        count = request.replica_count
        if count > MAX_REPLICA_COUNT:
            raise InvalidRequest(
                f"replica_count is at most {MAX_REPLICA_COUNT}",
                reason="INVALID_POLICY",
                metadata={"param": "replica_count"},
            )
        entry = await self._find(request.model)
        if not request.dry_run:
            entry = await self._write_count(entry.name, count)
            self._runtime.apply(self._core.model_upserted(entry, time.monotonic()))
            # What an open window promises would be started again at once.
            if not count and not self._core.lifecycle.wants.bounds.now(entry).min_replicas:
                self._runtime.apply(self._core.drain_model(entry, time.monotonic()))
            _note("scale model", model=entry.name, replica_count=count)
        ready = [replica for replica in self._current(entry) if replica.state is ReplicaState.READY]
        return pb.ScaleModelResponse(desired_count=count, ready_count=len(ready))

    async def EvictModel(self, request: pb.EvictModelRequest, context: Any) -> pb.EvictModelResponse:
        """Drains a model and drops its bytes from the nodes."""
        entry = await self._find(request.model)
        if request.dry_run:
            return pb.EvictModelResponse(draining_count=plan_evict(self._core, entry))
        count, todo = self._core.evict(entry, time.monotonic())
        self._runtime.apply(todo)
        _note("evict model", model=entry.name)
        return pb.EvictModelResponse(draining_count=count)

    async def StageModel(self, request: pb.StageModelRequest, context: Any) -> pb.StageModelResponse:
        """Brings a model's weights to memory and drains its replicas."""
        entry = await self._find(request.model)
        if request.dry_run:
            staged, count = plan_stage(self._core, entry)
        else:
            staged, count, todo = self._core.stage(entry, time.monotonic())
            self._runtime.apply(todo)
            _note("stage model", model=entry.name)
        return pb.StageModelResponse(
            worker_id=staged.worker_id, state=staged_to_proto(staged).state, draining_count=count
        )

    async def UnstageModel(self, request: pb.UnstageModelRequest, context: Any) -> pb.UnstageModelResponse:
        """Gives a staged model's memory back."""
        entry = await self._find(request.model)
        if request.dry_run:
            return pb.UnstageModelResponse(worker_count=plan_unstage(self._core, entry))
        count, todo = self._core.unstage(entry, time.monotonic())
        self._runtime.apply(todo)
        _note("unstage model", model=entry.name)
        return pb.UnstageModelResponse(worker_count=count)

    async def SleepReplica(self, request: pb.SleepReplicaRequest, context: Any) -> pb.SleepReplicaResponse:
        """Puts a replica to sleep."""
        replica = self._find_replica(request.replica_id)
        if request.dry_run:
            self._core.lifecycle.check_sleep(replica)
        else:
            self._runtime.apply(self._core.sleep(replica, time.monotonic()))
            _note("sleep replica", replica=request.replica_id)
        return pb.SleepReplicaResponse(replica=self._replica(self._find_replica(request.replica_id)))

    async def WakeReplica(self, request: pb.WakeReplicaRequest, context: Any) -> pb.WakeReplicaResponse:
        """Wakes a replica."""
        replica = self._find_replica(request.replica_id)
        if request.dry_run:
            self._core.lifecycle.check_wake(replica)
        else:
            self._runtime.apply(self._core.wake(replica, time.monotonic()))
            _note("wake replica", replica=request.replica_id)
        return pb.WakeReplicaResponse(replica=self._replica(self._find_replica(request.replica_id)))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        """Lists workers by id."""
        workers = sorted(self._core.fleet.workers(), key=lambda worker: worker.hello.worker_id)
        reachable = [worker for worker in workers if worker.is_reachable]
        page, token = _page(reachable, request.page_size, request.page_token, lambda worker: worker.hello.worker_id)
        items = [
            pb.Worker(
                worker_id=worker.hello.worker_id,
                node=worker.hello.node,
                devices=[device_to_proto(device) for device in worker.devices.values()],
                engines=worker.hello.engines,
                slot_count=worker.hello.slot_count,
                replica_count=len(worker.replicas),
                version=worker.hello.version,
                host_memory=fleet_pb.HostMemory(
                    memory_bytes=worker.hello.host_memory_bytes,
                    booked_bytes=worker.hello.host_memory_bytes - worker.free_host_bytes,
                ),
                staged=[staged_to_proto(staged) for staged in worker.staged.values()],
                cordoned=worker.hello.worker_id in self._core.fleet.cordoned,
            )
            for worker in page
        ]
        return pb.ListWorkersResponse(workers=items, next_page_token=token)

    async def CordonWorker(self, request: pb.CordonWorkerRequest, context: Any) -> pb.CordonWorkerResponse:
        """Has nothing more started on a worker."""
        self._core.check_worker(request.worker_id)
        if not request.dry_run:
            await self._runtime.cordons.change(request.worker_id, is_cordoned=True)
            _note("cordon worker", worker=request.worker_id)
        return pb.CordonWorkerResponse(replica_count=len(self._replicas_on(request.worker_id)))

    async def UncordonWorker(self, request: pb.UncordonWorkerRequest, context: Any) -> pb.UncordonWorkerResponse:
        """Lets replicas be started on a worker again."""
        self._core.check_worker(request.worker_id)
        if not request.dry_run:
            await self._runtime.cordons.change(request.worker_id, is_cordoned=False)
            _note("uncordon worker", worker=request.worker_id)
        return pb.UncordonWorkerResponse()

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Any) -> pb.DrainWorkerResponse:
        """Cordons a worker and drains its replicas."""
        self._core.check_worker(request.worker_id)
        replicas = self._replicas_on(request.worker_id)
        others = {r.model for r in self._core.fleet.replicas() if r.worker_id != request.worker_id}
        if not request.dry_run:
            await self._runtime.cordons.change(request.worker_id, is_cordoned=True)
            self._runtime.apply(self._core.drain_worker(request.worker_id, time.monotonic()))
            _note("drain worker", worker=request.worker_id)
        only_here = sorted({replica.model for replica in replicas} - others)
        return pb.DrainWorkerResponse(draining_count=len(replicas), only_here=only_here)

    async def ListScalingDecisions(
        self, request: pb.ListScalingDecisionsRequest, context: Any
    ) -> pb.ListScalingDecisionsResponse:
        """Lists how many replicas models were to have, and why, the newest first."""
        entry = self._core.catalogue.find(request.model)
        name = entry.name if entry is not None else request.model
        found = [each for each in reversed(self._core.lifecycle.wants.decisions.kept) if not name or each.model == name]
        offset = self._runtime.journal.wall_offset
        return pb.ListScalingDecisionsResponse(
            decisions=[
                pb.ScalingDecision(
                    model=each.model,
                    decided_at=timestamp(each.at + offset),
                    from_count=each.from_count,
                    to_count=each.to_count,
                    reason=each.reason,
                    advice=each.is_advice,
                    cause=pb.ScalingCause.ValueType(each.cause.value),
                )
                for each in found[: _page_size(request.page_size)]
            ]
        )

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:
        """Lists replicas by model and id."""
        entry = await self._find(request.model) if request.model else None
        replicas = self._core.fleet.replicas() if entry is None else self._core.fleet.replicas_of(entry.name)
        ordered = sorted(replicas, key=_replica_key)
        page, token = _page(ordered, request.page_size, request.page_token, _replica_key)
        items = [
            pb.ReplicaOnWorker(replica=self._replica(r), worker_id=r.worker_id, breaker=self._breaker(r)) for r in page
        ]
        response = pb.ListReplicasResponse(replicas=items, next_page_token=token)
        if not request.page_token:
            journal = self._runtime.journal
            failures = [f for f in journal.failures if entry is None or f.replica.model == entry.name]
            response.failures.extend(failure_to_proto(failed, journal.wall_offset) for failed in failures)
        return response

    async def ExplainRequest(self, request: pb.ExplainRequestRequest, context: Any) -> pb.ExplainRequestResponse:
        """Says where a request's time went."""
        if not request.request_id:
            raise InvalidRequest("you must provide a request_id", metadata={"param": "request_id"})
        record = self._runtime.journal.find(request.request_id)
        if record is None:
            raise NotFound(
                f"the request '{shown(request.request_id)}' was never seen here, or too long ago; "
                "its id is the answer's header x-request-id",
                reason="REQUEST_NOT_FOUND",
                metadata={"request_id": shown(request.request_id)},
            )
        return pb.ExplainRequestResponse(explanation=explanation_to_proto(record, time.monotonic()))

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Any) -> pb.ListRequestsResponse:
        """Lists requests that can be explained, the newest first."""
        entry = self._core.catalogue.find(request.model)
        names = frozenset(filter(None, (request.model, entry.name if entry is not None else "")))
        found = self._runtime.journal.recent(names=names, state=state_from_proto(request.state))
        size = _page_size(request.page_size)
        start = 0
        if request.page_token:
            # Records leave oldest first: where the token's is gone, so is all that came before it.
            ids = [record.request_id for record in found]
            start = ids.index(request.page_token) + 1 if request.page_token in ids else len(ids)
        page = found[start : start + size]
        token = page[-1].request_id if page and start + size < len(found) else ""
        return pb.ListRequestsResponse(requests=[summary_to_proto(record) for record in page], next_page_token=token)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        """Tells what happens to workers and replicas."""
        model = (await self._find(request.model)).name if request.model else ""
        after = request.after if request.HasField("after") else None
        async with aclosing(self._watches.watch(after, model, until_now=request.until_now)) as events:
            async for event in events:
                yield event

    async def ResetBreaker(self, request: pb.ResetBreakerRequest, context: Any) -> pb.ResetBreakerResponse:
        """Has a replica picked again."""
        replica = self._find_replica(request.replica_id)
        before = self._breaker(replica)
        if not request.dry_run:
            self._runtime.apply(self._core.reset_breaker(replica, time.monotonic()))
            _note("reset breaker", replica=request.replica_id)
        return pb.ResetBreakerResponse(before=before)

    async def _find(self, name: str) -> ModelEntry:
        if not name:
            raise InvalidRequest("you must provide a model", metadata={"param": "model"})
        return await find_model(self._runtime, self._models, name)

    def _find_replica(self, replica_id: str) -> Replica:
        replica = self._core.fleet.replica(replica_id)
        if replica is None:
            metadata = {"replica_id": shown(replica_id)}
            raise NotFound(f"there is no replica '{shown(replica_id)}'", reason="REPLICA_NOT_FOUND", metadata=metadata)
        return replica

    async def _write_count(self, name: str, count: int) -> ModelEntry:
        try:
            return await self._models.set_count(name, count)
        except REGISTRY_AWAY as error:
            raise registry_away(f"the policy of '{name}' can't be written", error, model=name) from error

    def _replicas_on(self, worker_id: str) -> list[Replica]:
        worker = self._core.fleet.worker(worker_id)
        return list(worker.replicas.values()) if worker is not None else []

    def _current(self, entry: ModelEntry) -> list[Replica]:
        return self._core.traffic.staying(entry.name)

    def _breaker(self, replica: Replica) -> pb.BreakerState.ValueType:
        return _BREAKER_STATES[self._core.traffic.breakers.state(replica.replica_id)]

    def _replica(self, replica: Replica) -> types_pb2.Replica:
        # A drain that was asked counts before the worker has said so.
        is_draining = replica.state is ReplicaState.READY and self._core.traffic.is_draining(replica)
        return replica_to_proto(replace(replica, state=ReplicaState.DRAINING) if is_draining else replica)


def _note(what: str, **fields: object) -> None:
    # Nobody else may call this service.
    audit(what, actor="admin-edge", **fields)


def _replica_key(replica: Replica) -> str:
    return f"{replica.model}\n{replica.replica_id}"


def _page(items: list[T], page_size: int, token: str, key: Callable[[T], str]) -> tuple[list[T], str]:
    """A page of items that are sorted by `key`, and the token of the next: the last key, so pages survive changes."""
    size = _page_size(page_size)
    start = bisect.bisect_right(items, token, key=key) if token else 0
    page = items[start : start + size]
    has_more = start + len(page) < len(items)
    return page, key(page[-1]) if page and has_more else ""


def _page_size(page_size: int) -> int:
    """How many items a page has. Raises InvalidRequest for too many."""
    if page_size > _MAX_PAGE_SIZE:
        raise InvalidRequest(f"page_size is at most {_MAX_PAGE_SIZE}", metadata={"param": "page_size"})
    return page_size or DEFAULT_PAGE_SIZE
