"""ModelService: OpenAI's model list, and the state of each model here."""

import bisect
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from helios.api.catalog.v1 import model_service_pb2 as pb
from helios.api.catalog.v1.model_service_pb2_grpc import ModelServiceServicer
from helios.mesh.errors import InvalidRequest
from helios.mesh.server import peer_component
from helios.proxy.admission.keyring import ANYBODY, Caller, check_model
from helios.proxy.catalog.session import ModelSource
from helios.proxy.catalogue import ModelEntry, shown
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.state import Replica, ReplicaState
from helios.proxy.promises import Promise
from helios.proxy.registry_away import REGISTRY_AWAY, registry_away
from helios.proxy.runtime import Runtime
from helios.proxy.scaling.ladder import Rung
from helios.proxy.sizing import ReplicaSize

MODEL_SERVICE: Final = "helios.api.catalog.v1.ModelService"
_MAX_PAGE_SIZE: Final = 10_000


class ModelServicer(ModelServiceServicer):
    """Answers from the core; only a name that is not known while the registry is out of step is asked for."""

    def __init__(self, runtime: Runtime, models: ModelSource) -> None:
        self._runtime = runtime
        self._models = models

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists models by name; the page token is the last name of the page before."""
        if request.page_size > _MAX_PAGE_SIZE:
            raise InvalidRequest(f"page_size is at most {_MAX_PAGE_SIZE}", metadata={"param": "page_size"})
        caller = self._identify(context)
        entries = _named(self._runtime.core.catalogue.models())
        if caller.models:
            entries = [(name, entry) for name, entry in entries if caller.may_use(entry, name)]
        start = bisect.bisect_right(entries, request.page_token, key=lambda named: named[0])
        page = entries[start : start + (request.page_size or len(entries))]
        token = page[-1][0] if page and start + len(page) < len(entries) else ""
        now = time.monotonic()
        data = [self._describe(entry, now, name) for name, entry in page]
        return pb.ListModelsResponse(object="list", data=data, next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        """Describes a model."""
        caller = self._identify(context)
        entry = await find_model(self._runtime, self._models, request.model)
        check_model(caller, entry, request.model)
        return self._describe(entry, time.monotonic(), request.model)

    def _identify(self, context: Any) -> Caller:
        """Whose call it is; people's, who come through the admin edge, need no key. Raises Unauthenticated."""
        if peer_component(context) == "admin-edge":
            return ANYBODY
        metadata = context.invocation_metadata() or ()
        authorization = next((str(value) for key, value in metadata if key == "authorization"), "")
        return self._runtime.core.keyring.identify(authorization, datetime.now(UTC).timestamp())

    def _describe(self, entry: ModelEntry, now: float, name: str) -> pb.Model:
        """Describes a model, or one of its adapters where ``name`` is one's."""
        is_adapter = name in entry.adapters
        core = self._runtime.core
        lifecycle, traffic = core.lifecycle, core.traffic
        replicas = core.fleet.replicas_of(entry.name)
        draining = [replica for replica in replicas if traffic.is_draining(replica)]
        starting = [replica for replica in replicas if replica.state.is_starting and replica not in draining]
        ready = [replica for replica in replicas if replica.state is ReplicaState.READY and replica not in draining]
        failure = "" if ready else lifecycle.failure(entry.name)
        is_open = any(traffic.is_candidate(replica.replica_id) for replica in ready)
        return pb.Model(
            id=name if is_adapter else entry.name,
            parent=entry.name if is_adapter else "",
            object="model",
            created=entry.created_at,
            owned_by="helios",
            state=_state([r for r in starting if not r.is_spare], ready, is_failed=bool(failure)),
            replicas=pb.ReplicaCounts(
                starting=len(starting),
                ready=len(ready),
                draining=len(draining),
                asleep=sum(replica.state is ReplicaState.ASLEEP and replica not in draining for replica in replicas),
                staged=len(core.fleet.staged_on(entry.revision)),
                on_disk=lifecycle.room.disk_count(entry.revision),
            ),
            resources=_resources(entry, lifecycle.room.size(entry)),
            aliases=() if is_adapter else entry.aliases,
            revision=entry.revision,
            max_context_tokens=max((replica.max_context_tokens for replica in ready), default=0)
            or needs_of(entry.engine_settings).max_context_tokens
            or entry.max_context_tokens,
            estimated_ready_seconds=0.0 if is_open else round(lifecycle.remaining_seconds(entry, now), 1),
            failure=failure,
            fetch=_fetch(starting),
            warm_target=self._target(entry.name),
            start=None if is_open else _start(lifecycle.promises.promise(entry)),
        )

    def _target(self, name: str) -> pb.WarmPoolTarget | None:
        forecasts = self._runtime.core.lifecycle.wants.forecasts
        expected = forecasts.of(name.partition("@")[0], time.monotonic())
        if expected is None:
            return None
        return pb.WarmPoolTarget(
            rung="memory" if expected.rung is Rung.STAGED else expected.rung.name.lower(),
            replica_count=expected.replica_count,
            reason=expected.reason,
            is_followed=forecasts.is_followed,
        )


