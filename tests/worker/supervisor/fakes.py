"""Doubles of what surrounds the supervisor: launcher, storage agent, proxy; and a node that holds them together.

Processes, sockets and gRPC are real; only the engine, the weights and the decisions of a proxy are made up.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.api.fleet.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from helios.api.worker.v1.supervisor_service_pb2_grpc import add_SupervisorServiceServicer_to_server
from helios.mesh.errors import HeliosError
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.progress import TransferProgress
from helios.worker.early.loads import EarlyLoads
from helios.worker.launcher.client import ForkedReplica
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor.attach_servicer import AttachServicer
from helios.worker.supervisor.commands import Start
from helios.worker.supervisor.host import pick_free_port
from helios.worker.supervisor.ledger import Booking, Ledger
from helios.worker.supervisor.life_stages import Limits
from helios.worker.supervisor.orders import Rules
from helios.worker.supervisor.outbox import Outbox, ReplicaEvent
from helios.worker.supervisor.process_tree import find_tree, read_process
from helios.worker.supervisor.records import Device, DeviceKind, ProcessIdentity, ReplicaState, ReplicaView
from helios.worker.supervisor.replica_list import ReplicaList
from helios.worker.supervisor.replica_runner import Launcher, Weights
from helios.worker.supervisor.supervisor import Supervisor

REVISION = "sha256:" + "ab" * 32
WAIT_SECONDS = 20.0
_SCRIPT = Path(__file__).with_name("fake_replica.py")

RULES = Rules(
    worker_id="worker-1",
    incarnation="one",
    node="node-1",
    version="test",
    engines=("vllm",),
    replica_memory_bytes=1 << 30,
    kv_cache_bytes=1 << 20,
    drain_seconds=5.0,
    return_seconds=10.0,
    lease_ttl_seconds=60.0,
    limits=Limits(fetch_seconds=10, start_seconds=20, drain_seconds=5, drain_grace_seconds=2),
)


def start_of(replica_id: str, **changes: Any) -> Start:
    """Returns a start that nothing is wrong with."""
    return replace(Start(replica_id=replica_id, model="m", revision=REVISION, memory_bytes=1 << 30), **changes)


def spawn_session(*arguments: str, is_leader: bool = True) -> ProcessIdentity:
    """Starts a Python process, by default as leader of a session of its own, like a launcher's child."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
    pid = os.posix_spawn(sys.executable, [sys.executable, *arguments], environment, setsid=is_leader)
    entry = read_process(pid)
    assert entry is not None
    return entry.identity


def kill_and_wait(process: ProcessIdentity) -> None:
    """Kills one child of this process, and nobody below it."""
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)


def living(front: ProcessIdentity) -> list[int]:
    """Returns the pids of a tree that are not dead."""
    return [entry.identity.pid for entry in find_tree(front) if not entry.is_zombie]


class FakeLauncher:
    """Forks fake replicas; ``behaviours`` by replica id, normal where none is named."""

    def __init__(self, **behaviours: str) -> None:
        self.behaviours = behaviours
        self.specs: list[ReplicaSpec] = []
        self.error: HeliosError | None = None
        self.gate: asyncio.Event | None = None

    async def fork(self, spec: ReplicaSpec, deadline: float) -> ForkedReplica:
        self.specs.append(spec)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        document = spec.to_document() | {"behaviour": self.behaviours.get(spec.replica_id, "normal")}
        process = spawn_session(str(_SCRIPT), json.dumps(document))
        return ForkedReplica(process.pid, process.start_ticks)


class FakeLent:
    """A lease of FakeWeights."""

    def __init__(self, lease_id: str, keep: bool) -> None:
        self.path = "/weights"
        self.lease_id = lease_id
        self.keep = keep

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()


