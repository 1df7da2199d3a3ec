"""Durable requests: a stream outlives its replica, through the whole mesh."""

import json
import os
import signal
import urllib.request
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.scenarios.running_mesh import MODEL, RunningMesh

pytestmark = pytest.mark.timeout(600)

DURABLE = {"x-helios-durable": "true"}
# What comes next is certain: with bf16 a replica that computes these tokens as a prompt rounds otherwise than the one
# that made them, and two tokens may be as likely as each other.
NUMBERS = " ".join(map(str, range(1, 30)))


def stream(mesh: RunningMesh, *, kill_at: int = 0, headers: dict[str, str] | None = None, **fields: Any) -> list[Any]:
    """Streams a greedy answer; kills its replica after so many events. Gives the events."""
    document = {"model": MODEL, "prompt": NUMBERS, "stream": True, "temperature": 0, "ignore_eos": True}
    document |= {"stream_options": {"include_usage": True}, "max_tokens": 64} | fields
    connection = HTTPConnection(mesh.edge, timeout=120)
    try:
        sent = {"content-type": "application/json"} | (headers or {})
        connection.request("POST", "/v1/completions", json.dumps(document).encode(), sent)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        events: list[Any] = []
        while line := answer.readline():
            text = line.decode().strip().removeprefix("data: ")
            if not text:
                continue
            if text == "[DONE]":
                return events
            events.append(json.loads(text))
            if len(events) == kill_at:
                os.kill(int(mesh.ready_replicas()[0]["pid"]), signal.SIGKILL)
        raise AssertionError("the stream ended without its end")
    finally:
        connection.close()


def told(events: list[Any]) -> tuple[str, list[Any]]:
    """The text, and what an answer counts and ends with."""
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["text"] for choice in choices)
    usage = events[-1]["usage"]
    counts = [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return text, [choices[-1]["finish_reason"], *counts]


def test_a_durable_stream_outlives_its_replica(mesh: RunningMesh) -> None:
    whole = told(stream(mesh))
    killed = stream(mesh, kill_at=10, headers=DURABLE)
    assert told(killed) == whole
    assert len({(event["id"], event["created"]) for event in killed}) == 1


def test_a_models_policy_makes_its_streams_durable(mesh: RunningMesh) -> None:
    asked = mesh.helios("models", "durable", MODEL, "--on", "--dry-run")
    assert "it would be" in asked.stdout, asked
    assert "end with their replica" in mesh.helios("models", "durable", MODEL).stdout
    assert mesh.helios("models", "durable", MODEL, "--on").returncode == 0
    try:
        # Proxies hear of it by the registry's watch, within moments.
        mesh.wait(lambda: was_relayed(mesh), 20, "requests go to the relay")
        assert was_relayed(mesh)
        # What can't go on elsewhere is answered all the same, since nobody asked for it to.
        assert told(stream(mesh, seed=1, temperature=0.5, max_tokens=4))[1][0] == "length"
    finally:
        assert mesh.helios("models", "durable", MODEL, "--off").returncode == 0


def was_relayed(mesh: RunningMesh) -> bool:
    """Whether a request goes to the relay now."""
    before = relayed_count(mesh)
    answer = mesh.request("/v1/completions", json.dumps({"model": MODEL, "prompt": "1 2", "max_tokens": 1}).encode())
    assert answer.status == 200
    return relayed_count(mesh) > before


def relayed_count(mesh: RunningMesh) -> float:
    """What the relay counts."""
    address = json.loads((mesh.state / "run" / "relay.ready.json").read_text())["ops_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("helios_relay_requests_total ")))


def test_what_can_not_go_on_elsewhere_is_refused_by_name(mesh: RunningMesh) -> None:
    document = {"model": MODEL, "prompt": NUMBERS, "stream": True, "n": 2}
    answer = mesh.request("/v1/completions", json.dumps(document).encode(), headers=DURABLE)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("n", "not_continuable")
