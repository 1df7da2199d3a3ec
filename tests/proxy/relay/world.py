"""A relay with replicas of the simulated engine in one process, whose answers can be cut off after any message."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import orjson
from google.api.httpbody_pb2 import HttpBody

from helios.api.fleet.v1 import replacement_service_pb2 as fleet_pb
from helios.api.fleet.v1 import replacement_service_pb2_grpc
from helios.api.inference.v1 import (
    continuation_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    openai_service_pb2_grpc,
)
from helios.mesh import names
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, NoReadyReplica, Unavailable
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.status import error_from_rpc
from helios.mesh.tasks import task_scope
from helios.proxy.relay.moves import MoveTeller
from helios.proxy.relay.replicas import Replicas
from helios.proxy.relay.servicer import INFERENCE_SERVICE, OPENAI_SERVICE, RelayServicer
from helios.proxy.relay.session import Surroundings
from helios.proxy.replacement.servicer import REPLACEMENT_SERVICE
from helios.worker.engines.simulated.engine import SimulatedEngine
from helios.worker.replica.continuation_servicer import ContinuationServicer
from helios.worker.replica.engine import EngineHooks
from helios.worker.replica.gate import CallGate
from helios.worker.replica.inference_servicer import InferenceServicer
from helios.worker.replica.ledger import Finished, RequestLedger
from helios.worker.replica.main import CONTINUATION_SERVICE
from helios.worker.replica.openai_servicer import OpenAIServicer
from helios.worker.replica.spec import ReplicaSpec
from tests.proxy.fakes import until

REVISION = "sha256:" + "5" * 64
OPTIONS = ServerOptions(drain_seconds=0.0, transport="http2")
ANY = frozenset({"*"})
MODEL = "m"
# Steps that take this long leave none of them to be joined by chance.
STEP_SECONDS = 0.001


class _Cut:
    """A context that counts messages, and whose call breaks off at the n-th, before it is out."""

    def __init__(self, context: Any, world: "World", at: int) -> None:
        self._context = context
        self._world = world
        self._left = at

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    async def write(self, message: Any) -> None:
        if not self._left:
            raise self._world.cut_error
        self._left -= 1
        await self._context.write(message)
        self._world.written += 1


class CuttingServicer(ContinuationServicer):
    """Cuts answers off as it is told, one after the other; then lets them be."""

    def __init__(self, *args: Any, world: "World") -> None:
        super().__init__(*args)
        self._world = world

    async def Answer(self, request: Any, context: Any) -> None:  # type: ignore[override]
        world = self._world
        world.answered += 1
        await super().Answer(request, _Cut(context, world, world.cuts.pop(0) if world.cuts else -1))
        if world.is_cut_at_end:
            raise world.cut_error


@dataclass
class SimulatedReplica:
    """A replica: its own gate, ledger and address."""

    gate: CallGate
    ledger: RequestLedger
    server: MeshServer

    def finished(self) -> list[Finished]:
        return list(self.ledger.take().finished)


@dataclass
class World(replacement_service_pb2_grpc.ReplacementServiceServicer):
    """Relay, replicas, and the proxy's word on which one is next: the others in turn."""

    replicas: list[SimulatedReplica] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    cut_error: HeliosError = field(default_factory=lambda: Unavailable("cut off"))
    is_cut_at_end: bool = False
    """Whether calls break off when all of their messages are out."""
    refusal: HeliosError | None = None
    picks: list[fleet_pb.PickReplicaRequest] = field(default_factory=list)
    moves: list[fleet_pb.NoteMoveRequest] = field(default_factory=list)
    named_at_once: int = 3
    """How many replicas the proxy names."""
    picked: list[str] = field(default_factory=list)
    """What the picker chose; none: the first replica."""
    answered: int = 0
    """Calls of replicas."""
    written: int = 0
    """Messages of replicas."""
    dialer: Dialer = field(init=False)

    async def PickReplica(self, request: Any, context: Any) -> fleet_pb.PickReplicaResponse:
        self.picks.append(request)
        if self.refusal is not None:
            raise self.refusal
        addresses = [replica.server.address for replica in self.replicas]
        failed = [address for address in addresses if address in request.failed_endpoints]
        others = [address for address in addresses if address not in failed]
        if not others:
            raise NoReadyReplica("there is no other replica")
        return fleet_pb.PickReplicaResponse(endpoints=others[: self.named_at_once])

    async def NoteMove(self, request: Any, context: Any) -> fleet_pb.NoteMoveResponse:
        self.moves.append(request)
        return fleet_pb.NoteMoveResponse(is_noted=True)

    def metadata(self, durable: str = "true") -> list[tuple[str, str]]:
        """What Envoy and the picker add to a request."""
        own = {
            names.ENDPOINT_HEADER: ",".join(self.picked or [self.replicas[0].server.address]),
            names.ROUTE_MODEL_HEADER: MODEL,
            names.ROUTE_REVISION_HEADER: REVISION,
            names.REQUEST_ID_HEADER: "r-1",
            names.DURABLE_HEADER: durable,
        }
        return list(own.items())

    async def wait_written(self, count: int) -> None:
        """Waits until replicas have sent so many messages."""
        await until(lambda: self.written >= count, seconds=20)

    async def openai(
        self, method: str, document: dict[str, Any], *, direct: SimulatedReplica | None = None, durable: str = "true"
    ) -> tuple[bytes, HeliosError | None]:
        """Calls OpenAIService, of the relay or of a replica; gives the body as its bytes, and how it failed."""
        body = HttpBody(content_type="application/json", data=orjson.dumps({"model": MODEL} | document))
        async with self._dialled(direct) as dialer:
            call = getattr(dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub), method)
            parts: list[bytes] = []
            try:
                async for message in call(body, metadata=self.metadata(durable), timeout=60):
                    parts.append(message.data)  # noqa: PERF401 - what came before an error is wanted, too
            except grpc.aio.AioRpcError as error:
                return b"".join(parts), error_from_rpc(error)
            return b"".join(parts), None

    async def complete(self, request: Any, *, direct: SimulatedReplica | None = None) -> list[Any]:
        """Calls InferenceService.Complete, of the relay or of a replica."""
        async with self._dialled(direct) as dialer:
            stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
            return [message async for message in stub.Complete(request, metadata=self.metadata(), timeout=60)]

    @asynccontextmanager
    async def _dialled(self, direct: SimulatedReplica | None) -> AsyncIterator[Dialer]:
        if direct is None:
            yield self.dialer
            return
        async with Dialer(direct.server.address, identity=None, peer="worker") as dialer:
            yield dialer


