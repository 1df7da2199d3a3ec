"""What tests of launchers and replicas share: a launcher without an event loop, a recording supervisor, specs."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from google.protobuf.duration_pb2 import Duration

from helios.api.worker.v1 import supervisor_service_pb2 as pb
from helios.api.worker.v1 import supervisor_service_pb2_grpc
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer
from helios.worker.launcher.client import launcher_environment
from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, Ready, encode
from helios.worker.replica.spec import ReplicaSpec
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
SOURCE_ROOTS = ("proxy", "worker", "storage", "registry", "mesh", "gen")
REVISION = "sha256:" + "5" * 64
MODEL = "smollm2-135m-instruct"
# Importing torch and vLLM takes ten seconds on a quiet machine.
LAUNCH_SECONDS = 120.0
SUPERVISOR_SERVICE = "helios.api.worker.v1.SupervisorService"


def source_path() -> str:
    """Returns PYTHONPATH for a child that runs from the sources."""
    return os.pathsep.join(str(ROOT / name) for name in SOURCE_ROOTS)


class Launcher:
    """A launcher driven by blocking calls, so that it can outlive the event loop of one test."""

    def __init__(self, engine: str) -> None:
        ours, theirs = socket.socketpair()
        environment = launcher_environment(os.environ) | {"PYTHONPATH": source_path()}  # noqa: TID251
        command = [sys.executable, "-m", "helios.worker.launcher", "--control-fd", str(theirs.fileno())]
        self.process = subprocess.Popen([*command, "--engine", engine], pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._socket = ours
        self._decoder = Decoder()
        self._inbox: list[Message] = []
        self._number = 0
        self.ready = self._take(lambda message: isinstance(message, Ready), LAUNCH_SECONDS)

    def fork(self, spec: ReplicaSpec) -> Forked:
        """Forks a replica."""
        self._number += 1
        self._socket.sendall(encode(Fork(self._number, spec.to_document(), time.monotonic_ns())))
        forked = self._take(lambda message: getattr(message, "number", 0) == self._number, 10)
        assert isinstance(forked, Forked), forked
        return forked

    def wait_exit(self, pid: int, seconds: float) -> Exited:
        """Waits until the launcher reports the exit of a replica."""
        exited = self._take(lambda message: isinstance(message, Exited) and message.pid == pid, seconds)
        assert isinstance(exited, Exited)
        return exited

    def close(self) -> None:
        """Ends the launcher; replicas live on."""
        self._socket.close()
        self.process.wait(10)

    def _take(self, is_wanted: Callable[[Message], bool], seconds: float) -> Message:
        deadline = time.monotonic() + seconds
        while True:
            for message in self._inbox:
                if is_wanted(message):
                    self._inbox.remove(message)
                    return message
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = self._socket.recv(65536)
            assert data, "the launcher ended"
            self._inbox += self._decoder.feed(data)


@dataclass(frozen=True)
class Leaves:
    """Certificates of every component, from one CA."""

    directory: Path

    @classmethod
    def issue(cls, directory: Path) -> Self:
        authority = CertificateAuthority.open(directory)
        for component in ("worker", "edge", "proxy", "storage", "relay"):
            authority.issue(component, directory / component)
        return cls(directory)

    def files(self, component: str) -> IdentityFiles:
        return IdentityFiles(self.directory / component)

    def dial(self, address: str, *, as_component: str = "edge") -> Dialer:
        """Dials a replica."""
        return Dialer(address, identity=self.files(as_component), peer="worker")


@dataclass(frozen=True)
class RunningReplica:
    """A replica and how to reach it."""

    launcher: Launcher
    leaves: Leaves
    spec: ReplicaSpec
    pid: int
    start_ticks: int

    @property
    def address(self) -> str:
        return f"{self.spec.host}:{self.spec.port}"

    @property
    def socket_path(self) -> Path:
        return Path(self.spec.supervisor_address.removeprefix("unix:"))

    def tree(self) -> list[psutil.Process]:
        """Returns the front and everything below it; a replica that ended fails the test with its last words."""
        try:
            front = psutil.Process(self.pid)
        except psutil.NoSuchProcess as error:
            raise AssertionError(f"the replica is gone; the end of its log:\n{self.log_or_empty()[-4000:]}") from error
        return [front, *front.children(recursive=True)]

    def supervisor(self) -> "RecordingSupervisor":
        """Returns a supervisor on the socket that the replica dials."""
        return RecordingSupervisor(self.spec.supervisor_address, self.leaves.files("worker"))

    def log_or_empty(self) -> str:
        path = Path(self.spec.log_path)
        return path.read_text() if path.exists() else ""


def make_spec(directory: Path, leaves: Leaves, **changes: Any) -> ReplicaSpec:
    """Returns a spec whose files are in ``directory``; the port is free now."""
    values: dict[str, Any] = {
        "replica_id": f"replica-{directory.name}",
        "model": MODEL,
        "served_names": ("smollm2",),
        "revision": REVISION,
        "model_path": str(directory),
        "engine": "simulated",
        "memory_bytes": 123,
        "lease_id": "lease-1",
        "port": free_port(),
        "supervisor_address": f"unix:{directory}/s",
        "identity_directory": str(leaves.directory / "worker"),
        "log_path": str(directory / "replica.log"),
        "created_at": datetime.now(UTC),
        "orphan_seconds": 60.0,
        "drain_seconds": 5.0,
    }
    return ReplicaSpec(**(values | changes))


def wait_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Returns those of ``processes`` that are still there after ``seconds``; zombies count as gone."""
    deadline = time.monotonic() + seconds
    while True:
        alive = [process for process in processes if _is_alive(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class RecordingSupervisor(supervisor_service_pb2_grpc.SupervisorServiceServicer):
    """Records what a replica says; ``say`` answers it."""

    address: str
    identity: IdentityFiles
    heard: list[pb.AttachRequest] = field(default_factory=list)
    orphan_seconds: float = 60.0
    _answers: "asyncio.Queue[pb.AttachResponse]" = field(default_factory=asyncio.Queue)
    _heard_more: asyncio.Event = field(default_factory=asyncio.Event)
    _server: MeshServer | None = None

    async def __aenter__(self) -> Self:
        policy = {SUPERVISOR_SERVICE: frozenset({"worker"})}
        self._server = MeshServer(listen=self.address, identity=self.identity, policy=policy)
        supervisor_service_pb2_grpc.add_SupervisorServiceServicer_to_server(self, self._server.grpc)
        self._server.serve(SUPERVISOR_SERVICE)
        await self._server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self._server.drain(0)

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        del context
        self._hear(await anext(aiter(request_iterator)))
        report, orphan = Duration(nanos=10_000_000), Duration(seconds=int(self.orphan_seconds))
        yield pb.AttachResponse(welcome=pb.ReplicaWelcome(report_interval=report, orphan_timeout=orphan))
        async with asyncio.TaskGroup() as group:
            listener = group.create_task(self._listen(request_iterator))
            try:
                while True:
                    yield await self._answers.get()
            finally:
                listener.cancel()

    def say(self, response: pb.AttachResponse) -> None:
        self._answers.put_nowait(response)

    async def wait_heard(self, is_wanted: Callable[[pb.AttachRequest], Any], seconds: float = 10.0) -> pb.AttachRequest:
        """Waits until the replica has said something; what it said before counts."""
        async with asyncio.timeout(seconds):
            while True:
                for request in self.heard:
                    if is_wanted(request):
                        return request
                self._heard_more.clear()
                await self._heard_more.wait()

    async def _listen(self, requests: AsyncIterator[pb.AttachRequest]) -> None:
        async for request in requests:
            self._hear(request)

    def _hear(self, request: pb.AttachRequest) -> None:
        self.heard.append(request)
        self._heard_more.set()
