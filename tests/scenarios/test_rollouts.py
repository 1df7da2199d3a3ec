"""A rollout behind the public address: both revisions answer, by weight and by key; no request fails at its end."""

import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.registry.tiny import write_model
from tests.scenarios.running_mesh import RunningMesh

MODEL = "rolled"
THREADS = 3


@pytest.fixture
def revisions(mesh: RunningMesh, tmp_path: Path) -> Iterator[list[str]]:
    """Digests of two revisions of a model, the first one served, whose engine is the simulated one."""
    for seed, options in ((1, ("--set", "engine=simulated")), (2, ("--keep-served", "--tag", "next"))):
        directory = write_model(tmp_path / f"seed-{seed}", seed=seed)
        added = mesh.helios("models", "add", MODEL, str(directory), *options)
        assert added.returncode == 0, added.stdout + added.stderr
    versions = shown(mesh)["versions"]
    yield [versions["served"], versions["tags"]["next"]]
    assert mesh.helios("models", "rm", MODEL, "--force").returncode == 0


def shown(mesh: RunningMesh) -> dict[str, Any]:
    result = mesh.helios("models", "show", MODEL, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(result.stdout))


def rollout(mesh: RunningMesh, *options: str) -> dict[str, Any]:
    result = mesh.helios("models", "rollout", MODEL, *options, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(result.stdout))


def chat(mesh: RunningMesh, **fields: Any) -> str:
    """Sends a request, which must be answered; returns its id."""
    answer = mesh.chat(model=MODEL, max_tokens=2, **fields)
    assert answer.status == 200, answer.body
    return answer.headers["x-request-id"]


def revisions_of(mesh: RunningMesh, ids: list[str]) -> Counter[str]:
    """Which revisions requests went to."""
    answer = mesh.request("/admin/v1/requests?page_size=1000", is_admin=True)
    assert answer.status == 200, answer.body
    told = {request["request_id"]: request["revision"] for request in answer.json["requests"]}
    return Counter(told[one] for one in ids)


def ready_revisions(mesh: RunningMesh) -> set[str]:
    return {one["revision"] for one in mesh.ready_replicas() if one["model"].partition("@")[0] == MODEL}


@contextmanager
def under_load(mesh: RunningMesh) -> Iterator[list[str]]:
    """Requests from several clients while the block runs, each of which must be answered; yields their ids."""
    ids: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            ids.append(chat(mesh))

    with ThreadPoolExecutor(THREADS) as pool:
        asking = [pool.submit(ask) for _ in range(THREADS)]
        try:
            yield ids
        finally:
            is_over.set()
        for one in asking:
            one.result()


def metrics_of(mesh: RunningMesh) -> str:
    address = mesh.process("proxy")["ops_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def wait_for_more(mesh: RunningMesh, ids: list[str], count: int) -> None:
    wanted = len(ids) + count
    mesh.wait(lambda: len(ids) >= wanted, 60, f"{count} more answers")


def test_both_revisions_answer_by_weight_until_one_is_promoted(mesh: RunningMesh, revisions: list[str]) -> None:
    served, canary = revisions
    chat(mesh)
    assert rollout(mesh, "--to", "next", "--weight", "20")["canary"] == canary
    # The first request starts the canary; those that are its share meanwhile go to what is served.
    chat(mesh)
    mesh.wait(lambda: ready_revisions(mesh) == set(revisions), 60, "both revisions are ready")
    mesh.wait(lambda: revisions_of(mesh, [chat(mesh) for _ in range(5)])[canary] == 1, 60, "the canary answers")
    assert revisions_of(mesh, [chat(mesh) for _ in range(50)]) == {served: 40, canary: 10}
    for key in ({"user": "ada"}, {"prompt_cache_key": "talk-1"}, {"user": "bob"}):
        assert len(revisions_of(mesh, [chat(mesh, **key) for _ in range(4)])) == 1
    told = mesh.helios("why", chat(mesh, user="ada"))
    assert "is rolled out: 20 % go to" in " ".join(told.stdout.split()), told.stdout
    assert "by its key" in " ".join(told.stdout.split()), told.stdout
    listed = mesh.request("/v1/models").json["data"]
    assert [one["id"] for one in listed if one["id"].startswith(MODEL)].count(MODEL) == 1
    refused = mesh.helios("models", "rm", f"{MODEL}@{canary}", "--json")
    assert json.loads(refused.stdout)["error"]["reason"] == "REVISION_IN_USE"
    assert f'helios_rollout_requests_total{{model="{MODEL}",outcome="canary"}}' in metrics_of(mesh)
    before = {one["replica_id"] for one in mesh.replicas() if one["revision"] == canary}
    with under_load(mesh) as ids:
        wait_for_more(mesh, ids, 10)
        rollout(mesh, "--promote")
        first = len(ids) + THREADS
        mesh.wait(lambda: ready_revisions(mesh) == {canary}, 60, "the canary's replica alone is ready")
        wait_for_more(mesh, ids, 10 + THREADS)
    # Those that were on their way when it was told may have gone to either.
    assert shown(mesh)["versions"]["served"] == canary
    assert revisions_of(mesh, ids[first + 20 :] or ids[-5:]).keys() == {canary}
    assert {one["replica_id"] for one in mesh.ready_replicas() if one["revision"] == canary} == before
    assert [step["act"] for step in rollout(mesh)["steps"]] == ["promote", "weight"]


def test_a_canary_that_can_not_start_fails_no_request_and_is_aborted(mesh: RunningMesh, revisions: list[str]) -> None:
    served, canary = revisions
    chat(mesh)
    # The replica that runs keeps the settings that it has; the canary's starts all fail.
    broken = mesh.helios("models", "set", MODEL, "--set", "engine=simulated", "--set", "options.start_failure_ratio=1")
    assert broken.returncode == 0, broken.stdout + broken.stderr
    with under_load(mesh) as ids:
        rollout(mesh, "--to", canary, "--weight", "100")
        mesh.wait(lambda: canary in failed_revisions(mesh), 60, "the canary's start has failed")
        wait_for_more(mesh, ids, 20)
        why = " ".join(mesh.helios("why", ids[-1]).stdout.split())
        assert "no replica there takes requests" in why, why
        rollout(mesh, "--abort")
        wait_for_more(mesh, ids, 20)
    assert revisions_of(mesh, ids).keys() == {served}


def failed_revisions(mesh: RunningMesh) -> set[str]:
    answer = mesh.request("/admin/v1/replicas", is_admin=True)
    return {failed["replica"]["revision"] for failed in answer.json["failures"]}
