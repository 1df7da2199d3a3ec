"""What stands behind the edge while it is measured: a registry, workers' sessions, and replicas that answer at once.

``python -m tests.benchmarks.edge_peers DIRECTORY`` reads what is wanted from `peers.json` there, and writes what there
is to `addresses.json`. The replicas are one process in C (`native/worker.c`), whose account of requests a worker's
session reports ten times a second, as a real one does: the proxy's ledger, journal and usage are kept as they would be.
"""

import asyncio
import gc
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvloop

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.registry.v1 import cordon_service_pb2 as cordon_pb
from helios.api.registry.v1 import key_service_pb2 as key_pb
from helios.api.registry.v1.cordon_service_pb2_grpc import CordonServiceServicer, add_CordonServiceServicer_to_server
from helios.api.registry.v1.key_service_pb2_grpc import KeyServiceServicer, add_KeyServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.api.registry.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from helios.mesh.identity import IdentityFiles
from helios.mesh.server import MeshServer, ServerOptions
from tests.proxy.fakes import READY, FakeRegistry, FakeUsage, FakeWorker

REGISTRY_SOCKET: Final = "registry.sock"
CONTROL_SOCKET: Final = "control.sock"
WANTED_FILE: Final = "peers.json"
ADDRESS_FILE: Final = "addresses.json"
# Those that a proxy watches: where one is not there, it is asked for again and again.
REGISTRY_SERVICES: Final = tuple(
    f"helios.api.registry.v1.{name}Service" for name in ("Registry", "Key", "Cordon", "Usage")
)
_REPORT_SECONDS: Final = 0.1
_WAIT_SECONDS: Final = 30.0
_REVISION: Final = "sha256:1"
_GIB: Final = 1 << 30


class Wanted(NamedTuple):
    """What is to be there: ready replicas by model, plain HTTP servers, and workers at rest, of one model each. All
    over mTLS, or all in the clear, as where sidecars see to it.
    """

    program: str
    models: dict[str, int]
    http_count: int = 0
    resting_count: int = 0
    has_tls: bool = True


class Peers:
    """The replicas' process, and what the worker's session says of it."""

    def __init__(self, process: asyncio.subprocess.Process, addresses: list[str], models: dict[str, int]) -> None:
        names = [model for model, count in models.items() for _ in range(count)]
        self.worker = FakeWorker(memory_bytes=1024 * _GIB, beat_seconds=1.0)
        self.replica_ids = [f"replica-{number}" for number in range(len(names))]
        for replica_id, model, address in zip(self.replica_ids, names, addresses, strict=True):
            self.worker.replicas[replica_id] = ready_replica(replica_id, model, address)
        self._process = process
        self._rest = b""

    async def report(self) -> None:
        """Tells of calls, until the replicas end."""
        assert self._process.stdout is not None
        while data := await self._process.stdout.read(1 << 20):
            lines = (self._rest + data).split(b"\n")
            self._rest = lines.pop()
            deltas: dict[int, types_pb2.LoadDelta] = {}
            for line in lines:
                what, number, request_id = line.decode().split()
                delta = deltas.setdefault(int(number), types_pb2.LoadDelta(replica_id=self.replica_ids[int(number)]))
                getattr(delta, what).add(request_id=request_id)
            self.worker.say(load=fleet_pb.LoadReport(deltas=deltas.values()))
            await asyncio.sleep(_REPORT_SECONDS)


def ready_replica(replica_id: str, model: str, address: str) -> types_pb2.Replica:
    """A replica that has been ready for a while."""
    return types_pb2.Replica(
        replica_id=replica_id,
        model=model,
        revision=_REVISION,
        state=READY,
        address=address,
        memory_bytes=_GIB,
        max_context_tokens=2048,
    )


