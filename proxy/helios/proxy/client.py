"""Typed clients of the proxy's services, for the command line and for other components.

Both take anything that gives stubs (a `Dialer`, or a plain channel in `ChannelStubs` with a bearer token). Unary calls
have a timeout and are idempotent. Errors are HeliosErrors.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc.aio

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1 import explanation_pb2 as explanation_pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.catalog.v1 import model_service_pb2 as catalog_pb
from helios.api.catalog.v1.model_service_pb2_grpc import ModelServiceStub
from helios.api.fleet.v1 import types_pb2
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource

S = TypeVar("S")

DEFAULT_TIMEOUT_SECONDS: Final = 10.0
_PAGE_SIZE: Final = 1_000


class ChannelStubs:
    """Stubs on a plain channel, which stays the caller's."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def stub(self, stub_class: Callable[[grpc.aio.Channel], S]) -> S:
        """Returns a stub."""
        return stub_class(self._channel)


class ModelsClient:
    """What can be asked for."""

    def __init__(self, stubs: StubSource, *, token: str = "", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self._stubs = stubs
        self._options = _options(token, timeout_seconds)

    async def list_models(self) -> list[catalog_pb.Model]:
        """All models, by name."""
        response = await answer_of(self._stub().ListModels(catalog_pb.ListModelsRequest(), **self._options))
        return list(response.data)

    async def get_model(self, name: str) -> catalog_pb.Model:
        """A model by name or alias. Raises ModelNotFound."""
        return await answer_of(self._stub().GetModel(catalog_pb.GetModelRequest(model=name), **self._options))

    def _stub(self) -> ModelServiceStub:
        return self._stubs.stub(ModelServiceStub)


class AdminClient:
    """What operators do."""

    def __init__(self, stubs: StubSource, *, token: str = "", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self._stubs = stubs
        self._options = _options(token, timeout_seconds)

    async def preload(self, model: str) -> list[types_pb2.Replica]:
        """Starts a replica unless there is one. Raises ModelNotFound, Unavailable (NO_WORKER, NO_CAPACITY)."""
        request = admin_pb.PreloadModelRequest(model=model)
        return list((await answer_of(self._stub().PreloadModel(request, **self._options))).replicas)

    async def scale(self, model: str, replica_count: int) -> admin_pb.ScaleModelResponse:
        """Sets how many replicas a model has. Raises ModelNotFound, InvalidRequest, Unavailable."""
        request = admin_pb.ScaleModelRequest(model=model, replica_count=replica_count)
        return await answer_of(self._stub().ScaleModel(request, **self._options))

    async def evict(self, model: str) -> int:
        """Drains a model and drops its bytes; returns how many replicas drain. Raises PreconditionFailed."""
        request = admin_pb.EvictModelRequest(model=model)
        return (await answer_of(self._stub().EvictModel(request, **self._options))).draining_count

    async def stage(self, model: str) -> admin_pb.StageModelResponse:
        """Stages a model and drains its replicas. Raises ModelNotFound, PreconditionFailed, Unavailable."""
        request = admin_pb.StageModelRequest(model=model)
        return await answer_of(self._stub().StageModel(request, **self._options))

    async def unstage(self, model: str) -> int:
        """Gives a staged model's memory back; returns on how many nodes. Raises ModelNotFound."""
        request = admin_pb.UnstageModelRequest(model=model)
        return (await answer_of(self._stub().UnstageModel(request, **self._options))).worker_count

    async def sleep(self, replica_id: str) -> types_pb2.Replica:
        """Puts a replica to sleep. Raises NotFound, PreconditionFailed."""
        request = admin_pb.SleepReplicaRequest(replica_id=replica_id)
        return (await answer_of(self._stub().SleepReplica(request, **self._options))).replica

    async def wake(self, replica_id: str) -> types_pb2.Replica:
        """Wakes a replica. Raises NotFound, PreconditionFailed."""
        request = admin_pb.WakeReplicaRequest(replica_id=replica_id)
        return (await answer_of(self._stub().WakeReplica(request, **self._options))).replica

    async def list_workers(self) -> list[admin_pb.Worker]:
        """All connected workers, by id."""
        found: list[admin_pb.Worker] = []
        token = ""
        while True:
            request = admin_pb.ListWorkersRequest(page_size=_PAGE_SIZE, page_token=token)
            response = await answer_of(self._stub().ListWorkers(request, **self._options))
            found += response.workers
            token = response.next_page_token
            if not token:
                return found

    async def explain(self, request_id: str) -> explanation_pb.RequestExplanation:
        """Where a request's time went. Raises NotFound (REQUEST_NOT_FOUND)."""
        request = admin_pb.ExplainRequestRequest(request_id=request_id)
        return (await answer_of(self._stub().ExplainRequest(request, **self._options))).explanation

    async def list_requests(self, model: str = "", *, count: int = 100) -> list[explanation_pb.RequestSummary]:
        """The newest `count` requests (at most 1,000) that can be explained, or those for a model."""
        request = admin_pb.ListRequestsRequest(model=model, page_size=count)
        return list((await answer_of(self._stub().ListRequests(request, **self._options))).requests)

    async def list_replicas(self, model: str = "") -> list[admin_pb.ReplicaOnWorker]:
        """All replicas, or those of a model."""
        found: list[admin_pb.ReplicaOnWorker] = []
        token = ""
        while True:
            request = admin_pb.ListReplicasRequest(model=model, page_size=_PAGE_SIZE, page_token=token)
            response = await answer_of(self._stub().ListReplicas(request, **self._options))
            found += response.replicas
            token = response.next_page_token
            if not token:
                return found

    def _stub(self) -> AdminServiceStub:
        return self._stubs.stub(AdminServiceStub)


def _options(token: str, timeout_seconds: float) -> dict[str, Any]:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return {"timeout": timeout_seconds, "metadata": metadata}
