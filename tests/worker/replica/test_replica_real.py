"""One replica of the embedded model, forked from a launcher as in production, asked over mTLS."""

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.rpc import error_details_pb2, status_pb2

from helios.api.inference.v1 import (
    inference_service_pb2 as pb,
)
from helios.api.inference.v1 import (
    inference_service_pb2_grpc,
    openai_service_pb2_grpc,
)
from helios.api.worker.v1 import supervisor_service_pb2 as worker_pb
from helios.mesh.names import PRIORITY_HEADER, ROUTE_MODEL_HEADER, ROUTE_REVISION_HEADER
from tests.worker.replica.support import (
    MODEL,
    REVISION,
    Launcher,
    Leaves,
    RunningReplica,
    make_spec,
    wait_gone,
)

pytestmark = pytest.mark.real_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_SECONDS = 60.0
# A process may wait for its turn between two measured pieces.
UNEXPLAINED_SECONDS = 0.01


def fork_real(launcher: Launcher, leaves: Leaves, directory: Path, model: Path, **changes: Any) -> RunningReplica:
    spec = make_spec(directory, leaves, engine="vllm", model_path=str(model), **changes)
    forked = launcher.fork(spec)
    return RunningReplica(launcher, leaves, spec, forked.pid, forked.start_ticks)


@pytest.fixture(scope="module")
def replica(
    launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path
) -> Iterator[RunningReplica]:
    running = fork_real(launcher, leaves, tmp_path_factory.mktemp("r"), smollm2_directory)
    yield running
    processes = running.tree()
    os.kill(running.pid, signal.SIGTERM)
    assert launcher.wait_exit(running.pid, 10).status == 0
    assert wait_gone(processes, 2) == []


@pytest.fixture
async def openai(replica: RunningReplica) -> AsyncIterator[openai_service_pb2_grpc.OpenAIServiceStub]:
    async with replica.leaves.dial(replica.address) as dialer:
        yield dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)


@pytest.fixture
async def native(replica: RunningReplica) -> AsyncIterator[inference_service_pb2_grpc.InferenceServiceStub]:
    async with replica.leaves.dial(replica.address) as dialer:
        yield dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)


def body(**fields: Any) -> HttpBody:
    document = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | fields
    present = {key: value for key, value in document.items() if value is not ...}
    return HttpBody(content_type="application/json", data=orjson.dumps(present))


def scratch_of(pid: int) -> Path:
    """Returns the directory of a replica's temporary files, which must not outlive it."""
    return Path(tempfile.gettempdir(), f"helios-replica-{Path('/proc/self/ns/pid').stat().st_ino}-{pid}")