class NoKeys(KeyServiceServicer):
    """There are none, and none come."""

    async def WatchKeys(self, request: Any, context: Any) -> Any:
        yield key_pb.WatchKeysResponse()
        await asyncio.Event().wait()

    async def _unused(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    CreateKey = ListKeys = RevokeKey = _unused


class NoCordons(CordonServiceServicer):
    """There are none, and none come."""

    async def WatchCordons(self, request: Any, context: Any) -> Any:
        yield cordon_pb.WatchCordonsResponse()
        await asyncio.Event().wait()

    async def SetCordon(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


async def main(directory: Path) -> None:
    """Serves until standard input ends."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), gone.set)
    wanted = Wanted(**json.loads((directory / WANTED_FILE).read_text()))
    registry = FakeRegistry()
    for model, count in wanted.models.items():
        registry.put(model, revision=_REVISION, min_replicas=count)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_registry(directory, registry, _identity(directory, "registry", wanted)))
        process, ports = await _replicas(directory, wanted)
        stack.callback(process.kill)
        addresses = [f"127.0.0.1:{port}" for port in ports]
        peers = Peers(process, addresses[wanted.http_count :], wanted.models)
        _publish(directory / ADDRESS_FILE, json.dumps(addresses))
        async with asyncio.timeout(_WAIT_SECONDS):
            while not (directory / CONTROL_SOCKET).exists():
                await asyncio.sleep(0.02)
        for worker in (peers.worker, *_resting(registry, wanted.resting_count)):
            session = worker.connected(f"unix:{directory}/{CONTROL_SOCKET}", _identity(directory, "worker", wanted))
            await stack.enter_async_context(session)
        gc.collect()
        gc.freeze()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        reporting = group.create_task(peers.report())
        await gone.wait()
        reporting.cancel()


def _resting(registry: FakeRegistry, count: int) -> list[FakeWorker]:
    """Workers with one ready replica of a model of their own, which nobody asks for."""
    workers = []
    for number in range(count):
        registry.put(f"resting-{number}", revision=_REVISION, min_replicas=1)
        worker = FakeWorker(worker_id=f"resting-{number}", beat_seconds=1.0)
        # Nobody connects: the addresses are in a network for documentation.
        replica = ready_replica(f"resting-replica-{number}", f"resting-{number}", f"192.0.2.{number + 1}:8000")
        worker.replicas[replica.replica_id] = replica
        workers.append(worker)
    return workers


async def _replicas(directory: Path, wanted: Wanted) -> tuple[asyncio.subprocess.Process, list[int]]:
    identity = _identity(directory, "worker", wanted)
    files = (identity.certificate, identity.key, identity.ca) if identity is not None else ("-", "-", "-")
    counts = (str(wanted.http_count), str(sum(wanted.models.values())))
    process = await asyncio.create_subprocess_exec(
        wanted.program,
        *map(str, files),
        *counts,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 22,
    )
    assert process.stdout is not None
    async with asyncio.timeout(_WAIT_SECONDS):
        return process, [int(port) for port in (await process.stdout.readline()).split()]


def _registry(directory: Path, registry: FakeRegistry, identity: IdentityFiles | None) -> MeshServer:
    server = MeshServer(
        listen=f"unix:{directory}/{REGISTRY_SOCKET}",
        identity=identity,
        policy=dict.fromkeys(REGISTRY_SERVICES, frozenset({"proxy"})),
        options=ServerOptions(drain_seconds=0.1),
    )
    add_RegistryServiceServicer_to_server(registry, server.grpc)
    add_KeyServiceServicer_to_server(NoKeys(), server.grpc)
    add_CordonServiceServicer_to_server(NoCordons(), server.grpc)
    add_UsageServiceServicer_to_server(FakeUsage(), server.grpc)
    return server


def _identity(directory: Path, component: str, wanted: Wanted) -> IdentityFiles | None:
    return IdentityFiles(directory / "pki" / component) if wanted.has_tls else None


def _publish(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_wanted(directory: Path, **wanted: Any) -> None:
    """Says what is to be there; the fields are `Wanted`'s."""
    (directory / WANTED_FILE).write_text(json.dumps(Wanted(**wanted)._asdict()))


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
