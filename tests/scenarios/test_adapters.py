"""A LoRA adapter from a directory to the answer: a model of its own in the registry, asked for by its name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.scenarios.running_mesh import RunningMesh
from tests.worker.replica.generated import make_adapter

BASE, ADAPTER, LARGE, NAME = "with-adapters", "pirate-lora", "large-lora", "pirate"


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
    for name in (BASE, ADAPTER, LARGE):
        assert mesh.helios("models", "rm", name).returncode == 0
    mesh.wait(lambda: all(replica["model"] != BASE for replica in mesh.replicas()), 60, "its replica is gone")


def test_an_adapter_is_asked_for_like_a_model(
    mesh: RunningMesh, base: str, smollm2_directory: Path, tmp_path: Path
) -> None:
    large = make_adapter(smollm2_directory, tmp_path / "large", rank=32)
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
    # Named while the replica runs: the first request for it waits until it is loaded.
    pids = {replica["pid"] for replica in mesh.replicas() if replica["model"] == base}
    assert mesh.helios("models", "set", base, "--set", f"lora.adapters={NAME}:{ADAPTER},late:{ADAPTER}").returncode == 0
    late = ask(mesh, "late")
    assert late.status == 200, late.body
    assert json.loads(late.body)["choices"][0]["text"] == texts[NAME], "the same adapter by another name"
    # Given up while the replica runs, and one beyond what the replica was started for.
    assert mesh.helios("models", "add", LARGE, str(large)).returncode == 0
    assert mesh.helios("models", "set", base, "--set", f"lora.adapters=late:{ADAPTER},large:{LARGE}").returncode == 0
    assert ask(mesh, NAME).status == 404
    refused = ask(mesh, "large")
    assert (refused.status, refused.error["code"]) == (400, "adapter_rank_too_large"), refused.body
    assert "lora.max_rank to 32" in refused.error["message"]
    assert ask(mesh, "late").status == 200
    assert {replica["pid"] for replica in mesh.replicas() if replica["model"] == base} == pids, "nothing was restarted"


def ask(mesh: RunningMesh, model: str) -> Any:
    document = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    return mesh.request("/v1/completions", json.dumps(document).encode())
