"""Real compiled code on another node: torch's own cache in a few seconds, and in `make soak` vLLM on the real model."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.worker.artifacts.requests import COMPILE_CACHE
from helios.worker.replica.settings import Compilation, EngineSettings
from helios.worker.replica.spec import Placement
from tests.registry.tiny import write_model
from tests.worker.artifacts.nodes import Node, open_cluster
from tests.worker.replica.support import Launcher, Leaves, RunningReplica, make_spec, wait_gone
from tests.worker.replica.test_replica_real import body

# Compiles one function, prints what it gives and how often torch found it compiled.
PROGRAM = """
import torch, torch._dynamo.utils, json
@torch.compile
def f(x):
    return (x.sin() * 2).sum(dim=-1)
torch.set_num_threads(1)
total = float(f(torch.arange(64.0).reshape(8, 8)).sum())
counts = torch._dynamo.utils.counters["inductor"]
print(json.dumps([total, counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]]))
"""
COMPILE_SECONDS = 300.0


def run_torch(cache: Path) -> tuple[float, int, int]:
    # One thread: torch's pool of compiling processes would import torch once more for each core.
    own = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = dict(os.environ) | own  # noqa: TID251
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, hits, misses = json.loads(done.stdout)
    return total, hits, misses


@pytest.mark.slow
async def test_what_torch_compiled_on_one_node_it_finds_on_another(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, write_model(tmp_path / "model")) as cluster, cluster.node("first") as first:
        request = cluster.request("maker")
        made = await asyncio.to_thread(run_torch, first.path(request) / "inductor")
        assert made[1:] == (0, 1)
        first.keeper.note_proven(request)
        await first.wait_published(request)
        async with cluster.node("far/away/second") as second:
            assert await second.keeper.take(cluster.request("taker")) == ""
            state = second.shelf.state(request.key)
            assert await asyncio.to_thread(run_torch, second.path(request) / "inductor") == (made[0], 1, 0)
            # A hit writes nothing: so it can be told from an artifact that was of no use.
            assert second.shelf.state(request.key) == state


@pytest.mark.soak
@pytest.mark.real_model
async def test_what_vllm_compiled_on_one_node_spares_another_the_compiling(
    tmp_path: Path, smollm2_directory: Path
) -> None:
    """The model lies elsewhere, the state directory is another, and so are the cores."""
    leaves = Leaves.issue(tmp_path / "leaves")
    launcher = Launcher("vllm")
    try:
        async with open_cluster(tmp_path, smollm2_directory) as cluster:
            settings = EngineSettings(compilation=Compilation.COMPILED)
            common: dict[str, Any] = {"engine": "vllm", "revision": cluster.revision, "settings": settings}
            async with cluster.node("first") as first:
                cold = await start(launcher, leaves, first, Placement((0,)), **common)
                (artifact,) = [await first.client.find(COMPILE_CACHE, key) for key in compiled(first)]
                assert artifact is not None
                assert json.loads(artifact.inputs)["revision"] == cluster.revision
            async with cluster.node("second") as second:
                warm = await start(launcher, leaves, second, Placement((1,)), **common)
                assert compiled(second) == [artifact.key]
                eager = await start(launcher, leaves, second, Placement((1,)), is_eager=True, **common)
    finally:
        launcher.close()
    print({"cold": cold[1], "warm": warm[1], "eager": eager[1]})
    assert cold[0] == warm[0]
    assert warm[1]["compile"] < cold[1]["compile"] / 5
    assert warm[1]["fetch_artifact"] < 3
    # Nobody made it yet: that is asked for in next to no time.
    assert cold[1]["fetch_artifact"] < 1
    assert "fetch_artifact" not in eager[1]


def compiled(node: Node) -> list[str]:
    return [path.name for path in (node.directory / "compiled").iterdir()]


async def start(
    launcher: Launcher, leaves: Leaves, node: Node, placement: Placement, *, is_eager: bool = False, **values: Any
) -> tuple[list[bytes], dict[str, float]]:
    """Starts a replica on a node, has it answer, waits until what it made is published; returns answer and phases."""
    directory = node.directory / ("eager" if is_eager else "replica")
    directory.mkdir()
    if is_eager:
        values["settings"] = replace(values["settings"], compilation=Compilation.EAGER)
    holder: dict[str, Any] = {"holder": "test", "ttl_seconds": 60.0, "lease_id": None, "keep": False}
    async with node.agent.client.materialize(values["revision"], **holder) as lent:
        places = {"model_path": lent.path, "compile_cache_directory": str(node.directory / "compiled")}
        door = {"artifact_door": node.door, "artifact_seconds": 20.0}
        spec = make_spec(directory, leaves, placement=placement, ops_listen="", **values, **places, **door)
        forked = await asyncio.to_thread(launcher.fork, spec)
        replica = RunningReplica(launcher, leaves, spec, forked.pid, forked.start_ticks)
        processes = replica.tree()
        try:
            async with replica.supervisor() as supervisor:
                said = await supervisor.wait_heard(is_over, COMPILE_SECONDS)
                assert said.HasField("ready"), said
                answer = await ask(replica)
                heard = supervisor.heard
                timings = [phase for one in heard for phase in one.hello.replica.phases]
                timings += [one.progress.phase for one in heard if one.progress.HasField("phase")]
                if not is_eager:
                    (key,) = compiled(node)
                    async with asyncio.timeout(20):
                        while await node.client.find(COMPILE_CACHE, key) is None:
                            await asyncio.sleep(0.1)
        finally:
            os.kill(replica.pid, 15)
            await asyncio.to_thread(launcher.wait_exit, replica.pid, 30)
            assert wait_gone(processes, 5) == []
    return answer, {phase.phase: phase.duration.ToNanoseconds() / 1e9 for phase in timings}


def is_over(said: Any) -> bool:
    return said.WhichOneof("message") in {"ready", "failed"}


async def ask(replica: RunningReplica) -> list[bytes]:
    async with replica.leaves.dial(replica.address) as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        answers = [one async for one in stub.CreateChatCompletion(body(max_tokens=48), timeout=60)]
    return [orjson.dumps(choice["message"]) for one in answers for choice in orjson.loads(one.data)["choices"]]
