"""Engine settings on the real engine: what they change, that greedy answers stay the same, and starts that fail."""

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import jsonschema  # type: ignore[import-untyped]
import orjson
import pytest

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.worker.replica.settings import EngineSettings, SpeculativeDecoding
from tests.worker.replica.generated import make_llama
from tests.worker.replica.support import Launcher, Leaves, RunningReplica, wait_gone
from tests.worker.replica.test_replica_real import START_SECONDS, body, details, events, fork_real, read

pytestmark = pytest.mark.real_model

DRAFT = "sha256:" + "d" * 64
# Some two hundred tokens: more than a step of 32 can hold, and more than one block of the KV cache.
NUMBERS = "one two three four five six seven eight nine ten "
LONG = [{"role": "user", "content": "Count for me, please. " + NUMBERS * 16}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
Stub = openai_service_pb2_grpc.OpenAIServiceStub


@pytest.fixture(scope="module")
def plain(
    launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory, smollm2_directory: Path
) -> Iterator[RunningReplica]:
    """A replica that caches nothing, cuts nothing, and has a parser of tool calls."""
    settings = EngineSettings(
        prefix_caching=False, tool_call_parser="hermes", max_running_requests=2, max_batched_tokens=4096
    )
    directory = tmp_path_factory.mktemp("plain")
    # It has no supervisor for most of its life.
    with running(launcher, leaves, directory, smollm2_directory, settings, orphan_seconds=3600.0) as replica:
        yield replica


@pytest.fixture
async def openai(plain: RunningReplica) -> AsyncIterator[Stub]:
    async with plain.leaves.dial(plain.address) as dialer:
        yield dialer.stub(Stub)


@contextlib.contextmanager
def running(
    launcher: Launcher, leaves: Leaves, directory: Path, model: Path, settings: EngineSettings, **changes: Any
) -> Iterator[RunningReplica]:
    replica = fork_real(launcher, leaves, directory, model, settings=settings, **changes)
    try:
        yield replica
    finally:
        processes = replica.tree()
        os.kill(replica.pid, signal.SIGTERM)
        launcher.wait_exit(replica.pid, 20)
        assert wait_gone(processes, 5) == []


async def ask(stub: Stub, **fields: Any) -> Any:
    (answer,) = await read(stub.CreateChatCompletion(body(**fields), timeout=START_SECONDS, wait_for_ready=True))
    return orjson.loads(answer.data)


async def test_an_answer_follows_its_json_schema(openai: Stub) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages = [{"role": "user", "content": "Invent a person: name and age."}]
    answer = await ask(openai, messages=messages, response_format=schema, max_tokens=64)
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), PERSON)
    call = openai.CreateChatCompletion(
        body(messages=messages, response_format=schema, max_tokens=64, stream=True), timeout=START_SECONDS
    )
    pieces = [choice["delta"].get("content") or "" for event in events(await read(call)) for choice in event["choices"]]
    assert json.loads("".join(pieces)) == json.loads(answer["choices"][0]["message"]["content"])


