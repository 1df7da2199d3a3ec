"""A real engine loads its weights while a real storage agent fetches them, from a source that holds their end back."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.mesh.channel import Dialer
from helios.storage.manifest import ManifestEntry
from helios.worker.early.loads import EarlyLoads
from helios.worker.launcher.client import ForkedReplica
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor.commands import Stop
from helios.worker.supervisor.records import ReplicaState, ReplicaView
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob
from tests.storage.harness import entry_of
from tests.storage.test_chunk_source import indexed_mesh
from tests.worker.replica.support import MODEL, Launcher
from tests.worker.replica.test_replica_real import START_SECONDS, body, read
from tests.worker.supervisor.fakes import RULES, Node, running_node, start_of

FILE = "model.safetensors"
HELD_BYTES = 32 << 20
"""The last tensors: some of a layer, and the norm after all of them."""
TOKENS = 24
PATIENT = replace(RULES, limits=replace(RULES.limits, fetch_seconds=START_SECONDS, start_seconds=START_SECONDS))


@dataclass(frozen=True)
class Forks:
    """The launcher that all tests share, as a supervisor has it."""

    launcher: Launcher

    async def fork(self, spec: ReplicaSpec, deadline: float) -> ForkedReplica:
        del deadline
        forked = await asyncio.to_thread(self.launcher.fork, spec)
        return ForkedReplica(forked.pid, forked.start_ticks)


@contextmanager
def held_back(files: dict[str, bytes], entries: list[ManifestEntry], gate: threading.Event) -> Iterator[BlobServer]:
    """Serves all but the last bytes of the weights; those when the gate opens."""
    (weights,) = (entry.digest for entry in entries if entry.path == FILE)

    def script(request: Request) -> Answer:
        if request.path.endswith(weights.hash) and request.last >= weights.size_bytes - HELD_BYTES:
            gate.wait(START_SECONDS)
        return Answer()

    named = {entry.digest.hash: files[entry.path] for entry in entries}
    with serve_blob(files[FILE], script=script, named=named) as server:
        try:
            yield server
        finally:
            gate.set()


@asynccontextmanager
async def fetching_node(folder: Path, launcher: Launcher, model: Path, gate: threading.Event) -> AsyncIterator[Any]:
    """A supervisor and a storage agent that has nothing yet; gives them with the model's revision."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    async with indexed_mesh(folder, *files.values()) as mesh, mesh.agent() as agent:
        # Once: the weights are hashed for a second, and the registry's own copy is read by nobody.
        entries = [entry_of(path, content) for path, content in files.items()]
        with held_back(files, entries, gate) as server:
            revision = mesh.shelf.add_entries(entries)
            mesh.shelf.url = server.url.removesuffix("/blob")
            async with (
                EarlyLoads(folder / "early", folder / "e", agent.client) as early,
                running_node(
                    folder, launcher=Forks(launcher), weights=agent.client, early=early, rules=PATIENT
                ) as node,
            ):
                try:
                    yield node, revision
                finally:
                    await node.supervisor.end_all(5)


async def ask(view: ReplicaView, **fields: Any) -> Any:
    """Asks a replica, greedily, and returns its answer."""
    async with Dialer(view.address, identity=None, peer="worker") as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        call = stub.CreateChatCompletion(body(**fields), timeout=START_SECONDS, wait_for_ready=True)
        (answer,) = await read(call)
    return orjson.loads(answer.data)


async def answer_of(view: ReplicaView) -> list[tuple[str, float]]:
    """Returns greedy tokens with their log probabilities, which show a difference long before tokens do."""
    answer = await ask(view, logprobs=True, max_tokens=TOKENS, ignore_eos=True)
    return [(entry["token"], entry["logprob"]) for entry in answer["choices"][0]["logprobs"]["content"]]


async def start(node: Node, replica_id: str, revision: str) -> None:
    started = node.supervisor.execute(replica_id, start_of(replica_id, model=MODEL, revision=revision))
    assert started.is_accepted, started


async def wait_loading(node: Node, replica_id: str) -> ReplicaView:
    """Waits until a replica's engine has been built, so that it loads."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            view = node.replica(replica_id)
            assert view is not None, [sighting.view.failure for sighting in node.sightings]
            if any(phase.phase == "engine" for phase in view.phases):
                return view
            await asyncio.sleep(0.02)


async def test_a_replica_loads_while_its_weights_come_and_answers_as_one_that_loaded_them_whole(
    launcher: Launcher, tmp_path: Path, smollm2_directory: Path
) -> None:
    gate = threading.Event()
    async with fetching_node(tmp_path, launcher, smollm2_directory, gate) as (node, revision):
        await start(node, "early", revision)
        view = await wait_loading(node, "early")
        # Not until the gate is open can the fetch end, and nothing is lent, let alone ready, before that.
        assert (view.state, view.lease_id) == (ReplicaState.LOADING, "")
        assert view.fetch is not None
        assert view.fetch.done_bytes < view.fetch.total_bytes
        gate.set()
        early = await node.wait_state("early", ReplicaState.READY, seconds=START_SECONDS)
        assert early.lease_id
        seconds = {phase.phase: phase.seconds for phase in early.phases}
        assert list(seconds)[:2] == ["fetch", "fork"]
        assert {"await_bytes", "load", "report"} <= seconds.keys()
        answer = await answer_of(early)
        node.supervisor.execute("stop", Stop("early"))
        await node.wait_state("early", ReplicaState.STOPPED)
        await start(node, "whole", revision)
        whole = await node.wait_state("whole", ReplicaState.READY, seconds=START_SECONDS)
        assert not {"await_bytes", "commit"} & {phase.phase for phase in whole.phases}
        assert answer == await answer_of(whole)
