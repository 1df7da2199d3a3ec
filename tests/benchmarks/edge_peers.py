"""What stands behind the edge while its latency is measured: a registry, a worker's session, and a replica that answers
at once. One process, so that the client's has nothing else to do: ``python -m tests.benchmarks.edge_peers DIRECTORY``.

The replica is in Python and takes a third of a millisecond, with and without Helios in front. The worker reports what
its replica served ten times a second, as a real one does, so that the proxy's account of requests is kept.
"""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import uvloop
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.mesh.identity import IdentityFiles
from helios.mesh.server import MeshServer, ServerOptions
from tests.proxy.fakes import FakeRegistry, FakeWorker

MODEL: Final = "m"
REGISTRY_SOCKET: Final = "registry.sock"
CONTROL_SOCKET: Final = "control.sock"
ADDRESS_FILE: Final = "replica.address"
ANSWER: Final = (
    b'{"id":"a","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"."}}]}'
)
REGISTRY_SERVICE: Final = "helios.api.registry.v1.RegistryService"
_REPORT_SECONDS: Final = 0.1
_WAIT_SECONDS: Final = 30.0


class QuickReplica(openai_service_pb2_grpc.OpenAIServiceServicer):
    """Answers every call with the same body, and remembers which it answered for the picker."""

    def __init__(self) -> None:
        self.served: list[str] = []

    async def CreateChatCompletion(self, request: HttpBody, context: Any) -> None:  # type: ignore[override]
        """Answers."""
        metadata = dict(context.invocation_metadata())
        if "x-helios-route-model" in metadata:
            self.served.append(str(metadata["x-request-id"]))
        await context.write(HttpBody(content_type="application/json", data=ANSWER))

    async def CreateCompletion(self, request: HttpBody, context: Any) -> AsyncIterator[HttpBody]:
        """Nobody asks."""
        raise NotImplementedError
        yield

    async def CreateEmbedding(self, request: HttpBody, context: Any) -> AsyncIterator[HttpBody]:
        """Nobody asks."""
        raise NotImplementedError
        yield


async def main(directory: Path) -> None:
    """Serves until standard input ends."""
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), gone.set)
    replica, registry = QuickReplica(), FakeRegistry()
    registry.put(MODEL)
    served = _server(directory, "worker", "127.0.0.1:0", is_checked=False)
    openai_service_pb2_grpc.add_OpenAIServiceServicer_to_server(replica, served.grpc)
    catalogue = _server(directory, "registry", f"unix:{directory}/{REGISTRY_SOCKET}", is_checked=True)
    add_RegistryServiceServicer_to_server(registry, catalogue.grpc)
    async with served, catalogue:
        _publish(directory / ADDRESS_FILE, served.address)
        async with asyncio.timeout(_WAIT_SECONDS):
            while not (directory / CONTROL_SOCKET).exists():
                await asyncio.sleep(0.02)
        worker = FakeWorker(address=lambda: served.address)
        async with worker.connected(f"unix:{directory}/{CONTROL_SOCKET}", _identity(directory, "worker")):
            gc.collect()
            gc.freeze()
            while not gone.is_set():
                await asyncio.sleep(_REPORT_SECONDS)
                _report(worker, replica)


def _report(worker: FakeWorker, replica: QuickReplica) -> None:
    served, replica.served = replica.served, []
    for replica_id in worker.replicas if served else ():
        worker.report(replica_id, started=served, finished=[(request_id, 0) for request_id in served])


def _server(directory: Path, component: str, listen: str, *, is_checked: bool) -> MeshServer:
    return MeshServer(
        listen=listen,
        identity=_identity(directory, component),
        policy={REGISTRY_SERVICE: frozenset({"proxy"})},
        options=ServerOptions(intercept=is_checked, drain_seconds=0.1),
    )


def _identity(directory: Path, component: str) -> IdentityFiles:
    return IdentityFiles(directory / "pki" / component)


def _publish(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
