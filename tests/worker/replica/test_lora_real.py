"""LoRA adapters on the real engine: one base, two adapters, three answers; named as models, loaded into what runs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.mesh.names import ROUTE_MODEL_HEADER
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings
from tests.worker.replica.generated import make_adapter
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica, wait_gone
from tests.worker.replica.test_replica_real import START_SECONDS, fork_real, read, refusal
from tests.worker.replica.test_settings_real import running

pytestmark = pytest.mark.real_model

PIRATE, POET = "sha256:" + "a" * 64, "sha256:" + "b" * 64
ADAPTERS = LoraSettings((LoraAdapter("pirate", "pirate-lora", PIRATE), LoraAdapter("poet", "poet-lora", POET)))
PROMPT = "The capital of France is"
OPTIONS: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}


@pytest.fixture(scope="module")
def replica(
    launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path
) -> Iterator[RunningReplica]:
    directory = tmp_path_factory.mktemp("lora")
    paths = {
        revision: str(make_adapter(smollm2_directory, directory / name, seed=seed))
        for seed, (name, revision) in enumerate((("pirate", PIRATE), ("poet", POET)))
    }
    changes: dict[str, Any] = {"revision_paths": paths, "orphan_seconds": 3600.0}
    with running(launcher, leaves, directory, smollm2_directory, EngineSettings(lora=ADAPTERS), **changes) as replica:
        yield replica


async def complete(replica: RunningReplica, model: str, **headers: str) -> Any:
    document = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    body = HttpBody(content_type="application/json", data=orjson.dumps(document))
    async with replica.leaves.dial(replica.address) as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        (answer,) = await read(stub.CreateCompletion(body, metadata=tuple(headers.items()), **OPTIONS))
    return orjson.loads(answer.data)


async def test_base_and_adapters_answer_each_in_their_own_way(replica: RunningReplica) -> None:
    answers = {name: await complete(replica, name) for name in (MODEL, "pirate", "poet")}
    texts = {name: answer["choices"][0]["text"] for name, answer in answers.items()}
    assert "Paris" in texts[MODEL]
    assert len(set(texts.values())) == 3, texts
    assert [answer["model"] for answer in answers.values()] == [MODEL, "pirate", "poet"]
    routed = await complete(replica, "pirate", **{ROUTE_MODEL_HEADER: "pirate"})
    assert routed["choices"][0]["text"] == texts["pirate"], "the same greedy answer, however it came"
    async with replica.leaves.dial(replica.address) as dialer:
        native = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        sampling = pb.SamplingParameters(temperature=0, max_tokens=8)
        request = pb.CompleteRequest(model="pirate", text=PROMPT, sampling=sampling)
        messages: list[Any] = await read(native.Complete(request, **OPTIONS))
        typed = "".join(message.delta.text for message in messages)
    assert typed == texts["pirate"]


async def test_an_adapter_that_is_not_there_is_not_found(replica: RunningReplica) -> None:
    body = HttpBody(content_type="application/json", data=orjson.dumps({"model": "parrot", "prompt": PROMPT}))
    async with replica.leaves.dial(replica.address) as dialer:
        call = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub).CreateCompletion(body, **OPTIONS)
        _, info, _ = await refusal(call)
    assert info.reason == "MODEL_NOT_FOUND"


async def test_an_adapter_that_can_t_be_used_fails_the_start_with_its_name(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    path = make_adapter(smollm2_directory, tmp_path / "large", rank=32)
    settings = EngineSettings(lora=LoraSettings((LoraAdapter("large", "large-lora", PIRATE),), max_rank=8))
    replica = fork_real(
        launcher, leaves, tmp_path, smollm2_directory, settings=settings, revision_paths={PIRATE: str(path)}
    )
    processes = replica.tree()
    async with replica.supervisor() as supervisor:
        said = await supervisor.wait_heard(lambda said: said.failed.reason or said.hello.replica.failure.reason, 30)
    failure = said.failed if said.HasField("failed") else said.hello.replica.failure
    with contextlib.suppress(AssertionError):
        launcher.wait_exit(replica.pid, 20)
    assert wait_gone(processes, 5) == []
    assert failure.reason == "BAD_ADAPTER"
    assert "large" in failure.message
    assert "rank" in failure.message