@dataclass
class FakeWeights:
    """Lends at once, or fails with ``error``; remembers what was borrowed, resumed and released."""

    error: HeliosError | None = None
    gate: asyncio.Event | None = None
    path: str = "/weights"
    coming: TransferProgress | None = None
    """What is said of a fetch before the gate opens."""
    borrowed: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    """Of ``borrowed``, in its order."""

    @asynccontextmanager
    async def materialize(
        self,
        revision: str,
        *,
        holder: str,
        ttl_seconds: float,
        lease_id: str | None,
        keep: bool,
        on_progress: Callable[[TransferProgress], None] | None = None,
    ) -> AsyncIterator[FakeLent]:
        if on_progress is not None and self.coming is not None:
            on_progress(self.coming)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        if lease_id:
            self.resumed.append(lease_id)
        lent = FakeLent(lease_id or f"lease-{len(self.borrowed)}", keep)
        lent.path = f"{self.path}/{revision}" if self.path != "/weights" else self.path
        self.borrowed.append(lent.lease_id)
        self.revisions.append(revision)
        try:
            yield lent
        finally:
            if not lent.keep:
                self.released.append(lent.lease_id)

    async def evict(self, revision: str) -> int:
        self.evicted.append(revision)
        return 1


@dataclass
class Sighting:
    """A published view, and how things stood at that very moment."""

    view: ReplicaView
    booked_bytes: int
    living_count: int


class Node:
    """A supervisor with its socket, and everything that it published."""

    def __init__(self, supervisor: Supervisor, address: str) -> None:
        self.supervisor = supervisor
        self.address = address
        self.sightings: list[Sighting] = []
        self._changed = asyncio.Event()

    @property
    def booked_bytes(self) -> int:
        return sum(use.booked_bytes for use in self.supervisor.view().devices)

    def see(self, outbox: Outbox) -> None:
        for message in outbox.take(is_load_due=True):
            if isinstance(message, ReplicaEvent):
                process = message.view.process
                count = len(living(process)) if process is not None else 0
                self.sightings.append(Sighting(message.view, self.booked_bytes, count))
        self._changed.set()

    def states(self, replica_id: str) -> list[ReplicaState]:
        """Returns the states that a replica went through, each once."""
        states: list[ReplicaState] = []
        for sighting in self.sightings:
            if sighting.view.replica_id == replica_id and sighting.view.state not in states[-1:]:
                states.append(sighting.view.state)
        return states

    def replica(self, replica_id: str) -> ReplicaView | None:
        views = {view.replica_id: view for view in self.supervisor.view().replicas}
        return views.get(replica_id)

    async def wait_state(self, replica_id: str, state: ReplicaState, *, seconds: float = WAIT_SECONDS) -> ReplicaView:
        """Returns the view with which a replica reached a state."""

        def found() -> ReplicaView | None:
            views = (s.view for s in self.sightings if s.view.replica_id == replica_id and s.view.state is state)
            return next(views, None)

        async with asyncio.timeout(seconds):
            while (view := found()) is None:
                self._changed.clear()
                await self._changed.wait()
        return view


@asynccontextmanager
async def running_node(
    folder: Path,
    *,
    launcher: Launcher,
    weights: Weights | None = None,
    rules: Rules = RULES,
    memory_bytes: int = 4 << 30,
    host_memory_bytes: int = 0,
    packed: Path | None = None,
    early: EarlyLoads | None = None,
) -> AsyncIterator[Node]:
    """Runs a supervisor for the block; its replicas live on after it, as after a crash."""
    socket = f"unix:{folder / 's.sock'}"

    def make_spec(view: ReplicaView, booking: Booking, *, model_path: str, traceparent: str) -> ReplicaSpec:
        order = view.order
        return ReplicaSpec(
            replica_id=order.replica_id,
            model=order.model,
            revision=order.revision,
            model_path=model_path,
            memory_bytes=order.memory_bytes,
            lease_id=view.lease_id,
            port=booking.port,
            supervisor_address=socket,
            created_at=order.created_at,
            traceparent=traceparent,
        )

    async with task_scope() as group:
        supervisor = Supervisor(
            replace(rules, packed_weights_directory=str(packed or "")),
            group=group,
            ledger=Ledger(
                [Device("cpu:0", DeviceKind.CPU, memory_bytes)],
                slot_count=8,
                base_port=0,
                pick_port=lambda taken: pick_free_port("127.0.0.1", taken),
            ),
            launcher=launcher,
            weights=weights or FakeWeights(),
            replica_list=ReplicaList(folder / "replicas.json", "this boot"),
            make_spec=make_spec,
            host_memory_bytes=host_memory_bytes,
        )
        supervisor.early = early
        node = Node(supervisor, socket)
        with supervisor.feed.subscribe(node.see):
            supervisor.recover()
            server = MeshServer(listen=socket, identity=None, policy={}, options=ServerOptions(drain_seconds=0.05))
            servicer = AttachServicer(supervisor, group=group, report_interval_seconds=0.05, orphan_seconds=60)
            add_SupervisorServiceServicer_to_server(servicer, server.grpc)
            async with server:
                yield node


