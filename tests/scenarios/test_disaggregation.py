"""Prefill and decode as two models of one revision behind the public address: the picker brings them together."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.running_mesh import RunningMesh

NAMES = {"apart": "decode", "apart-prefill": "prefill"}
LONG = "Count for me, please. " + "one two three four five six seven eight nine ten " * 16
COMMON = ("--set", "prefix_caching=false", "--set", "kv_cache_bytes=64MiB", "--set", "max_context_tokens=512")


@pytest.fixture
def apart(mesh: RunningMesh, smollm2_directory: Path) -> Iterator[str]:
    """The embedded model once more, in two parts; both are removed at the end."""
    for name, role in NAMES.items():
        said = mesh.helios("models", "add", name, str(smollm2_directory), "--set", f"role={role}", *COMMON)
        assert said.returncode == 0, said.stdout + said.stderr
    yield "apart"
    for name in NAMES:
        assert mesh.helios("models", "rm", name).returncode == 0
    mesh.wait(lambda: all(replica["model"] not in NAMES for replica in mesh.replicas()), 60, "they are gone")


def ask(mesh: RunningMesh, model: str) -> tuple[str, int]:
    """Returns the answer, and how many tokens of its prompt were computed elsewhere."""
    body = {"model": model, "prompt": LONG, "temperature": 0, "max_tokens": 16}
    answer = mesh.request("/v1/completions", json.dumps(body).encode())
    assert answer.status == 200, answer.body
    details = answer.json["usage"]["prompt_tokens_details"] or {}
    return answer.json["choices"][0]["text"], int(details.get("cached_tokens") or 0)


def test_a_prompt_is_computed_by_one_replica_and_answered_by_another(mesh: RunningMesh, apart: str) -> None:
    alone = ask(mesh, apart)
    assert alone[1] == 0, "there is no prefill replica yet, and nobody waits for one"
    mesh.wait(
        lambda: any(replica["model"] == "apart-prefill" for replica in mesh.ready_replicas()), 60, "it was started"
    )
    answers: list[tuple[str, int]] = []

    def travels() -> bool:
        # A replica is picked once Envoy knows it, a moment after it is ready.
        answers.append(ask(mesh, apart))
        return answers[-1][1] >= 128

    mesh.wait(travels, 20, "the KV cache travels")
    assert {text for text, _ in answers} == {alone[0]}
    refused = mesh.request("/v1/completions", json.dumps({"model": "apart-prefill", "prompt": "x"}).encode())
    assert (refused.status, refused.error["code"]) == (400, "prefill_only")
