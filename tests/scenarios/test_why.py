"""Where the time went, as a user sees it: `helios why` against the user's own clock, and drains that lose nothing."""

import json
import os
import secrets
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.scenarios.collector import Collector
from tests.scenarios.running_mesh import ALIAS, MODEL, QUESTION, Answer, RunningMesh

# What the client's own HTTP code and the way back take; on a busy machine a scheduler's slice.
SLACK_SECONDS = 0.1
_FIRST = b'"content":"'


def stream(mesh: RunningMesh, traceparent: str) -> tuple[str, float]:
    """Asks for a streamed answer; returns its request id and the time to its first token by this process's clock."""
    document = {"model": ALIAS, "messages": QUESTION, "temperature": 0, "max_tokens": 8, "stream": True}
    headers = {"content-type": "application/json", "traceparent": traceparent}
    url = f"http://{mesh.edge}/v1/chat/completions"
    request = urllib.request.Request(url, data=json.dumps(document).encode(), headers=headers)
    began, first = time.monotonic(), 0.0
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            is_token = _FIRST in line and _FIRST + b'"' not in line
            first = first or (time.monotonic() - began if is_token else 0.0)
        return response.headers["x-request-id"], first


def explained(mesh: RunningMesh, request_id: str) -> dict[str, Any]:
    """What `helios why` says once the replica has reported the end."""
    found: dict[str, Any] = {}

    def is_finished() -> bool:
        result = mesh.helios("why", request_id, "--json")
        assert result.returncode == 0, result.stdout + result.stderr
        found.update(json.loads(result.stdout))
        return str(found["summary"]["state"]) == "REQUEST_STATE_FINISHED"

    mesh.wait(is_finished, 20, "the replica's report of the request")
    return found


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_a_cold_start_is_explained_and_is_one_trace(mesh: RunningMesh, collector: Collector) -> None:
    mesh.go_cold()
    trace_id = secrets.token_hex(16)
    request_id, first = stream(mesh, f"00-{trace_id}-{secrets.token_hex(8)}-01")
    found = explained(mesh, request_id)
    phases = {phase["phase"]: seconds(phase["duration"]) for phase in found["phases"]}
    whole = seconds(found["explained"])
    assert sum(phases.values()) == pytest.approx(whole, abs=1e-6)
    assert whole == pytest.approx(first, rel=0.02, abs=SLACK_SECONDS), phases
    assert whole <= first + 0.01, "the client can't have had it earlier"
    assert phases.get("unexplained", 0.0) <= 0.02 * whole + 0.05, phases
    assert {"edge", "schedule", "order", "fetch", "fork", "publish", "send", "first_token"} <= phases.keys()
    assert seconds(found["summary"]["time_to_first_token"]) == pytest.approx(whole, abs=1e-6)
    [start] = found["starts"]
    assert (start["requested_by"], start["failure"]) == (request_id, "")
    assert "free" in start["placement"]

    drawn = mesh.helios("why", "--last", ALIAS)
    assert drawn.returncode == 0
    assert request_id in drawn.stdout
    assert "100.0" in drawn.stdout
    assert request_id in mesh.helios("requests", "--model", ALIAS, "--status", "finished").stdout

    spans = {("helios-proxy", "hold"), ("helios-proxy", "activate"), ("helios-worker", "start replica")}
    spans.add(("helios-replica", "replica start"))

    def told() -> set[tuple[str, str]]:
        return {(service, name) for service, names in collector.trace(trace_id).items() for name in names}

    mesh.wait(lambda: spans <= told(), 30, "one trace from the client through proxy and worker to the replica")


def test_what_is_not_there_is_explained_too(mesh: RunningMesh) -> None:
    answer = mesh.request("/v1/chat/completions", b'{"model": "no-such-model", "messages": []}')
    assert answer.status == 404
    told = mesh.helios("why", answer.headers["x-request-id"])
    assert "MODEL_NOT_FOUND" in told.stdout
    unknown = mesh.helios("why", "no-such-request")
    assert unknown.returncode == 1
    assert "REQUEST_NOT_FOUND" in unknown.stderr


def test_a_drain_under_load_loses_no_request_while_another_replica_is_there(mesh: RunningMesh) -> None:
    assert mesh.helios("scale", MODEL, "2").returncode == 0
    mesh.wait(lambda: len(mesh.ready_replicas()) == 2, 60, "two replicas")
    is_over = threading.Event()
    answers: list[Answer] = []

    def ask_on() -> None:
        while not is_over.is_set():
            answers.append(mesh.chat(max_tokens=12))

    try:
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(ask_on) for _ in range(3)]
            try:
                time.sleep(1)
                victim = mesh.ready_replicas()[0]
                os.kill(int(victim["pid"]), signal.SIGTERM)
                gone = victim["replica_id"]
                mesh.wait(
                    lambda: gone not in [one["replica_id"] for one in mesh.replicas()], 45, "the drained one is gone"
                )
                time.sleep(0.5)
                mesh.wait(lambda: len(answers) > 6, 45, "some more answers")
            finally:
                is_over.set()
            for future in running:
                future.result()
    finally:
        assert mesh.helios("scale", MODEL, "0").returncode == 0
    assert [answer.body for answer in answers if answer.status != 200] == []