class FakeProxySession:
    """One session as a proxy sees it."""

    def __init__(self, hello: fleet.Hello) -> None:
        self.hello = hello
        self.received: list[fleet.SessionRequest] = []
        self.commands: asyncio.Queue[fleet.Command | None] = asyncio.Queue()
        self.changed = asyncio.Event()

    def kinds(self) -> list[str]:
        return [str(request.WhichOneof("message")) for request in self.received]

    async def wait_for(self, is_met: Callable[[], Any]) -> None:
        """Waits until something holds, looking again at each message."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not is_met():
                self.changed.clear()
                await self.changed.wait()


class FakeProxy(FleetServiceServicer):
    """A proxy: takes hellos, remembers everything, sends the commands that a test puts into a session."""

    def __init__(self, *, interval_seconds: float = 0.05, is_silent: bool = False, reads: bool = True) -> None:
        self.interval_seconds = interval_seconds
        self.is_silent = is_silent
        self.reads = reads
        self.sessions: list[FakeProxySession] = []
        self.address = ""
        self.epoch = 0
        """By which it leads, as it says in welcomes and heartbeats."""
        self._joined = asyncio.Event()

    async def wait_session(self, count: int = 1) -> FakeProxySession:
        """Returns the latest session once there were ``count``."""
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.sessions) < count:
                self._joined.clear()
                await self._joined.wait()
        return self.sessions[-1]

    async def Session(
        self, request_iterator: AsyncIterator[fleet.SessionRequest], context: Any
    ) -> AsyncIterator[fleet.SessionResponse]:
        first = await anext(aiter(request_iterator))
        assert first.WhichOneof("message") == "hello"
        session = FakeProxySession(first.hello)
        self.sessions.append(session)
        self._joined.set()
        welcome = fleet.Welcome(proxy_id="fake", epoch=self.epoch)
        welcome.report_interval.FromMilliseconds(round(self.interval_seconds * 1000))
        yield fleet.SessionResponse(welcome=welcome)
        async with task_scope() as group:
            if self.reads:
                group.create_task(self._read(session, request_iterator))
            while True:
                try:
                    async with asyncio.timeout(None if self.is_silent else self.interval_seconds):
                        command = await session.commands.get()
                except TimeoutError:
                    yield fleet.SessionResponse(heartbeat=fleet.Heartbeat(epoch=self.epoch))
                    continue
                if command is None:
                    return
                yield fleet.SessionResponse(command=command)

    async def _read(self, session: FakeProxySession, requests: AsyncIterator[fleet.SessionRequest]) -> None:
        # grpcio raises what is private to it when the server stops meanwhile.
        with contextlib.suppress(grpc.aio.BaseError):
            async for request in requests:
                session.received.append(request)
                session.changed.set()


@asynccontextmanager
async def serving(proxy: FakeProxy, listen: str = "127.0.0.1:0") -> AsyncIterator[FakeProxy]:
    """Serves a fake proxy for the block."""
    server = MeshServer(listen=listen, identity=None, policy={}, options=ServerOptions(drain_seconds=0.05))
    add_FleetServiceServicer_to_server(proxy, server.grpc)
    async with server:
        proxy.address = server.address
        yield proxy