async def test_log_probabilities_are_those_of_the_tokens(openai: Stub) -> None:
    answer = await ask(openai, logprobs=True, top_logprobs=3)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith("The capital of France is Paris.")
    for entry in entries:
        likeliest = entry["top_logprobs"]
        assert len(likeliest) == 3
        assert entry["token"] == likeliest[0]["token"], "greedy takes the likeliest"
        assert entry["logprob"] == pytest.approx(likeliest[0]["logprob"])
        assert 0 >= likeliest[0]["logprob"] >= likeliest[1]["logprob"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_tool_is_called_and_its_result_goes_back(openai: Stub, choice: Any) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    asked = {"messages": [question], "tools": [WEATHER], "tool_choice": choice, "max_tokens": 64}
    answer = await ask(openai, **asked)
    (said,) = answer["choices"]
    (call,) = said["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "get_weather"
    jsonschema.validate(arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
    streamed = events(await read(openai.CreateChatCompletion(body(**asked, stream=True), timeout=START_SECONDS)))
    deltas = [delta for event in streamed for c in event["choices"] for delta in c["delta"].get("tool_calls") or ()]
    assert "".join(delta["function"].get("name") or "" for delta in deltas) == "get_weather"
    joined = "".join(delta["function"].get("arguments") or "" for delta in deltas)
    assert json.loads(joined) == arguments
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny, 21 degrees"}
    history = [question, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    final = await ask(openai, messages=history, tools=[WEATHER], tool_choice="none", max_tokens=32)
    assert final["choices"][0]["message"]["content"]
    assert not final["choices"][0]["message"].get("tool_calls")


async def test_the_model_may_choose_not_to_call_a_tool(openai: Stub) -> None:
    answer = await ask(openai, tools=[WEATHER], tool_choice="auto", max_tokens=32)
    assert answer["choices"][0]["finish_reason"] in {"stop", "length", "tool_calls"}


async def test_only_so_many_requests_run_at_once(plain: RunningReplica, openai: Stub) -> None:
    supervisor = plain.supervisor()
    supervisor.orphan_seconds = 3600.0
    async with supervisor:
        # A replica that was alone for long dials seldom.
        await supervisor.wait_heard(lambda said: said.HasField("hello"), 30)
        calls = [openai.CreateChatCompletion(body(max_tokens=64, ignore_eos=True)) for _ in range(4)]
        await supervisor.wait_heard(lambda said: said.load.load.waiting_requests)
        for call in calls:
            assert await read(call)
        loads = [said.load.load for said in supervisor.heard if said.HasField("load")]
    assert max(load.running_requests for load in loads) == 2
    assert max(load.waiting_requests for load in loads) >= 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(EngineSettings(prefix_caching=True), id="prefix caching"),
        pytest.param(EngineSettings(prefix_caching=False, max_batched_tokens=32), id="chunked prefill"),
        pytest.param(
            EngineSettings(speculative_decoding=SpeculativeDecoding("ngram", token_count=3, prompt_lookup_max=4)),
            id="ngram speculation",
        ),
        pytest.param(
            EngineSettings(speculative_decoding=SpeculativeDecoding("draft_model", "draft", DRAFT, token_count=3)),
            id="a draft model",
        ),
    ],
)
async def test_greedy_answers_are_the_same_however_they_are_computed(
    openai: Stub, plain: RunningReplica, tmp_path: Path, smollm2_directory: Path, settings: EngineSettings
) -> None:
    questions: list[dict[str, Any]] = [
        {"messages": LONG, "max_tokens": 24},
        {"messages": LONG, "max_tokens": 24},
        {"max_tokens": 24},
    ]
    expected = [await ask(openai, **question) for question in questions]
    assert not (expected[1]["usage"]["prompt_tokens_details"] or {}).get("cached_tokens")
    launcher, leaves = plain.launcher, plain.leaves
    changes: dict[str, Any] = {"kv_cache_bytes": 64 << 20}
    if settings.draft_revision:
        # Of random weights, so that most of what it guesses is wrong.
        (tmp_path / "draft").mkdir()
        draft = make_llama(tmp_path / "draft", smollm2_directory, heads=4, layers=1)
        changes["revision_paths"] = {DRAFT: str(draft)}
    with running(launcher, leaves, tmp_path, smollm2_directory, settings, **changes) as replica:
        async with leaves.dial(replica.address) as dialer:
            answers = [await ask(dialer.stub(Stub), **question) for question in questions]
    text = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert text == [answer["choices"][0]["message"]["content"] for answer in expected]
    if settings.prefix_caching:
        assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


async def test_types_context_and_template_are_the_models_own_no_more(
    launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path
) -> None:
    template = "{% for message in messages %}{{ message.content }} Answer: {% endfor %}"
    settings = EngineSettings(dtype="float32", chat_template=template)
    changes = {"kv_cache_bytes": 48 << 20, "max_context_tokens": 256}
    with running(launcher, leaves, tmp_path, smollm2_directory, settings, **changes) as replica:
        async with leaves.dial(replica.address) as dialer:
            stub = dialer.stub(Stub)
            answer = await ask(stub, max_tokens=4)
            assert answer["usage"]["prompt_tokens"] < 14, "not the model's own template, which has a system prompt"
            assert await refused(stub, messages=LONG * 3) == "CONTEXT_LENGTH_EXCEEDED"
            assert await refused(stub, tools=[WEATHER]) == "TOOL_CALLS_NOT_SET_UP"


async def refused(stub: Stub, **fields: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(stub, **fields)
    return str(details(caught.value).reason)


def cut_weights(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    content = file.read_bytes()[: 1 << 20]
    file.unlink()
    file.write_bytes(content)


def unknown_architecture(directory: Path) -> None:
    change_config(directory, architectures=["HoloForCausalLM"])


def layer_without_weights(directory: Path) -> None:
    change_config(directory, num_hidden_layers=31)


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    document = json.loads(file.read_text()) | values
    file.unlink()
    file.write_text(json.dumps(document))


FAILURES = [
    (
        {"dtype": "float8", "tool_call_parser": "none"},
        {},
        None,
        "INVALID_ENGINE_SETTINGS",
        "tool_call_parser: 'none' is",
    ),
    ({"tensor_parallel_size": 2}, {}, None, "INVALID_ENGINE_SETTINGS", "divisible by tensor_parallel_size (2)"),
    ({}, {"kv_cache_bytes": 8 << 20, "max_context_tokens": 4096}, None, "INVALID_ENGINE_SETTINGS", "KV cache"),
    ({}, {"kv_cache_bytes": 1 << 46}, None, "OUT_OF_MEMORY", "memory"),
    ({}, {}, unknown_architecture, "UNSUPPORTED_ARCHITECTURE", "HoloForCausalLM"),
    ({}, {}, cut_weights, "BAD_CHECKPOINT", "can't be loaded"),
    ({}, {}, layer_without_weights, "BAD_CHECKPOINT", "can't be loaded"),
]


@pytest.mark.parametrize(("settings", "changes", "damage", "reason", "words"), FAILURES)
async def test_a_start_that_fails_says_why(
    launcher: Launcher,
    leaves: Leaves,
    tmp_path: Path,
    smollm2_directory: Path,
    *,
    settings: dict[str, Any],
    changes: dict[str, Any],
    damage: Any,
    reason: str,
    words: str,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in smollm2_directory.iterdir():
        (model / file.name).symlink_to(file)
    if damage is not None:
        damage(model)
    replica = fork_real(launcher, leaves, tmp_path, model, settings=EngineSettings(**settings), **changes)
    processes = replica.tree()
    async with replica.supervisor() as supervisor:
        said = await supervisor.wait_heard(lambda said: said.failed.reason or said.hello.replica.failure.reason, 30)
    failure = said.failed if said.HasField("failed") else said.hello.replica.failure
    assert (failure.reason, words in failure.message) == (reason, True), failure.message
    assert "See root cause above" not in failure.message
    assert launcher.wait_exit(replica.pid, 20).status != 0
    assert wait_gone(processes, 5) == []
