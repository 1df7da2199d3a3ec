"""The command line on a real mesh."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ports import free_port
from tests.scenarios.running_mesh import ALIAS, HELIOS, MODEL, RunningMesh


def up(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELIOS, "up", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_what_up_prints_works_when_pasted(mesh: RunningMesh) -> None:
    assert mesh.chat().status == 200
    text = mesh.console.read_text()
    curl = re.search(r"^  (curl .*)$", text, re.MULTILINE)
    assert curl is not None
    assert "[DONE]" in shell(curl[1])
    assert mesh.token not in text, "the token stands in no line, and in no command's arguments"
    calls = re.findall(r"^  ((?:TOKEN=\$\(.*?\) )?\S*grpcurl .*)$", text, re.MULTILINE)
    assert len(calls) == 2
    assert '"finished"' in shell(calls[0])
    assert MODEL in shell(calls[1])
    snippet = re.search(r"Python \(pip install openai\):\n((?:  .*\n)+)", text)
    assert snippet is not None
    code = "\n".join(line[2:] for line in snippet[1].splitlines())
    python = Path(HELIOS).with_name("python")
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def shell(line: str) -> str:
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_second_up_on_the_same_state_directory_is_refused(mesh: RunningMesh) -> None:
    result = up("--state-dir", str(mesh.state), "--port", str(free_port()), "--admin-port", str(free_port()))
    assert result.returncode == 1
    assert "helios down" in result.stderr
    assert mesh.chat().status == 200


@pytest.mark.parametrize(("flag", "other"), [("--port", "--admin-port"), ("--admin-port", "--port")])
def test_a_taken_port_is_refused_with_the_flag_to_change(
    mesh: RunningMesh, tmp_path: Path, flag: str, other: str
) -> None:
    taken = mesh.port if flag == "--port" else mesh.admin_port
    result = up("--state-dir", str(tmp_path / "s"), flag, str(taken), other, str(free_port()))
    assert result.returncode == 1
    assert flag in result.stderr
    assert str(taken) in result.stderr


def test_a_bad_setting_is_refused_with_its_name(tmp_path: Path) -> None:
    ports = ("--port", str(free_port()), "--admin-port", str(free_port()))
    result = up("--state-dir", str(tmp_path / "a"), *ports, "--set=proxy.no_such_field=1")
    assert result.returncode == 1
    assert "no-such-field" in result.stderr
    result = up("--state-dir", str(tmp_path / "b"), *ports, "--set=nonsense")
    assert result.returncode == 1
    assert "COMPONENT.FIELD=VALUE" in result.stderr


def test_commands_without_a_mesh_say_what_to_do(tmp_path: Path) -> None:
    for command in (["status"], ["down"], ["chat"], ["scale", MODEL, "1"], ["models", "list"]):
        result = subprocess.run(
            [HELIOS, *command, "--state-dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 1
        assert "helios up" in result.stderr


def test_status_shows_processes_workers_and_models(mesh: RunningMesh) -> None:
    result = mesh.helios("status", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert {child["name"] for child in document["mesh"]["processes"]} == {
        "registry",
        "storage",
        "proxy",
        "relay",
        "worker",
        "envoy",
    }
    assert all(child["state"] == "ready" for child in document["mesh"]["processes"])
    assert document["workers"][0]["devices"][0]["device_id"] == "cpu:0"
    assert MODEL in {model["id"] for model in document["models"]}
    plain = mesh.helios("status")
    assert plain.returncode == 0
    assert MODEL[:12] in plain.stdout


def test_the_cache_is_shown_and_found_good(mesh: RunningMesh) -> None:
    assert mesh.chat().status == 200
    result = mesh.helios("cache", "status", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [tier["tier"]["name"] for tier in document["tiers"]] == ["disk"]
    assert document["tiers"][0]["tier"]["used_bytes"] == sum(r["size_bytes"] for r in document["revisions"])
    assert all(revision["tiers"] == ["disk"] for revision in document["revisions"])
    plain = mesh.helios("cache", "status")
    assert plain.returncode == 0, plain.stderr
    assert MODEL[:12] in plain.stdout
    refused = mesh.helios("cache", "evict", MODEL, "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["reason"] == "REVISION_LEASED"
    scrubbed = mesh.helios("cache", "scrub", "--json")
    assert scrubbed.returncode == 0, scrubbed.stdout
    counted = json.loads(scrubbed.stdout)
    assert counted["done_bytes"] == counted["total_bytes"] > 0


def test_usage_and_prefetches_are_shown_and_told_by_rest(mesh: RunningMesh) -> None:
    assert mesh.chat().status == 200

    def shown() -> dict[str, Any]:
        told: dict[str, Any] = json.loads(mesh.helios("models", "usage", ALIAS, "--json").stdout)
        return told

    mesh.wait(lambda: shown()["counts"]["completion_tokens"] > 0, 60, "what was asked for is known")
    told = shown()
    assert told["model"] == MODEL
    assert told["counts"]["requests"] >= 1
    listed = mesh.request("/admin/v1/usage", is_admin=True)
    assert MODEL in {model["model"] for model in listed.json["models"]}
    assert mesh.request(f"/admin/v1/usage/{ALIAS}", is_admin=True).json["usage"]["model"] == MODEL
    heat = mesh.request("/admin/v1/blob-heat", is_admin=True).json["blobs"]
    assert all(int(blob["requests"]) >= 1 for blob in heat)
    assert heat
    asked = json.loads(mesh.helios("cache", "prefetch", ALIAS, "--dry-run", "--json").stdout)
    assert len(asked["asked_nodes"]) + len(asked["holding_nodes"]) == 1
    nodes = mesh.request("/admin/v1/prefetches", is_admin=True).json["nodes"]
    assert [node["node"] for node in nodes] == [*asked["asked_nodes"], *asked["holding_nodes"]]


def test_a_model_is_added_shown_answers_and_is_removed(mesh: RunningMesh, smollm2_directory: Path) -> None:
    added = mesh.helios("models", "add", "team/copy", str(smollm2_directory), "--alias", "copy")
    assert added.returncode == 0, added.stderr
    try:
        listed = json.loads(mesh.helios("models", "list", "--json").stdout)
        assert {"team/copy", MODEL} <= {model["id"] for model in listed}
        shown = json.loads(mesh.helios("models", "show", "copy", "--json").stdout)
        assert shown["id"] == "team/copy"
        assert shown["aliases"] == ["copy"]
        answer = mesh.chat(model="team/copy")
        assert answer.status == 200, answer.body
        assert answer.json["model"] == "team/copy"
        assert "Paris" in answer.json["choices"][0]["message"]["content"]
        assert mesh.request("/v1/models/team/copy").json["id"] == "team/copy"
    finally:
        removed = mesh.helios("models", "rm", "team/copy")
    assert removed.returncode == 0, removed.stderr
    mesh.wait(lambda: mesh.chat(model="team/copy").status == 404, 30, "the model is gone")
    mesh.wait(lambda: all(r["model"] != "team/copy" for r in mesh.replicas()), 60, "its replicas are gone")


def test_scale_and_evict(mesh: RunningMesh) -> None:
    assert mesh.helios("scale", ALIAS, "1").returncode == 0
    mesh.wait(lambda: len(mesh.ready_replicas()) == 1, 60, "one replica is kept")
    refused = mesh.helios("evict", ALIAS)
    assert refused.returncode == 1, "a model that must have a replica is not evicted"
    assert mesh.helios("scale", ALIAS, "0").returncode == 0
    assert mesh.helios("evict", ALIAS).returncode == 0
    mesh.wait(lambda: not mesh.replicas(), 60, "no replica is left")
    mesh.wait(lambda: not any((mesh.state / "storage").rglob("model.safetensors")), 30, "its bytes left the node")
    answer = mesh.chat()
    assert answer.status == 200, answer.body
    assert "Paris" in answer.json["choices"][0]["message"]["content"]


def test_a_worker_is_taken_out_of_service_and_back(mesh: RunningMesh) -> None:
    def ran(*arguments: str) -> str:
        result = mesh.helios(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    (worker,) = json.loads(ran("workers", "list", "--json"))
    worker_id = str(worker["worker_id"])
    assert worker["cordoned"] is False
    assert "would be cordoned" in ran("workers", "drain", worker_id, "--dry-run")
    assert json.loads(ran("workers", "list", "--json"))[0]["cordoned"] is False
    ran("workers", "cordon", worker_id)
    try:
        assert "cordoned" in ran("workers", "list")
        assert mesh.helios("workers", "cordon", "nobody").returncode == 1
    finally:
        ran("workers", "uncordon", worker_id)
    assert json.loads(ran("workers", "list", "--json"))[0]["cordoned"] is False
    assert isinstance(json.loads(ran("scaling", "--json")), list)


def test_logs_and_metrics_of_every_process(mesh: RunningMesh) -> None:
    for name in ("registry", "storage", "proxy", "worker"):
        result = mesh.helios("logs", name, "-n", "200")
        assert result.returncode == 0
        assert '"message"' in result.stdout
    assert mesh.helios("logs", "no-such-process").returncode == 1


def test_down_stops_everything_and_a_new_up_serves_again(tmp_path: Path) -> None:
    second = RunningMesh(tmp_path / ("long-directory-name-" * 8) / "state")
    command = [HELIOS, "up", "--detach", "--state-dir", str(second.state), "--model", ""]
    command += ["--port", str(second.port), "--admin-port", str(second.admin_port)]
    started = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    record = second.record()
    try:
        assert second.request("/v1/models").json["data"] == []
    finally:
        stopped = second.helios("down")
    assert stopped.returncode == 0, stopped.stderr
    for pid in [record["pid"], *(child["pid"] for child in record["processes"])]:
        assert not is_running(pid)


def test_up_and_down_clean_up_after_a_crash(tmp_path: Path) -> None:
    crashed = RunningMesh(tmp_path / "state")
    command = [HELIOS, "up", "--detach", "--state-dir", str(crashed.state), "--model", ""]
    command += ["--port", str(crashed.port), "--admin-port", str(crashed.admin_port)]
    children: list[int] = []
    try:
        for _ in range(2):
            started = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
            assert started.returncode == 0, started.stdout + started.stderr
            assert not any(is_running(pid) for pid in children), "up ends what the crash had left"
            record = crashed.record()
            children = [child["pid"] for child in record["processes"]]
            os.kill(record["pid"], signal.SIGKILL)
            assert all(is_running(pid) for pid in children)
    finally:
        stopped = crashed.helios("down")
    assert stopped.returncode == 0, stopped.stderr
    assert not any(is_running(pid) for pid in children)
    assert crashed.helios("down").returncode == 1


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