def mapped_shared_memory(pid: int) -> set[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


async def read(call: Any) -> list[HttpBody]:
    return [message async for message in call]


def events(messages: list[HttpBody]) -> list[Any]:
    assert all(message.content_type == "text/event-stream" for message in messages)
    blocks = b"".join(message.data for message in messages).decode().removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    return [orjson.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def details(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Returns the ErrorInfo of a failed call."""
    trailers = dict(error.trailing_metadata() or ())
    info = error_details_pb2.ErrorInfo()
    packed = trailers["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert any(detail.Unpack(info) for detail in status.details)
    return info


async def refusal(call: Any) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    # Trailers only: no initial metadata of ours went out before the error, so Envoy may still retry or shape it.
    return caught.value.code(), details(caught.value), caught.value.details() or ""


async def test_greedy_chat_answers_paris(openai: openai_service_pb2_grpc.OpenAIServiceStub) -> None:
    (answer,) = await read(openai.CreateChatCompletion(body(), timeout=START_SECONDS, wait_for_ready=True))
    document = orjson.loads(answer.data)
    assert answer.content_type == "application/json"
    assert document["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert document["model"] == MODEL
    assert document["usage"]["completion_tokens"] == 8


async def test_streaming_joins_to_the_unary_text(openai: openai_service_pb2_grpc.OpenAIServiceStub) -> None:
    options = {"include_usage": True}
    call = openai.CreateChatCompletion(
        body(stream=True, stream_options=options), timeout=START_SECONDS, wait_for_ready=True
    )
    messages = await read(call)
    chunks = events(messages)
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == "The capital of France is Paris."
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    # The role and the first token are ready together, and so are the end, the usage and [DONE].
    assert len(messages) < len(chunks)


async def test_completion_and_request_id(openai: openai_service_pb2_grpc.OpenAIServiceStub) -> None:
    request = body(messages=..., prompt="The capital of France is", max_tokens=4)
    metadata = (("x-request-id", "my-request"),)
    (answer,) = await read(
        openai.CreateCompletion(request, timeout=START_SECONDS, wait_for_ready=True, metadata=metadata)
    )
    document = orjson.loads(answer.data)
    assert "Paris" in document["choices"][0]["text"]
    assert document["id"] == "cmpl-my-request"


async def test_typed_chat_has_token_ids_and_logprobs(
    native: inference_service_pb2_grpc.InferenceServiceStub,
) -> None:
    sampling = pb.SamplingParameters(temperature=0, max_tokens=32, logprobs=2)
    messages = [pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content=QUESTION[0]["content"])]
    call = native.Chat(
        pb.ChatRequest(model=MODEL, messages=messages, sampling=sampling), timeout=START_SECONDS, wait_for_ready=True
    )
    responses = [response async for response in call]
    finished = [response.finished for response in responses if response.HasField("finished")]
    deltas = [response.delta for response in responses if response.HasField("delta")]
    assert len(finished) == 1
    assert responses[-1].HasField("finished")
    assert "".join(delta.text for delta in deltas) == "The capital of France is Paris."
    position = 0
    for delta in deltas:  # one token each, or more where the reader was slower than the engine
        assert delta.output_index == position
        position += len(delta.token_ids)
    assert finished[0].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) == 8
    assert finished[0].choices[0].reason == pb.FINISH_REASON_STOP
    assert (finished[0].model, finished[0].revision) == (MODEL, REVISION)
    for token_id, entry in (pair for delta in deltas for pair in zip(delta.token_ids, delta.logprobs, strict=True)):
        assert entry.chosen.token_id == token_id
        # Greedy: the drawn token is the likeliest, and log probabilities fall.
        assert entry.top[0] == entry.chosen
        assert len(entry.top) == 2
        assert 0 >= entry.top[0].logprob >= entry.top[1].logprob


async def test_typed_completion_from_token_ids_with_two_answers(
    native: inference_service_pb2_grpc.InferenceServiceStub,
) -> None:
    text = "The capital of France is"
    tokenized = await native.Tokenize(
        pb.TokenizeRequest(model=MODEL, text=text), timeout=START_SECONDS, wait_for_ready=True
    )
    assert "".join(tokenized.tokens) == text
    sampling = pb.SamplingParameters(temperature=1, seed=7, max_tokens=6, n=2, ignore_eos=True)
    request = pb.CompleteRequest(model=MODEL, token_ids=pb.TokenIds(ids=tokenized.token_ids), sampling=sampling)
    responses = [response async for response in native.Complete(request, timeout=30)]
    lengths = {0: 0, 1: 0}
    for response in responses[:-1]:
        assert response.delta.output_index == lengths[response.delta.choice_index]
        lengths[response.delta.choice_index] += len(response.delta.token_ids)
    assert lengths == {0: 6, 1: 6}
    finished = responses[-1].finished
    assert [end.reason for end in finished.choices] == [pb.FINISH_REASON_LENGTH] * 2
    assert finished.usage.prompt_tokens == len(tokenized.token_ids)
    assert finished.usage.completion_tokens == 12


async def test_tokenize_conversation_uses_the_chat_template(
    native: inference_service_pb2_grpc.InferenceServiceStub,
) -> None:
    conversation = pb.Conversation(messages=[pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="hi")])
    tokenized = await native.Tokenize(
        pb.TokenizeRequest(model=MODEL, conversation=conversation), timeout=START_SECONDS, wait_for_ready=True
    )
    assert tokenized.tokens[0] == "<|im_start|>"
    assert "".join(tokenized.tokens).endswith("<|im_start|>assistant\n")
    assert tokenized.max_context_tokens > 1000


@pytest.mark.parametrize(
    ("request_body", "reason", "param"),
    [
        (HttpBody(content_type="application/json", data=b'{"model": '), "INVALID_REQUEST", ""),
        (HttpBody(content_type="text/plain", data=b"{}"), "INVALID_REQUEST", ""),
        (HttpBody(content_type="application/json", data=b"[1]"), "INVALID_REQUEST", ""),
        (body(model=...), "INVALID_REQUEST", "model"),
        (body(messages=...), "INVALID_REQUEST", "messages"),
        (body(max_tokens=-1), "INVALID_REQUEST", "max_tokens"),
        (body(max_tokens=0), "INVALID_REQUEST", "max_tokens"),
        (body(max_tokens="many"), "INVALID_REQUEST", "max_tokens"),
        (body(max_tokens=0, stream=True), "INVALID_REQUEST", "max_tokens"),
        (body(temperature=-1), "INVALID_REQUEST", "temperature"),
        (body(top_p=3, stream=True), "INVALID_REQUEST", "top_p"),
        # Above what the KV cache holds, below the model's own limit of 8192.
        (body(messages=[{"role": "user", "content": "word " * 5000}]), "CONTEXT_LENGTH_EXCEEDED", "input_tokens"),
        (body(max_tokens=100_000), "CONTEXT_LENGTH_EXCEEDED", "max_tokens"),
        (
            HttpBody(content_type="application/json", data=b'{"model":"x","mod\\u0065l":"x"}'),
            "DUPLICATE_MODEL",
            "model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_bad_input_is_refused_with_a_reason(
    openai: openai_service_pb2_grpc.OpenAIServiceStub, request_body: HttpBody, reason: str, param: str
) -> None:
    code, info, message = await refusal(
        openai.CreateChatCompletion(request_body, timeout=START_SECONDS, wait_for_ready=True)
    )
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason), message
    assert info.metadata.get("param", "") == param, message


async def test_typed_bad_input_is_refused(native: inference_service_pb2_grpc.InferenceServiceStub) -> None:
    for request, param in (
        (pb.CompleteRequest(model=MODEL), "prompt"),
        (pb.CompleteRequest(text="x"), "model"),
        (pb.CompleteRequest(model=MODEL, token_ids=pb.TokenIds(ids=[1 << 20])), "token_ids.ids"),
        (
            pb.CompleteRequest(model=MODEL, text="x", sampling=pb.SamplingParameters(max_tokens=0)),
            "sampling.max_tokens",
        ),
    ):
        code, info, _ = await refusal(native.Complete(request, timeout=START_SECONDS, wait_for_ready=True))
        assert (code, info.metadata["param"]) == (grpc.StatusCode.INVALID_ARGUMENT, param)
    request = pb.CompleteRequest(model=MODEL, text="word " * 5000)
    code, info, _ = await refusal(native.Complete(request, timeout=30))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")


async def test_a_typed_chat_far_beyond_the_context_is_refused_before_it_is_tokenized(
    native: inference_service_pb2_grpc.InferenceServiceStub,
) -> None:
    long = pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="x" * (20 << 20))
    # Tokenizing that takes twenty seconds, in which the replica would hear nobody.
    code, info, _ = await refusal(native.Chat(pb.ChatRequest(model=MODEL, messages=[long]), timeout=8))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")


async def test_a_schema_without_any_sentence_and_too_many_answers(
    openai: openai_service_pb2_grpc.OpenAIServiceStub,
) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    code, _, _ = await refusal(openai.CreateChatCompletion(body(response_format=schema), timeout=START_SECONDS))
    # UNAVAILABLE would have the edge try it on the next replica.
    assert code is grpc.StatusCode.INTERNAL
    code, _, message = await refusal(
        openai.CreateChatCompletion(body(n=129, temperature=1), timeout=START_SECONDS, wait_for_ready=True)
    )
    assert (code, "128" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_request_that_was_routed_for_something_else_is_refused(
    openai: openai_service_pb2_grpc.OpenAIServiceStub,
) -> None:
    options: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
    code, info, _ = await refusal(
        openai.CreateChatCompletion(body(), metadata=((ROUTE_MODEL_HEADER, "other"),), **options)
    )
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_MISMATCH")
    code, info, _ = await refusal(
        openai.CreateChatCompletion(body(), metadata=((ROUTE_REVISION_HEADER, "sha256:other"),), **options)
    )
    assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_READY_REPLICA")
    code, info, _ = await refusal(openai.CreateChatCompletion(body(model="nobody"), **options))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    # An alias that the picker knows and this replica does not: the pick is what counts.
    metadata = ((ROUTE_MODEL_HEADER, "new-alias"), (ROUTE_REVISION_HEADER, REVISION))
    (answer,) = await read(openai.CreateChatCompletion(body(model="new-alias"), metadata=metadata, **options))
    assert "Paris" in answer.data.decode()


async def test_only_edge_and_proxy_may_call(replica: RunningReplica) -> None:
    async with replica.leaves.dial(replica.address, as_component="storage") as dialer:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        code, _, _ = await refusal(stub.CreateChatCompletion(body(), timeout=START_SECONDS, wait_for_ready=True))
    assert code == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("is_typed", [False, True], ids=["openai", "typed"])
async def test_a_client_that_goes_away_frees_its_kv_blocks(replica: RunningReplica, is_typed: bool) -> None:
    request_id = f"leaver-{is_typed}"
    async with replica.supervisor() as supervisor, replica.leaves.dial(replica.address) as dialer:
        options: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
        options["metadata"] = (("x-request-id", request_id),)
        call: Any
        if is_typed:
            sampling = pb.SamplingParameters(max_tokens=3000, ignore_eos=True)
            request = pb.CompleteRequest(model=MODEL, text="Once upon a time", sampling=sampling)
            call = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub).Complete(request, **options)
        else:
            endless = body(stream=True, max_tokens=3000, ignore_eos=True)
            call = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub).CreateChatCompletion(endless, **options)
        for _ in range(5):
            await call.read()
        # Reports follow the engine's steps; this one is of a moment at which the request ran.
        await supervisor.wait_heard(
            lambda said: said.load.load.running_requests == 1 and said.load.load.kv_usage_ratio > 0
        )
        call.cancel()
        left = await supervisor.wait_heard(
            lambda said: any(finished.request_id == request_id for finished in said.load.finished)
        )
        heard_count = supervisor.heard.index(left)
        await supervisor.wait_heard(
            lambda said: (
                said in supervisor.heard[heard_count:]
                and said.load.load.running_requests == 0
                and said.load.load.kv_usage_ratio == 0
            )
        )
    (finished,) = [entry for entry in left.load.finished if entry.request_id == request_id]
    assert finished.status_code == grpc.StatusCode.CANCELLED.value[0]
    assert 0 < finished.completion_tokens < 3000


async def test_hello_says_all_that_a_supervisor_must_know(
    replica: RunningReplica, openai: openai_service_pb2_grpc.OpenAIServiceStub
) -> None:
    await read(openai.CreateChatCompletion(body(), timeout=START_SECONDS, wait_for_ready=True))
    async with replica.supervisor() as supervisor:
        hello = (await supervisor.wait_heard(lambda said: said.HasField("hello"))).hello
    assert (hello.replica.replica_id, hello.replica.pid) == (replica.spec.replica_id, replica.pid)
    assert hello.start_ticks == replica.start_ticks
    assert (hello.lease_id, hello.replica.memory_bytes) == ("lease-1", 123)
    assert hello.replica.address == replica.address
    seconds = {phase.phase: phase.duration.ToNanoseconds() / 1e9 for phase in hello.replica.phases}
    measured = ["fork", "prepare", "config", "spawn", "engine", "load", "compile", "kv_cache", "warm_up", "connect"]
    assert [name for name in seconds if name in measured] == measured
    assert set(seconds) - set(measured) <= {"tokenizer", "api", "serve", "unexplained"}
    check_explained(seconds)


def check_explained(phases: dict[str, float]) -> None:
    assert phases["unexplained"] <= max(0.02 * sum(phases.values()), UNEXPLAINED_SECONDS), phases


def test_killing_the_front_ends_the_whole_tree(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    running = fork_real(launcher, leaves, tmp_path, smollm2_directory)
    deadline = time.monotonic() + START_SECONDS
    while "replica ready" not in running.log_or_empty():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (ready,) = [line for line in running.log_or_empty().splitlines() if "replica ready" in line]
    check_explained(orjson.loads(ready)["phases"])
    processes = running.tree()
    assert len(processes) >= 2, processes
    assert any(scratch_of(running.pid).iterdir())
    shared = {path for process in processes for path in mapped_shared_memory(process.pid)}
    os.kill(running.pid, signal.SIGKILL)
    assert wait_gone(processes, 2) == []
    assert launcher.wait_exit(running.pid, 5).status == -signal.SIGKILL
    assert not scratch_of(running.pid).exists()
    assert not [path for path in shared if path.exists()]


async def test_a_dead_engine_is_told_and_ends_the_replica(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    running = fork_real(launcher, leaves, tmp_path, smollm2_directory)
    async with running.supervisor() as supervisor, leaves.dial(running.address) as dialer:
        await supervisor.wait_heard(lambda said: said.HasField("ready"), START_SECONDS)
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        call = stub.CreateChatCompletion(
            body(stream=True, max_tokens=3000, ignore_eos=True), timeout=START_SECONDS, wait_for_ready=True
        )
        messages = [await call.read()]
        front, *below = running.tree()
        for process in below:
            process.kill()
        failed = (await supervisor.wait_heard(lambda said: said.HasField("failed"))).failed
        assert failed.reason == "ENGINE_DIED"
        # What was begun can't be taken back: the error travels in band, and the stream ends.
        with contextlib.suppress(grpc.aio.AioRpcError):
            messages += [message async for message in call]
        assert all(isinstance(message, HttpBody) for message in messages)
    exited = await asyncio.get_running_loop().run_in_executor(None, launcher.wait_exit, running.pid, 10)
    assert exited.status == 1
    assert wait_gone([front, *below], 2) == []


async def test_draining_finishes_what_runs_and_refuses_the_rest(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    running = fork_real(launcher, leaves, tmp_path, smollm2_directory)
    async with running.supervisor() as supervisor, leaves.dial(running.address) as dialer:
        await supervisor.wait_heard(lambda said: said.HasField("ready"), START_SECONDS)
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        options: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
        call = stub.CreateChatCompletion(body(stream=True, max_tokens=60, ignore_eos=True), **options)
        first = await call.read()
        drain = worker_pb.ReplicaDrain()
        drain.timeout.FromSeconds(20)
        supervisor.say(worker_pb.AttachResponse(drain=drain))
        await supervisor.wait_heard(lambda said: said.progress.state == 6)
        code, info, _ = await refusal(stub.CreateChatCompletion(body(), timeout=10))
        assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert isinstance(first, HttpBody)
        chunks = events([first, *[message async for message in call]])
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    loop = asyncio.get_running_loop()
    exited = await loop.run_in_executor(None, launcher.wait_exit, running.pid, 10)
    assert exited.status == 0


@pytest.mark.soak
async def test_a_high_priority_overtakes_requests_that_wait_in_the_engine(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    """One at a time, so that the others wait; the simulated engine has the same test in every run."""
    running = fork_real(launcher, leaves, tmp_path, smollm2_directory, max_running_requests=1)
    try:
        async with leaves.dial(running.address) as dialer:
            stub, ended = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub), []

            def ask(band: str, **fields: Any) -> Any:
                metadata = ((ROUTE_MODEL_HEADER, MODEL), (ROUTE_REVISION_HEADER, REVISION), (PRIORITY_HEADER, band))
                return stub.CreateChatCompletion(
                    body(**fields), metadata=metadata, timeout=START_SECONDS, wait_for_ready=True
                )

            async def wait(band: str) -> None:
                assert await read(ask(band, max_tokens=4))
                ended.append(band)

            long = ask("1", stream=True, max_tokens=400, min_tokens=400)
            await anext(aiter(long))
            async with asyncio.TaskGroup() as group:
                for band in "1213":
                    group.create_task(wait(band))
                await read(long)
                assert not ended
            assert ended == ["3", "2", "1", "1"]
    finally:
        os.kill(running.pid, signal.SIGTERM)
        assert launcher.wait_exit(running.pid, 10).status == 0