def _resources(entry: ModelEntry, size: ReplicaSize) -> pb.ModelResources:
    return pb.ModelResources(
        weights_bytes=entry.weights_bytes,
        memory_bytes=size.memory_bytes,
        parameter_count=entry.parameter_count,
        kv_bytes_per_token=entry.kv_bytes_per_token,
        dtype=entry.dtype,
        architecture=entry.architecture,
        memory_items=dict(size.items),
        host_memory_bytes=size.host_bytes,
        tensor_parallel_options=entry.tensor_parallel_options,
        pipeline_parallel_options=entry.pipeline_parallel_options,
    )


def _start(promise: Promise) -> pb.StartPromise:
    return pb.StartPromise(
        rung=pb.StartRung.ValueType(promise.rung.value),
        seconds=round(promise.seconds, 1),
        scored_count=promise.score.count,
        error_factor=round(promise.score.error_factor, 2) if promise.score.count else 0.0,
    )


def _fetch(starting: Iterable[Replica]) -> pb.ModelFetch | None:
    """Of the replicas whose weights are on their way, the one that has the most of them."""
    fetch = max((r.fetch for r in starting if r.fetch is not None), key=lambda f: f.done_bytes, default=None)
    if fetch is None:
        return None
    return pb.ModelFetch(
        done_bytes=fetch.done_bytes,
        total_bytes=fetch.total_bytes,
        bytes_per_second=round(fetch.bytes_per_second),
        remaining_seconds=None if fetch.remaining_seconds is None else round(fetch.remaining_seconds, 1),
    )


def _named(entries: list[ModelEntry]) -> list[tuple[str, ModelEntry]]:
    """Returns what requests may name, sorted: models, and adapters with the model that answers with them.

    A canary that has no name of its own is a part of its model, not one more.
    """
    canaries = {entry.canary for entry in entries if entry.canary}
    shown_entries = (entry for entry in entries if entry.aliases or entry.name not in canaries)
    models = [(entry.name, entry) for entry in shown_entries if not entry.is_adapter]
    adapters = [(name, entry) for entry in entries for name in entry.adapters]
    return sorted((*models, *adapters), key=lambda named: named[0])


async def find_model(runtime: Runtime, models: ModelSource, name: str) -> ModelEntry:
    """The model of a name or alias, from the catalogue or, where that is out of step, from the registry.

    Raises:
        ModelNotFound: there is none.
        InvalidRequest: what follows the name's "@" is no reference.
        Unavailable: it can't be told now.
    """
    entry = runtime.core.resolve(name)
    if entry is not None:
        return entry
    try:
        entry = await models.find(name)
    except REGISTRY_AWAY as error:
        what = f"it can't be told now whether the model '{shown(name)}' exists"
        raise registry_away(what, error, model=shown(name)) from error
    runtime.apply(runtime.core.model_upserted(entry, time.monotonic()))
    return entry


def _state(starting: list[Replica], ready: list[Replica], *, is_failed: bool) -> pb.ModelState.ValueType:
    if ready:
        return pb.ModelState.MODEL_STATE_READY
    if starting:
        return pb.ModelState.MODEL_STATE_STARTING
    return pb.ModelState.MODEL_STATE_FAILED if is_failed else pb.ModelState.MODEL_STATE_COLD
