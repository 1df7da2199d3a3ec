"""Everything around a proxy, over real gRPC and mTLS: a worker, an Envoy (ext_proc and ADS client), a registry."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.auth.v3 import external_auth_pb2 as auth_pb
from envoy.service.auth.v3 import external_auth_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.fleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from helios.api.registry.v1 import registry_service_pb2 as registry_pb
from helios.api.registry.v1 import usage_service_pb2 as usage_pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceServicer
from helios.api.registry.v1.usage_service_pb2_grpc import UsageServiceServicer
from helios.mesh.channel import Dialer
from helios.mesh.errors import ModelNotFound
from helios.mesh.identity import IdentityFiles
from helios.mesh.xds.server import ENDPOINTS_TYPE

GIB = 1 << 30
READY = types_pb2.ReplicaState.REPLICA_STATE_READY
PORTS = itertools.count(20_000)


async def until(condition: Callable[[], Any], *, seconds: float = 10.0) -> None:
    """Waits until a condition holds; fails the test at the deadline."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class FakeWorker:
    """Keeps replicas in memory. What it does with commands can be set at any time."""

    worker_id: str = "w1"
    memory_bytes: int = 8 * GIB
    start_seconds: float = 0.02
    beat_seconds: float = 0.2
    refuse: str = ""
    fail: str = ""
    address: Callable[[], str] = lambda: f"127.0.0.1:{next(PORTS)}"
    incarnation: str = "1"
    replicas: dict[str, types_pb2.Replica] = field(default_factory=dict)
    commands: list[fleet_pb.Command] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    heartbeats: int = 0
    broken: grpc.aio.AioRpcError | None = None
    _done: dict[str, fleet_pb.CommandAck] = field(default_factory=dict)
    _sequence: int = 0
    _outbox: "asyncio.Queue[fleet_pb.SessionRequest]" = field(default_factory=asyncio.Queue)
    _group: asyncio.TaskGroup | None = None

    @property
    def starts(self) -> list[fleet_pb.StartReplica]:
        """The start commands that were carried out."""
        return [command.start for command in self.commands if command.WhichOneof("command") == "start"]

    @asynccontextmanager
    async def connected(self, target: str, identity: IdentityFiles | None) -> AsyncIterator["FakeWorker"]:
        """Holds a session for the block; leaving it breaks the stream and keeps the replicas."""
        async with Dialer(target, identity=identity, peer="proxy") as dialer:
            with contextlib.suppress(asyncio.CancelledError):
                async with asyncio.TaskGroup() as group:
                    self._group, self.broken = group, None
                    welcomed = asyncio.Event()
                    group.create_task(self._session(dialer, welcomed))
                    await until(lambda: welcomed.is_set() or self.broken is not None)
                    assert self.broken is None, self.broken
                    yield self
                    raise asyncio.CancelledError

    def say(self, **message: Any) -> None:
        """Sends something."""
        self._outbox.put_nowait(fleet_pb.SessionRequest(**message))

    def report(self, replica_id: str, *, started: Iterable[str] = (), finished: Iterable[tuple[str, int]] = ()) -> None:
        """Reports requests of a replica."""
        delta = types_pb2.LoadDelta(
            replica_id=replica_id,
            started=[types_pb2.RequestStarted(request_id=key) for key in started],
            finished=[types_pb2.RequestFinished(request_id=key, status_code=code) for key, code in finished],
        )
        self.say(load=fleet_pb.LoadReport(deltas=[delta]))

    def change(self, replica_id: str, **fields: Any) -> None:
        """Changes a replica and tells of it; one that is gone is kept no more."""
        replica = self.replicas[replica_id]
        for name, value in fields.items():
            if name == "failure":
                replica.failure.reason = value
            else:
                setattr(replica, name, value)
        if replica.state in (types_pb2.REPLICA_STATE_STOPPED, types_pb2.REPLICA_STATE_FAILED):
            del self.replicas[replica_id]
        self._sequence += 1
        event = fleet_pb.ReplicaEvent(sequence=self._sequence)
        event.replica.CopyFrom(replica)
        self.say(replica_event=event)

    async def _session(self, dialer: Dialer, welcomed: asyncio.Event) -> None:
        self._outbox = asyncio.Queue()
        call = dialer.stub(FleetServiceStub).Session(wait_for_ready=True)
        await call.write(fleet_pb.SessionRequest(hello=self._hello()))
        assert self._group is not None
        self._group.create_task(self._beat())
        writer = self._group.create_task(self._write(call))
        try:
            async for message in call:
                match message.WhichOneof("message"):
                    case "welcome":
                        welcomed.set()
                    case "command":
                        self._obey(message.command)
                    case "heartbeat":
                        self.heartbeats += 1
        except grpc.aio.AioRpcError as error:
            self.broken = error
        finally:
            writer.cancel()
            await _end(call)

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            while True:
                await call.write(await self._outbox.get())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.beat_seconds)
            self.say(heartbeat=fleet_pb.Heartbeat())

    def _hello(self) -> fleet_pb.Hello:
        booked = sum(replica.memory_bytes for replica in self.replicas.values())
        device = fleet_pb.Device(
            device_id="cpu:0",
            kind=fleet_pb.DeviceKind.DEVICE_KIND_CPU,
            memory_bytes=self.memory_bytes,
            booked_bytes=booked,
        )
        return fleet_pb.Hello(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            node="node",
            devices=[device],
            engines=["vllm"],
            slot_count=8,
            replicas=self.replicas.values(),
            version="test",
        )

    def _obey(self, command: fleet_pb.Command) -> None:
        known = self._done.get(command.command_id)
        if known is None:
            known = self._done[command.command_id] = fleet_pb.CommandAck(command_id=command.command_id)
            self.commands.append(command)
            known.refused_reason = self._carry_out(command)
        self.say(command_ack=known)

    def _carry_out(self, command: fleet_pb.Command) -> str:
        assert self._group is not None
        match command.WhichOneof("command"):
            case "start":
                if self.refuse:
                    return self.refuse
                start = command.start
                self.replicas[start.replica_id] = types_pb2.Replica(
                    replica_id=start.replica_id,
                    model=start.model,
                    revision=start.revision,
                    state=types_pb2.ReplicaState.REPLICA_STATE_PENDING,
                    memory_bytes=start.memory_bytes,
                )
                self._group.create_task(self._bring_up(start.replica_id))
            case "drain":
                self._end(command.drain.replica_id)
            case "stop":
                self._end(command.stop.replica_id)
        return ""

    def _end(self, replica_id: str) -> None:
        if replica_id in self.replicas:
            self.change(replica_id, state=types_pb2.ReplicaState.REPLICA_STATE_STOPPED)

    async def _bring_up(self, replica_id: str) -> None:
        self.change(replica_id, state=types_pb2.ReplicaState.REPLICA_STATE_LOADING)
        await asyncio.sleep(self.start_seconds)
        if replica_id not in self.replicas:
            return
        if self.fail:
            self.change(replica_id, state=types_pb2.ReplicaState.REPLICA_STATE_FAILED, failure=self.fail)
        else:
            self.change(replica_id, state=READY, address=self.address(), max_context_tokens=2048)


