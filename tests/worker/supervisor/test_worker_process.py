"""The whole worker as it runs: its process, launcher, replicas of the simulated engine, mTLS; killed and upgraded."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.api.fleet.v1 import types_pb2 as types
from helios.api.fleet.v1.fleet_service_pb2_grpc import add_FleetServiceServicer_to_server
from helios.api.storage.v1 import storage_service_pb2 as storage
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceServicer, add_StorageServiceServicer_to_server
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer, ServerOptions
from helios.worker.artifacts.asking import take
from helios.worker.artifacts.requests import COMPILE_CACHE, ArtifactRequest
from helios.worker.replica.packed_weights import begin_trial, has_failed
from helios.worker.supervisor.records import ProcessIdentity
from tests.worker.supervisor.fakes import REVISION, FakeProxy, FakeProxySession, living

# Two processes import gRPC on a busy machine.
START_SECONDS = 60.0
_CLOSING = ServerOptions(drain_seconds=0.05)


class FakeStorage(StorageServiceServicer):
    """Lends anything at once; remembers leases that were granted, resumed and released."""

    def __init__(self) -> None:
        self.granted: list[str] = []
        self.resumed: list[str] = []
        self.released: list[str] = []

    async def Materialize(
        self, request_iterator: AsyncIterator[storage.MaterializeRequest], context: Any
    ) -> AsyncIterator[storage.MaterializeResponse]:
        lease_id = ""
        async for request in request_iterator:
            match request.WhichOneof("message"):
                case "want":
                    lease_id = request.want.lease_id or f"lease-{len(self.granted)}"
                    (self.resumed if request.want.lease_id else self.granted).append(lease_id)
                    yield storage.MaterializeResponse(ready=storage.Ready(lease_id=lease_id, path="/weights"))
                case "renew":
                    yield storage.MaterializeResponse(renewed=storage.Renewed())
                case "release":
                    self.released.append(lease_id)
                    return

    async def Evict(self, request: storage.EvictRequest, context: Any) -> storage.EvictResponse:
        return storage.EvictResponse()

    async def GetResidency(self, request: storage.GetResidencyRequest, context: Any) -> storage.GetResidencyResponse:
        return storage.GetResidencyResponse()


@dataclass
class Mesh:
    """A proxy and a storage agent, and workers between them."""

    folder: Path
    proxy: FakeProxy
    proxy_address: str
    storage: FakeStorage
    storage_address: str
    fronts: list[int] = field(default_factory=list)

    @contextmanager
    def worker(self, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a worker for the block; one that is still there at its end is killed."""
        command = [
            *(sys.executable, "-m", "helios.worker", "--mesh.tls=files"),
            f"--mesh.identity-directory={self.folder / 'pki' / 'worker'}",
            f"--state-directory={self.folder / 'worker'}",
            f"--supervisor-listen=unix:{self.folder / 's.sock'}",
            f"--proxies={self.proxy_address}",
            f"--storage-target={self.storage_address}",
            "--replica.engine=simulated",
            f"--ready-file={self.folder / 'ready.json'}",
            *("--worker-id=w1", "--node=n1", "--slot-count=2", f"--device.memory-bytes={4 << 30}"),
            *flags,
        ]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()


@pytest.fixture
async def mesh(folder: Path) -> AsyncIterator[Mesh]:
    strangers = {child.pid for child in psutil.Process().children()}
    authority = CertificateAuthority.open(folder / "pki")
    for component in ("worker", "proxy", "storage"):
        authority.issue(component, folder / "pki" / component)

    def server(component: str, service: str) -> MeshServer:
        identity = IdentityFiles(folder / "pki" / component)
        policy = {service: frozenset({"worker"})}
        return MeshServer(listen="127.0.0.1:0", identity=identity, policy=policy, options=_CLOSING)

    proxy = FakeProxy(interval_seconds=0.1)
    agent = FakeStorage()  # type: ignore[abstract]  # the other calls are not made
    proxy_server = server("proxy", "helios.api.fleet.v1.FleetService")
    add_FleetServiceServicer_to_server(proxy, proxy_server.grpc)
    storage_server = server("storage", "helios.api.storage.v1.StorageService")
    add_StorageServiceServicer_to_server(agent, storage_server.grpc)
    async with proxy_server, storage_server:
        mesh = Mesh(folder, proxy, proxy_server.address, agent, storage_server.address)
        yield mesh
        # Shown where a test fails.
        print(mesh.log())
        await asyncio.to_thread(_reap_everything_but, strangers)