@asynccontextmanager
async def running_world(*, cuts: Sequence[int] = (), replica_count: int = 2, **options: str) -> AsyncIterator[World]:
    """Runs relay and replicas."""
    world = World(cuts=list(cuts))
    async with AsyncExitStack() as stack:
        for number in range(replica_count):
            world.replicas.append(await stack.enter_async_context(_replica(world, number, options)))
        proxy = MeshServer(listen="127.0.0.1:0", identity=None, policy={REPLACEMENT_SERVICE: ANY}, options=OPTIONS)
        replacement_service_pb2_grpc.add_ReplacementServiceServicer_to_server(world, proxy.grpc)
        await stack.enter_async_context(proxy)
        channels = Replicas(None)
        stack.push_async_callback(channels.close)
        asking = await stack.enter_async_context(Dialer(proxy.address, identity=None, peer="proxy"))
        # Of two proxies one is away.
        away = await stack.enter_async_context(Dialer("127.0.0.1:1", identity=None, peer="proxy"))
        moves = MoveTeller([away, asking])
        group = await stack.enter_async_context(task_scope())
        group.create_task(moves.run(), name="tell moves")
        around = Surroundings(channels, [asking, away], replace_seconds=20.0, barren_limit=3, moves=moves)
        relay = MeshServer(
            listen="127.0.0.1:0",
            identity=None,
            policy={OPENAI_SERVICE: ANY, INFERENCE_SERVICE: ANY},
            options=OPTIONS,
        )
        RelayServicer(around, max_held_bytes=1 << 26).add_to(relay.grpc)
        await stack.enter_async_context(relay)
        world.dialer = await stack.enter_async_context(Dialer(relay.address, identity=None, peer="relay"))
        yield world


@asynccontextmanager
async def _replica(world: World, number: int, options: dict[str, str]) -> AsyncIterator[SimulatedReplica]:
    reader, writer = os.pipe()
    quick = {"decode_seconds_per_token": str(STEP_SECONDS), "prefill_seconds_per_token": "0", "kv_bytes_per_token": "1"}
    spec = ReplicaSpec(
        replica_id=f"replica-{number}",
        model=MODEL,
        revision=REVISION,
        model_path="/nowhere",
        engine="simulated",
        options=quick | options,
        kv_cache_bytes=1 << 14,
        created_at=datetime.now(UTC),
    )
    hooks = EngineHooks(on_forked=lambda: None, on_load=lambda: None, phase_descriptor=writer)
    engine = SimulatedEngine(spec, hooks)
    ledger = RequestLedger()
    gate = CallGate(names=(MODEL,), revision=REVISION, ledger=ledger, on_change=lambda: None)
    policy = {OPENAI_SERVICE: ANY, INFERENCE_SERVICE: ANY, CONTINUATION_SERVICE: ANY}
    server = MeshServer(listen="127.0.0.1:0", identity=None, policy=policy, options=OPTIONS)
    openai = OpenAIServicer(engine, gate)
    inference = InferenceServicer(engine, gate, model=MODEL, revision=REVISION)
    openai_service_pb2_grpc.add_OpenAIServiceServicer_to_server(openai, server.grpc)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server.grpc)
    continuation_service_pb2_grpc.add_ContinuationServiceServicer_to_server(
        CuttingServicer(openai, inference, world=world), server.grpc
    )
    try:
        async with server:
            yield SimulatedReplica(gate, ledger, server)
    finally:
        engine.close()
        os.close(reader)
        os.close(writer)


def complete_request(text: str, max_tokens: int) -> inference_service_pb2.CompleteRequest:
    """A typed request."""
    request = inference_service_pb2.CompleteRequest(model=MODEL, text=text)
    request.sampling.max_tokens = max_tokens
    return request