@dataclass(frozen=True)
class Answer:
    """What the picker said: headers to set, or an error."""

    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    grpc_status: int = 0
    body: str = ""
    asked_body: bool = False

    @property
    def endpoint(self) -> str:
        """Where the request goes."""
        return self.headers.get("x-helios-endpoint", "")


class FakeEnvoy:
    """Asks the picker as Envoy does, and acknowledges endpoints as Envoy does."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._ids = itertools.count(1)
        self.endpoints: set[str] = set()
        self.broken: grpc.aio.AioRpcError | None = None
        self.acking = asyncio.Event()
        self.acking.set()

    @staticmethod
    @asynccontextmanager
    async def connected(target: str, identity: IdentityFiles) -> AsyncIterator["FakeEnvoy"]:
        """Holds the ADS stream for the block."""
        async with Dialer(target, identity=identity, peer="proxy") as dialer:
            envoy = FakeEnvoy(dialer)
            with contextlib.suppress(asyncio.CancelledError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(envoy._follow())
                    yield envoy
                    raise asyncio.CancelledError

    async def ask(
        self,
        model: str | None = "m",
        *,
        header: str | None = None,
        path: str = "/helios.api.inference.v1.OpenAIService/CreateChatCompletion",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        lifted: dict[str, Any] | None = None,
        age_seconds: float = 0.0,
        timeout: float = 15.0,
    ) -> Answer:
        """One request: `model` and `lifted` are what Envoy lifted from the body, `header` is x-helios-model."""
        request = ext_proc.ProcessingRequest()
        sent = {":path": path, ":method": "POST", "x-request-id": f"q{next(self._ids)}", "content-length": "100"}
        if header is not None:
            sent["x-helios-model"] = header
        for key, value in (sent | (headers or {})).items():
            request.request_headers.headers.headers.add(key=key, raw_value=value.encode())
        request.metadata_context.filter_metadata["helios"].update(_lifted(model, lifted))
        began = datetime.now(UTC) - timedelta(seconds=age_seconds)
        attributes = request.attributes["envoy.filters.http.ext_proc"].fields
        attributes["request.time"].string_value = began.isoformat()
        call = self._dialer.stub(external_processor_pb2_grpc.ExternalProcessorStub).Process(
            timeout=timeout, wait_for_ready=True
        )
        asked_body = False
        try:
            await call.write(request)
            response = await call.read()
            if response.HasField("mode_override"):
                asked_body = True
                message = ext_proc.ProcessingRequest()
                message.request_body.body = body or b""
                message.request_body.end_of_stream = True
                await call.write(message)
                response = await call.read()
            return _answer(response, asked_body=asked_body)
        finally:
            await _end(call)

    async def check(
        self,
        model: str | None = "m",
        *,
        body: bytes = b"",
        path: str = "/helios.api.inference.v1.OpenAIService/CreateChatCompletion",
        headers: dict[str, str] | None = None,
        lifted: dict[str, Any] | None = None,
        request_id: str = "",
        age_seconds: float = 0.0,
    ) -> dict[str, str]:
        """Asks what a request can be told at once: headers for it, none where it has to be asked about."""
        request = auth_pb.CheckRequest()
        http = request.attributes.request.http
        http.headers.update({":path": path, "x-request-id": request_id or f"q{next(self._ids)}"})
        http.headers.update({"x-helios-body-bytes": str(len(body))} | (headers or {}))
        http.raw_body = body
        request.attributes.request.time.FromDatetime(datetime.now(UTC) - timedelta(seconds=age_seconds))
        request.attributes.metadata_context.filter_metadata["helios"].update(_lifted(model, lifted))
        call = self._dialer.stub(external_auth_pb2_grpc.AuthorizationStub).Check(request, timeout=5.0)
        response = await call
        assert response.HasField("ok_response"), response
        return {option.header.key: option.header.value for option in response.ok_response.headers}

    async def _follow(self) -> None:
        call = self._dialer.stub(ads_pb2_grpc.AggregatedDiscoveryServiceStub).DeltaAggregatedResources(
            wait_for_ready=True
        )
        first = discovery_pb2.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, resource_names_subscribe=["replicas"])
        first.node.id = "envoy"
        try:
            await call.write(first)
            async for response in call:
                async with asyncio.timeout(60):
                    await self.acking.wait()
                self.endpoints = set(_addresses(response))
                ack = discovery_pb2.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, response_nonce=response.nonce)
                await call.write(ack)
        except grpc.aio.AioRpcError as error:
            self.broken = error
        finally:
            await _end(call)


def _lifted(model: str | None, more: dict[str, Any] | None) -> dict[str, Any]:
    return ({"model": model} if model is not None else {}) | (more or {})


async def _end(call: Any) -> None:
    """Cancels a stream. Its feeder in grpc.aio's interceptors ends only when told that nothing more is written."""
    call.cancel()
    with contextlib.suppress(asyncio.InvalidStateError, asyncio.CancelledError, grpc.aio.AioRpcError):
        await call.done_writing()