def _reap_everything_but(strangers: set[int]) -> None:
    """Waits for what a killed worker left to this process: its launcher ends by itself, replicas only when killed."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline + 5:
        children = [child for child in psutil.Process().children() if child.pid not in strangers]
        if not children:
            return
        for child in children:
            if time.monotonic() > deadline:
                child.kill()
            with suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.02)


def start_command(replica_id: str) -> fleet.Command:
    start = fleet.StartReplica(replica_id=replica_id, model="m", revision=REVISION, memory_bytes=1 << 30)
    return fleet.Command(command_id=f"start {replica_id}", start=start)


async def ready(session: FakeProxySession, replica_id: str) -> types.Replica:
    """Waits until a replica is ready and returns it."""

    def found() -> types.Replica | None:
        events = [request.replica_event.replica for request in session.received]
        own = [replica for replica in events if replica.replica_id == replica_id]
        assert not [replica for replica in own if replica.state == types.REPLICA_STATE_FAILED], own[-1]
        return next((replica for replica in own if replica.state == types.REPLICA_STATE_READY), None)

    async with asyncio.timeout(START_SECONDS):
        while (replica := found()) is None:
            session.changed.clear()
            await session.changed.wait()
    return replica


def read_metrics(ready_file: Path) -> dict[str, float]:
    address = json.loads(ready_file.read_text())["ops_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = str(response.read(), "utf-8").splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def front_of(replica: types.Replica) -> ProcessIdentity:
    ticks = int(Path(f"/proc/{replica.pid}/stat").read_text().rpartition(")")[2].split()[19])
    return ProcessIdentity(replica.pid, ticks)


async def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> int:
    process.send_signal(number)
    return await asyncio.to_thread(process.wait, 30)


async def test_a_worker_starts_a_replica_and_sigterm_drains_it_and_leaves_nothing(mesh: Mesh) -> None:
    door = mesh.folder / "s.sock.a"
    artifact = tried(mesh, "r1")
    # Nobody listens there: artifacts are not to be had, and that is all.
    with mesh.worker("--registry-target=127.0.0.1:1") as worker:
        session = await mesh.proxy.wait_session()
        assert (session.hello.worker_id, session.hello.slot_count) == ("w1", 2)
        # The default first, then what else is installed.
        assert list(session.hello.engines) == ["simulated", "vllm", "transformers", "custom"]
        session.commands.put_nowait(start_command("r1"))
        replica = await ready(session, "r1")
        front = front_of(replica)
        assert [phase.phase for phase in replica.phases][:2] == ["fetch", "fork"]
        metrics = await asyncio.to_thread(read_metrics, mesh.folder / "ready.json")
        assert metrics['helios_device_booked_bytes{device="cpu:0"}'] == 1 << 30
        assert metrics['helios_worker_replicas{state="READY"}'] == 1
        assert metrics['helios_worker_commands_total{command="start",outcome="accepted"}'] == 1
        assert door.stat().st_mode & 0o777 == 0o600
        wanted = ArtifactRequest(COMPILE_CACHE, "{}", REVISION, "r1")
        assert await asyncio.to_thread(take, str(door), wanted, timeout_seconds=10) is False
        assert await end(worker) == 0, mesh.log()
    assert not has_failed(artifact), "what ends as it was told says nothing of what it mapped"
    assert not door.exists()
    assert living(front) == []
    states = [r.replica_event.replica.state for r in session.received if r.WhichOneof("message") == "replica_event"]
    assert states[-2:] == [types.REPLICA_STATE_DRAINING, types.REPLICA_STATE_STOPPED]
    assert mesh.storage.released == mesh.storage.granted == ["lease-0"]
    assert json.loads((mesh.folder / "worker" / "replicas.json").read_text())["replicas"] == []


@pytest.mark.parametrize("how", ["killed", "upgraded"])
async def test_replicas_outlive_their_worker_and_the_next_one_adopts_them(mesh: Mesh, how: str) -> None:
    with mesh.worker("--on-stop=leave") as worker:
        session = await mesh.proxy.wait_session()
        session.commands.put_nowait(start_command("r1"))
        before = await ready(session, "r1")
        front = front_of(before)
        status = await end(worker, signal.SIGKILL if how == "killed" else signal.SIGTERM)
        assert status == (-signal.SIGKILL if how == "killed" else 0), mesh.log()
    assert living(front) == [front.pid]
    assert mesh.storage.released == []
    with mesh.worker() as worker:
        session = await mesh.proxy.wait_session(2)
        [after] = session.hello.replicas
        assert after.state == types.REPLICA_STATE_READY
        assert (after.pid, after.address, after.memory_bytes) == (before.pid, before.address, before.memory_bytes)
        assert session.hello.devices[0].booked_bytes == 1 << 30
        assert mesh.storage.resumed == ["lease-0"]
        # The start was answered by a worker that is gone; repeating it starts no second replica.
        session.commands.put_nowait(start_command("r1"))
        session.commands.put_nowait(start_command("r2"))
        await ready(session, "r2")
        assert await end(worker) == 0, mesh.log()
    assert living(front) == []
    assert sorted(mesh.storage.released) == ["lease-0", "lease-1"]


def tried(mesh: Mesh, replica_id: str) -> Path:
    """Returns packed weights that no start proved, and a replica maps."""
    artifact = mesh.folder / "worker" / "packed" / ("5" * 64)
    artifact.mkdir(parents=True)
    begin_trial(artifact, replica_id)
    assert has_failed(artifact)
    return artifact


async def test_a_replica_that_stops_answering_is_killed_and_reported_with_its_last_words(mesh: Mesh) -> None:
    artifact = tried(mesh, "r1")
    with mesh.worker("--replica.silence-seconds=1.5") as worker:
        session = await mesh.proxy.wait_session()
        session.commands.put_nowait(start_command("r1"))
        front = front_of(await ready(session, "r1"))
        # A replica without requests is not silent.
        await asyncio.sleep(2.5)
        told = [request.replica_event.replica for request in session.received if request.HasField("replica_event")]
        assert told[-1].state == types.REPLICA_STATE_READY
        os.kill(front.pid, signal.SIGSTOP)

        def failed() -> types.Replica | None:
            told = [request.replica_event.replica for request in session.received]
            return next((replica for replica in told if replica.state == types.REPLICA_STATE_FAILED), None)

        await session.wait_for(failed)
        replica = failed()
        assert replica is not None
        assert replica.failure.reason == "REPLICA_HUNG"
        assert replica.failure.message.startswith("the replica said nothing for 1.5 s\nthe last lines of its log:\n")
        assert "replica ready" in replica.failure.message
        assert not living(front), "a stopped process is killed, too"
        assert await end(worker) == 0
    assert has_failed(artifact), "what it mapped may be why"


async def test_a_launcher_that_dies_kills_no_replica_and_comes_back(mesh: Mesh) -> None:
    with mesh.worker() as worker:
        session = await mesh.proxy.wait_session()
        session.commands.put_nowait(start_command("r1"))
        first = await ready(session, "r1")
        [launcher] = [p for p in psutil.Process(worker.pid).children() if "helios.worker.launcher" in p.cmdline()]
        launcher.kill()
        # A fork that the launcher's death interrupts fails: whether there is a process, nobody knows.
        async with asyncio.timeout(START_SECONDS):
            while '"task": "launcher"' not in mesh.log():
                await asyncio.sleep(0.02)
        session.commands.put_nowait(start_command("r2"))
        await ready(session, "r2")
        os.kill(first.pid, signal.SIGKILL)

        def failed() -> bool:
            events = [r.replica_event.replica for r in session.received]
            return any(r.replica_id == "r1" and r.state == types.REPLICA_STATE_FAILED for r in events)

        await session.wait_for(failed)
        assert await end(worker) == 0, mesh.log()


async def test_a_second_worker_on_the_same_state_is_refused_and_the_first_serves_on(mesh: Mesh) -> None:
    with mesh.worker() as first:
        await mesh.proxy.wait_session()
        with mesh.worker() as second:
            assert await asyncio.to_thread(second.wait, START_SECONDS) == 1
        assert "another worker runs on" in mesh.log()
        assert first.poll() is None
        assert len(mesh.proxy.sessions) == 1
        assert await end(first) == 0


def test_wrong_settings_are_all_named(folder: Path) -> None:
    flags = ["--slot-count=9", "--on-stop=vanish", "--replica.kv-cache-bytes=0"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "helios.worker", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    for name in ("slot_count", "on_stop", "replica.kv_cache_bytes"):
        assert name in done.stderr
