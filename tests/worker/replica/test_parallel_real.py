"""Engines in several processes, on the real engine: the same tokens as in one, a core for each rank, one death for all.

A CPU has no second device, so ranks share the machine; what is shown is that they compute one answer together.
"""

import contextlib
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.worker.replica.settings import EngineSettings
from helios.worker.replica.spec import Placement
from tests.worker.replica.generated import make_llama, quantise
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica, wait_gone
from tests.worker.replica.test_replica_real import START_SECONDS, fork_real, read
from tests.worker.replica.test_settings_real import running

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PROMPTS = [
    "The capital of France is",
    "One two three four five six seven eight nine ten",
    "Water boils at one hundred degrees Celsius, and it freezes at zero degrees.",
]
Stub = openai_service_pb2_grpc.OpenAIServiceStub
CORES = tuple(sorted(os.sched_getaffinity(0)))


async def complete(replica: RunningReplica, **fields: Any) -> list[Any]:
    """Returns the greedy answers to PROMPTS."""
    answers = []
    async with replica.leaves.dial(replica.address) as dialer:
        for prompt in PROMPTS:
            document = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12} | fields
            body = HttpBody(content_type="application/json", data=orjson.dumps(document))
            call = dialer.stub(Stub).CreateCompletion(body, timeout=START_SECONDS, wait_for_ready=True)
            answers.append(orjson.loads((await read(call))[0].data)["choices"][0])
    return answers


def ranks_of(replica: RunningReplica) -> list[psutil.Process]:
    """Returns the processes that compute, which are below EngineCore."""
    front, *others = replica.tree()
    return [process for process in others if process.ppid() != front.pid and "Worker" in process.name()]


@pytest.mark.skipif(len(CORES) < 2, reason="two ranks want two cores")
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
async def test_two_ranks_give_the_tokens_of_one(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path, kind: str
) -> None:
    model, split = smollm2_directory, EngineSettings(dtype="float32", pipeline_parallel_size=2)
    if kind == "tensor":
        # The embedded model has nine heads.
        model = make_llama(tmp_path / "llama", smollm2_directory)
        split = EngineSettings(dtype="float32", tensor_parallel_size=2)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    changes: dict[str, Any] = {"kv_cache_bytes": 64 << 20, "max_context_tokens": 256}
    with running(launcher, leaves, tmp_path / "one", model, EngineSettings(dtype="float32"), **changes) as replica:
        expected = await complete(replica)
    changes["placement"] = Placement(engine_cores=CORES[:2])
    replica = fork_real(launcher, leaves, tmp_path / "two", model, settings=split, **changes)
    processes = replica.tree()
    try:
        assert [one["text"] for one in await complete(replica)] == [one["text"] for one in expected]
        processes, ranks = replica.tree(), ranks_of(replica)
        assert sorted(rank.cpu_affinity() for rank in ranks) == [[CORES[0]], [CORES[1]]]
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert launcher.wait_exit(replica.pid, 20).status != 0, "a rank that is lost is a replica that is lost"
    finally:
        for process in processes[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert wait_gone(processes, 10) == []


async def test_eight_bits_answer_like_sixteen(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    """A prompt's own log probabilities are compared: they need no luck with near ties."""
    scored, changes = {"max_tokens": 1, "echo": True, "logprobs": 1}, {"kv_cache_bytes": 64 << 20}
    small = quantise(smollm2_directory, tmp_path / "int8")
    assert sum(file.stat().st_size for file in small.iterdir()) < 0.75 * sum(
        file.stat().st_size for file in smollm2_directory.iterdir()
    )
    found = []
    for model in (smollm2_directory, small):
        directory = tmp_path / f"replica-{model.name}"
        directory.mkdir()
        with running(launcher, leaves, directory, model, EngineSettings(), **changes) as replica:
            found.append(await complete(replica, **scored))
    whole, rounded = (
        [value for one in answers for value in one["logprobs"]["token_logprobs"][1:]] for answers in found
    )
    assert len(whole) == len(rounded) > 20
    # Single tokens move; the text as a whole is as likely as before, which weights in a wrong order would not leave so.
    assert abs(sum(whole) - sum(rounded)) / len(whole) < 0.4
    assert statistics.correlation(whole, rounded) > 0.9
    assert "Paris" in found[1][0]["text"]
