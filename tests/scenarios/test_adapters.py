"""A LoRA adapter from a directory to the answer: a model of its own in the registry, asked for by its name."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.scenarios.running_mesh import RunningMesh
from tests.worker.replica.generated import make_adapter

BASE, ADAPTER, NAME = "with-adapters", "pirate-lora", "pirate"


@pytest.fixture
def base(mesh: RunningMesh, smollm2_directory: Path, tmp_path: Path) -> Iterator[str]:
    """A second name of the embedded model, with an adapter; both are removed at the end."""
    make_adapter(smollm2_directory, tmp_path / "adapter")
    for arguments in (
        (ADAPTER, str(tmp_path / "adapter")),
        (BASE, str(smollm2_directory), "--set", f"lora.adapters={NAME}:{ADAPTER}"),
    ):
        said = mesh.helios("models", "add", *arguments)
        assert said.returncode == 0, said.stdout + said.stderr
    yield BASE
    for name in (BASE, ADAPTER):
        assert mesh.helios("models", "rm", name).returncode == 0
    mesh.wait(lambda: all(replica["model"] != BASE for replica in mesh.replicas()), 60, "its replica is gone")


def test_an_adapter_is_asked_for_like_a_model(mesh: RunningMesh, base: str) -> None:
    with openai.OpenAI(base_url=f"http://{mesh.edge}/v1", api_key="none", max_retries=0, timeout=120) as client:
        texts = {}
        for name in (NAME, base):
            answer = client.completions.create(
                model=name, prompt="The capital of France is", temperature=0, max_tokens=8
            )
            assert answer.model == name
            texts[name] = answer.choices[0].text
        assert "Paris" in texts[base]
        assert texts[NAME] != texts[base]
        listed = {model.id: model for model in client.models.list()}
        assert ADAPTER not in listed, "nobody can ask for an adapter without a model"
        assert (listed[NAME].model_dump()["parent"], listed[base].model_dump().get("parent") or "") == (base, "")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="parrot", prompt="x")
        with pytest.raises(openai.BadRequestError, match="is a LoRA adapter"):
            client.completions.create(model=ADAPTER, prompt="x")
    # Named while the replica runs: it must not answer as the model alone, and says what to do.
    assert mesh.helios("models", "set", base, "--set", f"lora.adapters={NAME}:{ADAPTER},late:{ADAPTER}").returncode == 0
    early = mesh.request("/v1/completions", json.dumps({"model": "late", "prompt": "x"}).encode())
    assert (early.status, early.error["code"]) == (400, "adapter_not_loaded"), early.body