def _addresses(response: Any) -> Iterable[str]:
    for resource in response.resources:
        assignment = endpoint_pb2.ClusterLoadAssignment()
        resource.resource.Unpack(assignment)
        for locality in assignment.endpoints:
            for item in locality.lb_endpoints:
                address = item.endpoint.address.socket_address
                yield f"{address.address}:{address.port_value}"


def _answer(response: Any, *, asked_body: bool) -> Answer:
    kind = response.WhichOneof("response")
    if kind == "immediate_response":
        immediate = response.immediate_response
        headers = {o.header.key: o.header.raw_value.decode() for o in immediate.headers.set_headers}
        body = immediate.body.decode()
        return Answer(headers, immediate.status.code, immediate.grpc_status.status, body, asked_body)
    mutation = getattr(response, kind).response.header_mutation
    return Answer({o.header.key: o.header.raw_value.decode() for o in mutation.set_headers}, asked_body=asked_body)


class FakeUsage(UsageServiceServicer):
    """Takes reports, once each, and advises what it is told to; targets that change are told to those who watch."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, int], usage_pb.ReportUsageRequest] = {}
        self.targets: list[usage_pb.WarmTarget] = []

    def counts(self, model: str) -> usage_pb.UsageCounts:
        """The sums of a model."""
        total = usage_pb.UsageCounts()
        for report in self.taken.values():
            for delta in report.deltas:
                if delta.model == model:
                    for count, value in delta.counts.ListFields():
                        setattr(total, count.name, getattr(total, count.name) + value)
        return total

    async def ReportUsage(self, request: Any, context: Any) -> Any:
        self.taken[request.reporter, request.sequence] = request
        return usage_pb.ReportUsageResponse(sequence=request.sequence)

    async def WatchWarmTargets(self, request: Any, context: Any) -> Any:
        yield usage_pb.WatchWarmTargetsResponse(targets=self.targets)
        await asyncio.Event().wait()

    async def _unused(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    ListUsage = GetUsage = ListBlobHeat = _unused


class FakeRegistry(RegistryServiceServicer):
    """Models in memory, with a watch."""

    def __init__(self) -> None:
        self.models: dict[str, registry_pb.Model] = {}
        self._watchers: list[asyncio.Queue[registry_pb.WatchModelsResponse]] = []
        self.is_watch_broken = False

    def put(self, name: str, *, revision: str = "sha256:1", aliases: Iterable[str] = (), min_replicas: int = 0) -> None:
        """Makes or changes a model."""
        model = registry_pb.Model(name=name, aliases=aliases)
        model.revision.digest = revision
        model.revision.created_at.GetCurrentTime()
        model.created_at.GetCurrentTime()
        model.revision.profile.max_context_tokens = 2048
        model.revision.profile.architecture = "LlamaForCausalLM"
        model.policy.min_replicas = min_replicas
        self.models[name] = model
        self._tell(registry_pb.WatchModelsResponse(upserted=model))

    def delete(self, name: str) -> None:
        """Deletes a model."""
        del self.models[name]
        self._tell(registry_pb.WatchModelsResponse(deleted=name))

    async def GetModel(self, request: Any, context: Any) -> Any:
        for model in self.models.values():
            if request.name == model.name or request.name in model.aliases:
                return registry_pb.GetModelResponse(model=model)
        raise ModelNotFound(f"no model '{request.name}'")

    async def UpdatePolicy(self, request: Any, context: Any) -> Any:
        response = await self.GetModel(request, context)
        response.model.policy.CopyFrom(request.policy)
        self.models[response.model.name].CopyFrom(response.model)
        self._tell(registry_pb.WatchModelsResponse(upserted=response.model))
        return registry_pb.UpdatePolicyResponse(model=response.model)

    async def UpdateEngineSettings(self, request: Any, context: Any) -> Any:
        response = await self.GetModel(request, context)
        response.model.engine_settings.CopyFrom(request.settings)
        self.models[response.model.name].CopyFrom(response.model)
        self._tell(registry_pb.WatchModelsResponse(upserted=response.model))
        return registry_pb.UpdateEngineSettingsResponse(model=response.model)

    async def WatchModels(self, request: Any, context: Any) -> Any:
        if self.is_watch_broken:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        queue: asyncio.Queue[registry_pb.WatchModelsResponse] = asyncio.Queue()
        self._watchers.append(queue)
        snapshot = registry_pb.WatchModelsResponse()
        snapshot.snapshot.models.extend(self.models.values())
        snapshot.snapshot.SetInParent()
        yield snapshot
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    async def IngestModel(self, request: Any, context: Any) -> Any:
        raise NotImplementedError
        yield

    async def _unused(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    ListModels = DeleteModel = ListRevisions = GetManifest = PutAlias = DeleteAlias = CollectBlobs = _unused

    def _tell(self, message: registry_pb.WatchModelsResponse) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(message)
