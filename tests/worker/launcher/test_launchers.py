"""Launchers of several engines, and whole replicas of users' classes and of transformers, asked over mTLS."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import psutil
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.mesh.errors import Bug, InvalidRequest
from helios.mesh.status import error_from_rpc
from helios.worker.launcher import launchers as launchers_module
from helios.worker.launcher.client import ForkedReplica
from helios.worker.launcher.launchers import Launchers, installed_packages
from helios.worker.replica.spec import ReplicaSpec
from tests.worker.replica.support import MODEL, Leaves, RecordingSupervisor, make_spec, source_path, wait_gone

START_SECONDS = 120.0
CLASS = """
import litserve as ls


class Shouting(ls.LitAPI):
    def setup(self, device):
        self.mark = "!"

    def decode_request(self, request):
        if "messages" not in request:
            raise ValueError("only conversations")
        return request["messages"][-1]["content"]

    def predict(self, text):
        for word in text.split():
            yield word.upper() + self.mark + " "

    def encode_response(self, parts):
        yield from parts


class Empty(Shouting):
    def setup(self, device):
        raise FileNotFoundError("weights.bin")
"""


@pytest.fixture
def leaves(tmp_path: Path) -> Leaves:
    return Leaves.issue(tmp_path / "pki")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A directory with a user's module."""
    directory = tmp_path / "engines"
    directory.mkdir()
    (directory / "shouting.py").write_text(CLASS)
    return directory


@pytest.fixture
async def launchers(classes: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Launchers]:
    monkeypatch.setenv("PYTHONPATH", source_path())
    async with Launchers(search_path=(str(classes),)) as running:
        yield running


def deadline() -> float:
    return time.monotonic() + START_SECONDS


def spec_of(folder: Path, leaves: Leaves, **changes: Any) -> ReplicaSpec:
    folder.mkdir(exist_ok=True)
    return make_spec(folder, leaves, **{"supervisor_address": "", **changes})


def shouting(folder: Path, leaves: Leaves, name: str = "Shouting", **changes: Any) -> ReplicaSpec:
    options = {"class": f"shouting:{name}", "stream": "true"}
    return spec_of(folder, leaves, engine="custom", options=options, **changes)


async def chat(leaves: Leaves, spec: ReplicaSpec, text: str, **fields: Any) -> list[HttpBody]:
    document = {"model": MODEL, "messages": [{"role": "user", "content": text}]} | fields
    body = HttpBody(content_type="application/json", data=orjson.dumps(document))
    async with leaves.dial(f"{spec.host}:{spec.port}") as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        call = stub.CreateChatCompletion(body, timeout=START_SECONDS, wait_for_ready=True)
        return [message async for message in call]


async def typed(leaves: Leaves, spec: ReplicaSpec, request: pb.CompleteRequest | pb.ChatRequest) -> list[Any]:
    async with leaves.dial(f"{spec.host}:{spec.port}") as dialer:
        stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        method: Any = stub.Complete if isinstance(request, pb.CompleteRequest) else stub.Chat
        return [response async for response in method(request, timeout=START_SECONDS, wait_for_ready=True)]


async def end(launchers: Launchers, *replicas: ForkedReplica) -> None:
    """Ends replicas as their supervisor does, and sees that nothing is left."""
    processes = [psutil.Process(replica.pid) for replica in replicas]
    for replica in replicas:
        os.kill(replica.pid, signal.SIGTERM)
    async with asyncio.timeout(20):
        assert {(await launchers.exits.get()).status for _ in replicas} == {0}
    assert wait_gone(processes, 5) == []


async def test_each_engine_has_a_launcher_of_its_own(launchers: Launchers, tmp_path: Path, leaves: Leaves) -> None:
    first, second = spec_of(tmp_path / "a", leaves), spec_of(tmp_path / "b", leaves)
    custom = shouting(tmp_path / "c", leaves)
    replicas = [await launchers.fork(spec, deadline()) for spec in (first, second, custom)]
    parents = [psutil.Process(replica.pid).ppid() for replica in replicas]
    assert parents[0] == parents[1] != parents[2]
    (answer,) = await chat(leaves, first, "one two", max_tokens=3)
    assert orjson.loads(answer.data)["choices"][0]["message"]["content"] == "one two one "
    (answer,) = await chat(leaves, custom, "hello there")
    document = orjson.loads(answer.data)
    assert (document["model"], document["choices"][0]["message"]["content"]) == (MODEL, "HELLO! THERE! ")
    messages = await chat(leaves, custom, "hello there", stream=True)
    blocks = b"".join(message.data for message in messages).decode().removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    parts = [orjson.loads(block[6:])["choices"][0]["delta"].get("content") for block in blocks[:-1]]
    assert [part for part in parts if part] == ["HELLO! ", "THERE! "]
    *deltas, last = await typed(
        leaves,
        custom,
        pb.ChatRequest(model=MODEL, messages=[pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="by wire")]),
    )
    assert "".join(response.delta.text for response in deltas) == "BY! WIRE! "
    assert last.finished.choices[0].reason == pb.FINISH_REASON_STOP
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await typed(leaves, custom, pb.CompleteRequest(model=MODEL, text="no conversation"))
    error = error_from_rpc(caught.value)
    assert isinstance(error, Bug)
    assert "decode_request of the model's class raised ValueError: only conversations" in error.message
    await end(launchers, *replicas)


