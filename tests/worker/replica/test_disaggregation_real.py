"""Prefill and decode in two replicas of the real engine: the tokens of one replica, KV caches over the node's files."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import inference_service_pb2 as native_pb
from helios.api.inference.v1 import (
    inference_service_pb2_grpc,
    openai_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
)
from helios.mesh.names import PREFILL_ENDPOINT_HEADER
from helios.worker.replica.settings import EngineSettings, Role
from tests.ports import free_port
from tests.worker.replica.support import MODEL, REVISION, Launcher, Leaves, RunningReplica
from tests.worker.replica.test_replica_real import START_SECONDS, details, read, refusal
from tests.worker.replica.test_settings_real import running

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
LONG = "Count for me, please. " + "one two three four five six seven eight nine ten " * 12
STORY = "Once upon a time there was a fox who lived near a river. Tell me more. " * 6
Stub = openai_service_pb2_grpc.OpenAIServiceStub


@dataclass(frozen=True)
class Pair:
    prefill: RunningReplica
    decode: RunningReplica
    files: Path


@pytest.fixture(scope="module")
def pair(
    launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path
) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("pd")
    changes: dict[str, Any] = {"kv_directory": str(base / "kv"), "orphan_seconds": 3600.0, "kv_cache_bytes": 64 << 20}
    for name in ("kv", "prefill", "decode"):
        (base / name).mkdir()

    def replica(role: Role) -> Any:
        settings = EngineSettings(role=role, dtype="float32", prefix_caching=False)
        return running(launcher, leaves, base / role.value, smollm2_directory, settings, **changes)

    with replica(Role.PREFILL) as prefill, replica(Role.DECODE) as decode:
        yield Pair(prefill, decode, base / "kv")


async def chat(pair: Pair, text: str, prefill: str | None, **fields: Any) -> Any:
    """Returns the greedy answer of the decode replica, which has the prompt computed at ``prefill``."""
    document = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
    body = HttpBody(content_type="application/json", data=orjson.dumps(document | fields))
    metadata = ((PREFILL_ENDPOINT_HEADER, prefill),) if prefill else ()
    async with pair.decode.leaves.dial(pair.decode.address) as dialer:
        call = dialer.stub(Stub).CreateChatCompletion(body, metadata=metadata, **OPTIONS)
        return orjson.loads((await read(call))[0].data)


def taken(answer: Any) -> int:
    return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def text_of(answer: Any) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


async def test_two_replicas_give_the_tokens_of_one(pair: Pair) -> None:
    for text in (LONG, STORY):
        alone = await chat(pair, text, None)
        apart = await chat(pair, text, pair.prefill.address)
        assert text_of(apart) == text_of(alone)
        assert apart["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
        assert taken(alone) == 0
        assert taken(apart) >= 0.7 * apart["usage"]["prompt_tokens"], "all whole blocks came from the other replica"
    assert list(pair.files.iterdir()) == [], "what was taken is gone"


async def test_many_at_once_and_the_typed_call(pair: Pair) -> None:
    texts = [f"{number}. {LONG if number % 2 else STORY}" for number in range(6)]
    alone = [await chat(pair, text, None) for text in texts]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(chat(pair, text, pair.prefill.address)) for text in texts]
    assert [text_of(task.result()) for task in tasks] == [text_of(answer) for answer in alone]
    assert all(taken(task.result()) for task in tasks)
    sampling = native_pb.SamplingParameters(temperature=0, max_tokens=12)
    request = native_pb.CompleteRequest(model=MODEL, text=LONG + STORY, sampling=sampling)
    said = []
    async with pair.decode.leaves.dial(pair.decode.address) as dialer:
        stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        for metadata in ((), ((PREFILL_ENDPOINT_HEADER, pair.prefill.address),)):
            messages: list[Any] = await read(stub.Complete(request, metadata=metadata, **OPTIONS))
            said.append([token for message in messages for token in message.delta.token_ids])
            cached = messages[-1].finished.usage.cached_prompt_tokens
            assert bool(cached) == bool(metadata)
    assert said[0] == said[1]


async def test_what_can_t_travel_is_computed_where_it_is_asked_for(pair: Pair) -> None:
    expected = text_of(await chat(pair, LONG, None))
    for endpoint in (f"127.0.0.1:{free_port()}", "not an endpoint", "unix:/etc:1", pair.decode.address):
        answer = await chat(pair, LONG, endpoint)
        assert (text_of(answer), taken(answer)) == (expected, 0), endpoint
    several = await chat(pair, LONG, pair.prefill.address, n=2, temperature=1.0)
    assert (len(text_of(several)), taken(several)) == (2, 0)
    assert taken(await chat(pair, "hi", pair.prefill.address)) >= 0


async def test_clients_can_t_say_where_a_kv_cache_comes_from(pair: Pair) -> None:
    for fields in (
        {"kv_transfer_params": {"transfer": "0" * 32}},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "example.org", "remote_port": 1}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await chat(pair, LONG, None, **fields)
        assert details(caught.value).metadata["param"] == "kv_transfer_params"


async def test_a_prefill_replica_answers_nobody_but_replicas(pair: Pair) -> None:
    body = HttpBody(content_type="application/json", data=orjson.dumps({"model": MODEL, "prompt": "x"}))
    request = prefill_service_pb2.PrefillRequest(revision=REVISION, token_ids=[1, 2, 3], transfer="0" * 32)
    leaves, address = pair.prefill.leaves, pair.prefill.address
    async with leaves.dial(address) as edge, leaves.dial(address, as_component="worker") as worker:
        code, info, _ = await refusal(edge.stub(Stub).CreateCompletion(body, **OPTIONS))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_READY_REPLICA")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.stub(prefill_service_pb2_grpc.PrefillServiceStub).Prefill(request, **OPTIONS)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        for changes, wanted in (
            ({"revision": "sha256:other"}, grpc.StatusCode.UNAVAILABLE),
            ({"transfer": "../../etc"}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"token_ids": [1 << 20]}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            wrong = prefill_service_pb2.PrefillRequest(
                **{"revision": REVISION, "token_ids": [1, 2, 3], "transfer": "0" * 32} | changes  # type: ignore[arg-type]
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await worker.stub(prefill_service_pb2_grpc.PrefillServiceStub).Prefill(wrong, **OPTIONS)
            assert caught.value.code() is wanted, changes
