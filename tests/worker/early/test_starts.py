"""Replicas that are forked before all of their weights is here, with real processes: what becomes of each."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helios.mesh.errors import DigestMismatch, HeliosError, Unavailable
from helios.mesh.transfer.progress import TransferProgress
from helios.storage.client import StorageClient
from helios.worker.early.loads import EarlyLoads
from helios.worker.supervisor.commands import Stop
from helios.worker.supervisor.process_tree import become_subreaper
from helios.worker.supervisor.records import ReplicaState, ReplicaView
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob
from tests.registry.test_chunk_index import weights as weights_of
from tests.storage.harness import agent_process, digest_of
from tests.storage.test_chunk_source import indexed_mesh
from tests.worker.early.test_loads import CONFIG, Playing
from tests.worker.supervisor.fakes import RULES, FakeLauncher, FakeWeights, Node, living, running_node, start_of

S = ReplicaState
CONTENT = weights_of(1)
SLOW_FETCH = replace(RULES, limits=replace(RULES.limits, fetch_seconds=60))


@dataclass
class Started:
    """A node with one replica that loads, the fetch of its revision held back."""

    node: Node
    agent: Playing
    weights: FakeWeights
    launcher: FakeLauncher
    loading: ReplicaView
    views: Path

    def end_fetch(self, error: HeliosError | None = None) -> None:
        """Ends the fetch: the revision is lent, or the error comes."""
        assert self.weights.gate is not None
        self.weights.error = error
        if error is None:
            self.agent.lend()
        self.weights.gate.set()


@asynccontextmanager
async def loading(folder: Path, behaviour: str = "normal") -> AsyncIterator[Started]:
    become_subreaper()
    agent = Playing(folder / "agent")
    weights = FakeWeights(gate=asyncio.Event(), path=str(folder / "agent" / "views"), coming=TransferProgress(1, 2))
    launcher = FakeLauncher(r1=behaviour)
    async with (
        EarlyLoads(folder / "early", folder / "d", agent) as early,
        running_node(folder, launcher=launcher, weights=weights, early=early, rules=SLOW_FETCH) as node,
    ):
        assert node.supervisor.execute("start", start_of("r1")).is_accepted
        agent.tell((0, 50))
        view = await node.wait_state("r1", S.LOADING)
        try:
            yield Started(node, agent, weights, launcher, view, folder / "early")
        finally:
            await node.supervisor.end_all(1)
        assert list((folder / "early").iterdir()) == []
        assert node.booked_bytes == 0


async def test_a_replica_is_forked_while_its_weights_come_and_ready_when_they_are_lent(folder: Path) -> None:
    async with loading(folder) as started:
        # It has said that it has loaded, and waits.
        await started.node.wait_state("r1", S.WARMING)
        (spec,) = started.launcher.specs
        assert (spec.early_door, spec.lease_id) == (str(folder / "d"), "")
        assert Path(spec.model_path, "config.json").exists()
        started.end_fetch()
        view = await started.node.wait_state("r1", S.READY)
        assert view.lease_id == "lease-0"
        assert Path(spec.model_path).resolve() == (folder / "agent" / "views" / spec.revision).resolve()
        assert [phase.phase for phase in view.phases] == ["fetch", "load", "report"]
        assert started.node.states("r1") == [S.FETCHING, S.LOADING, S.WARMING, S.READY]
    assert started.weights.released == ["lease-0"]


@pytest.mark.parametrize(
    "error", [DigestMismatch("other bytes"), Unavailable("no source", reason="SOURCE_UNAVAILABLE")], ids=str
)
async def test_a_fetch_that_fails_midway_ends_the_replica_with_its_reason(folder: Path, error: HeliosError) -> None:
    async with loading(folder) as started:
        view = await started.node.wait_state("r1", S.WARMING)
        assert view.process is not None
        started.end_fetch(error)
        view = await started.node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == error.reason
        assert view.process is not None
        assert living(view.process) == []
        assert S.READY not in started.node.states("r1")


async def test_a_replica_that_would_serve_before_its_weights_are_lent_is_killed(folder: Path) -> None:
    async with loading(folder, "hasty") as started:
        view = await started.node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "READY_UNLENT"
        assert S.READY not in started.node.states("r1")


async def test_a_stop_ends_a_replica_that_loads_and_leaves_no_lease(folder: Path) -> None:
    async with loading(folder) as started:
        await started.node.wait_state("r1", S.WARMING)
        started.node.supervisor.execute("stop", Stop("r1"))
        view = await started.node.wait_state("r1", S.STOPPED)
        assert view.process is not None
        assert living(view.process) == []
    assert started.weights.borrowed == []


async def test_a_supervisor_that_stops_leaves_no_replica_that_is_not_lent(folder: Path) -> None:
    async with loading(folder) as started:
        await started.node.wait_state("r1", S.WARMING)
        started.node.supervisor.write_list()
        assert '"r1"' not in (folder / "replicas.json").read_text()
        await started.node.supervisor.end_unlent()
        assert started.node.states("r1")[-1] is S.STOPPED


async def test_a_replica_whose_load_does_not_count_fails_before_it_is_ready(folder: Path) -> None:
    async with loading(folder) as started:
        load = started.node.supervisor.early
        assert load is not None
        await started.node.wait_state("r1", S.WARMING)
        load._loads["r1"].growth.note_loaded()
        started.agent.tell((0, 20), generation=2)
        async with asyncio.timeout(20):
            while load._loads["r1"].growth.counts:
                await asyncio.sleep(0.01)
        started.end_fetch()
        view = await started.node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "EARLY_BYTES_LOST"
        assert S.READY not in started.node.states("r1")


@pytest.mark.soak
async def test_an_agent_that_is_killed_midway_costs_the_overlap_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    gate = threading.Event()
    become_subreaper()
    # A tensor a range.
    flag = f"--fetch.chunk-bytes={1 << 20}"
    async with indexed_mesh(tmp_path, CONTENT) as mesh, agent_process(mesh, flag) as agent:
        with held_back(gate) as server:
            revision = mesh.shelf.add({"model.safetensors": CONTENT, "config.json": CONFIG})
            mesh.shelf.url = server.url.removesuffix("/blob")
            async with mesh.dial(agent.address) as dialer:
                storage, launcher = StorageClient(dialer), FakeLauncher()
                async with (
                    EarlyLoads(folder / "early", folder / "d", storage) as early,
                    running_node(folder, launcher=launcher, weights=storage, early=early, rules=SLOW_FETCH) as node,
                ):
                    assert node.supervisor.execute("start", start_of("r1", revision=revision)).is_accepted
                    await node.wait_state("r1", S.WARMING)
                    agent.kill()
                    await agent.start()
                    gate.set()
                    view = await node.wait_state("r1", S.READY)
                    assert view.lease_id
                    (spec,) = launcher.specs
                    assert Path(spec.model_path, "model.safetensors").read_bytes() == CONTENT
                    assert spec.early_door
                    await node.supervisor.end_all(1)


@contextmanager
def held_back(gate: threading.Event) -> Iterator[BlobServer]:
    """Serves the weights' second half when the gate opens."""

    def script(request: Request) -> Answer:
        if request.path.endswith(digest_of(CONTENT).hash) and request.first >= len(CONTENT) // 2:
            gate.wait(60)
        return Answer()

    with serve_blob(CONTENT, script=script, named={digest_of(CONFIG).hash: CONFIG}) as server:
        try:
            yield server
        finally:
            gate.set()
