"""LoRA adapters on the real engine: one base, two adapters, three answers; named as models, loaded into what runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.engine.v1.engine_settings_pb2 import LoraAdapter as LoraAdapterMessage
from helios.api.fleet.v1 import types_pb2 as types
from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.api.worker.v1 import supervisor_service_pb2 as supervisor_pb
from helios.mesh.names import ROUTE_MODEL_HEADER
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings
from tests.worker.replica.generated import make_adapter
from tests.worker.replica.support import MODEL, Launcher, Leaves, RecordingSupervisor, RunningReplica
from tests.worker.replica.test_replica_real import START_SECONDS, read, refusal
from tests.worker.replica.test_settings_real import running

pytestmark = pytest.mark.real_model

PIRATE, POET, FRESH, LARGE, LATE = ("sha256:" + letter * 64 for letter in "abcde")
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
    assert await refused(replica, "parrot") == "MODEL_NOT_FOUND"


async def test_adapters_come_change_and_go_while_the_replica_runs(
    replica: RunningReplica, smollm2_directory: Path, tmp_path: Path
) -> None:
    fresh = make_adapter(smollm2_directory, tmp_path / "fresh", seed=3)
    large = make_adapter(smollm2_directory, tmp_path / "large", rank=32)
    known = replica.spec.revision_paths
    before = {name: (await complete(replica, name))["choices"][0]["text"] for name in (MODEL, "pirate", "poet")}
    supervisor = replica.supervisor()
    supervisor.orphan_seconds = 3600.0
    async with supervisor, replica.leaves.dial(replica.address) as dialer:
        await supervisor.wait_heard(lambda said: said.HasField("hello"), 30)
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        # One token for each request and step: this one is under way while all that follows happens.
        document = {"model": "pirate", "prompt": PROMPT, "temperature": 0, "max_tokens": 400, "ignore_eos": True}
        body = HttpBody(content_type="application/json", data=orjson.dumps(document | {"stream": True}))
        long = stub.CreateCompletion(body, **OPTIONS)
        first = await long.read()
        wanted = {
            ("pirate", FRESH): fresh,  # a new revision
            ("parrot", POET): known[POET],  # a new name
            ("large", LARGE): large,  # more than the replica was started for
            ("late", LATE): "",  # not on the node yet
        }
        supervisor.say(order(wanted))
        told = await heard(supervisor, lambda now: now.get(("large", LARGE)) == "FAILED")
        assert (told[("pirate", FRESH)], told[("parrot", POET)], told[("late", LATE)]) == (
            "LOADED",
            "LOADED",
            "LOADING",
        )
        assert told[("pirate", PIRATE)] == "UNLOADING", "a request uses it"
        failure = next(a.failure for a in said_last(supervisor) if a.adapter.name == "large")
        assert failure.reason == "ADAPTER_RANK_TOO_LARGE"
        assert "rank 32" in failure.message
        assert "lora.max_rank to 32" in failure.message
        texts = {name: (await complete(replica, name))["choices"][0]["text"] for name in (MODEL, "pirate", "parrot")}
        assert (texts[MODEL], texts["parrot"]) == (before[MODEL], before["poet"])
        assert texts["pirate"] not in before.values(), "the new revision answers at once"
        events: list[Any] = [first, *(await read(long))]
        text = "".join(choice["text"] for event in parsed(events) for choice in event["choices"])
        assert text.startswith(before["pirate"]), "and the old one what it had begun"
        await heard(supervisor, lambda now: ("pirate", PIRATE) not in now and ("poet", POET) not in now)
        assert await refused(replica, "poet") == await refused(replica, "late") == "MODEL_NOT_FOUND"
        supervisor.say(order({("late", LATE): known[PIRATE], ("pirate", FRESH): fresh}))
        await heard(supervisor, lambda now: now == {("late", LATE): "LOADED", ("pirate", FRESH): "LOADED"})
        assert (await complete(replica, "late"))["choices"][0]["text"] == before["pirate"]
        assert await refused(replica, "parrot") == "MODEL_NOT_FOUND"


def order(wanted: dict[tuple[str, str], Any]) -> supervisor_pb.AttachResponse:
    files = [
        supervisor_pb.AdapterFiles(adapter=LoraAdapterMessage(name=name, revision=revision), path=str(path))
        for (name, revision), path in wanted.items()
    ]
    return supervisor_pb.AttachResponse(adapters=supervisor_pb.ReplicaAdapterSet(adapters=files))


def said_last(supervisor: RecordingSupervisor) -> list[Any]:
    told = [said.adapters.adapters for said in supervisor.heard if said.HasField("adapters")]
    return list(told[-1]) if told else []


async def heard(
    supervisor: RecordingSupervisor, is_met: Callable[[dict[tuple[str, str], str]], bool]
) -> dict[tuple[str, str], str]:
    def now() -> dict[tuple[str, str], str]:
        return {
            (one.adapter.name, one.adapter.revision): types.AdapterState.Name(one.state).removeprefix("ADAPTER_STATE_")
            for one in said_last(supervisor)
        }

    await supervisor.wait_heard(lambda _: is_met(now()), 60)
    return now()


def parsed(messages: list[Any]) -> list[Any]:
    lines = b"".join(message.data for message in messages).split(b"\n\n")
    return [orjson.loads(line[6:]) for line in lines if line and line != b"data: [DONE]"]


async def refused(replica: RunningReplica, model: str) -> str:
    body = HttpBody(content_type="application/json", data=orjson.dumps({"model": model, "prompt": PROMPT}))
    async with replica.leaves.dial(replica.address) as dialer:
        call = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub).CreateCompletion(body, **OPTIONS)
        _, info, _ = await refusal(call)
    return str(info.reason)