async def test_a_class_that_can_not_be_set_up_fails_the_start_with_its_words(
    launchers: Launchers, tmp_path: Path, leaves: Leaves
) -> None:
    spec = shouting(tmp_path / "c", leaves, "Empty", supervisor_address=f"unix:{tmp_path}/s")
    async with RecordingSupervisor(spec.supervisor_address, leaves.files("worker")) as supervisor:
        await launchers.fork(spec, deadline())
        said = await supervisor.wait_heard(
            lambda said: said.HasField("failed") or said.hello.replica.HasField("failure"), START_SECONDS
        )
        failure = said.failed if said.HasField("failed") else said.hello.replica.failure
        async with asyncio.timeout(20):
            assert (await launchers.exits.get()).status == 1
    assert failure.reason == "CUSTOM_CODE_FAILED"
    assert "setup of the model's class raised FileNotFoundError: weights.bin" in failure.message


async def test_a_launcher_is_replaced_when_packages_changed_and_its_replicas_live_on(
    launchers: Launchers, tmp_path: Path, leaves: Leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = spec_of(tmp_path / "a", leaves), spec_of(tmp_path / "b", leaves)
    one = await launchers.fork(first, deadline())
    monkeypatch.setattr(launchers_module, "installed_packages", lambda: installed_packages() | {"new-1.0.dist-info"})
    two = await launchers.fork(second, deadline())
    await chat(leaves, second, "new")
    (answer,) = await chat(leaves, first, "still here", max_tokens=2)
    assert orjson.loads(answer.data)["choices"][0]["message"]["content"] == "still here "
    parents = [psutil.Process(replica.pid).ppid() for replica in (one, two)]
    assert parents[0] != parents[1]
    # The first one's launcher is gone, and with it who would tell of its exit.
    psutil.Process(one.pid).kill()
    await end(launchers, two)


async def test_launchers_that_nobody_used_for_long_end_and_their_replicas_live_on(
    tmp_path: Path, leaves: Leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", source_path())
    async with Launchers(idle_seconds=900, lasting=frozenset({"custom"})) as launchers:
        await launchers.wait_ready("custom")
        spec = spec_of(tmp_path / "a", leaves)
        replica = await launchers.fork(spec, deadline())
        idle = psutil.Process(psutil.Process(replica.pid).ppid())
        launchers.end_idle(time.monotonic() + 600)
        await asyncio.sleep(0.1)
        assert idle.is_running()
        launchers.end_idle(time.monotonic() + 901)
        async with asyncio.timeout(20):
            while idle.is_running():
                await asyncio.sleep(0.02)
        (answer,) = await chat(leaves, spec, "still here", max_tokens=2)
        assert orjson.loads(answer.data)["choices"][0]["message"]["content"] == "still here "
        psutil.Process(replica.pid).kill()
        second = spec_of(tmp_path / "b", leaves)
        following = await launchers.fork(second, deadline())
        await chat(leaves, second, "up")
        await end(launchers, following)


@pytest.mark.real_model
async def test_a_replica_of_transformers_answers_paris_and_stops_when_it_is_told_to(
    launchers: Launchers, tmp_path: Path, leaves: Leaves, smollm2_directory: Path
) -> None:
    spec = spec_of(tmp_path / "t", leaves, engine="transformers", model_path=str(smollm2_directory))
    replica = await launchers.fork(spec, deadline())
    question = "What is the capital of France?"
    (answer,) = await chat(leaves, spec, question, temperature=0, max_tokens=32)
    document = orjson.loads(answer.data)
    assert document["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert document["usage"]["completion_tokens"] == 8
    request = pb.ChatRequest(
        model=MODEL,
        messages=[pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content=question)],
        sampling=pb.SamplingParameters(temperature=0, max_tokens=32, logprobs=1),
    )
    *deltas, last = await typed(leaves, spec, request)
    ids = [token_id for response in deltas for token_id in response.delta.token_ids]
    assert len(ids) == last.finished.usage.completion_tokens == 8
    assert all(response.delta.logprobs[0].chosen.logprob <= 0 for response in deltas)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(leaves, spec, question, tools=[{"type": "function", "function": {"name": "f"}}])
    assert isinstance(error_from_rpc(caught.value), InvalidRequest)
    # One endless answer; the drain waits for it no longer than it may, and its thread ends with the process.
    async with leaves.dial(f"{spec.host}:{spec.port}") as dialer:
        stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        sampling = pb.SamplingParameters(max_tokens=2000, ignore_eos=True)
        call = stub.Complete(pb.CompleteRequest(model=MODEL, text="Once", sampling=sampling), timeout=START_SECONDS)
        await call.read()
        call.cancel()
        started = time.monotonic()
        await end(launchers, replica)
        assert time.monotonic() - started < spec.drain_seconds
