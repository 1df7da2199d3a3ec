"""What dies comes back, and what a client sees meanwhile is an answer or a clean 503."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from http.client import HTTPException

import psutil
import pytest

from tests.scenarios.running_mesh import MODEL, QUESTION, Answer, RunningMesh

pytestmark = pytest.mark.timeout(600)


def kill(mesh: RunningMesh, name: str) -> int:
    pid = mesh.pid_of(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def comes_back(mesh: RunningMesh, name: str, old_pid: int) -> None:
    mesh.wait(
        lambda: mesh.process(name)["state"] == "ready" and mesh.process(name)["pid"] != old_pid,
        90,
        f"{name} is back",
    )


def answers(mesh: RunningMesh, *, within_seconds: float = 90.0) -> Answer:
    """Asks until the mesh answers; everything before must be a clean 503 with Retry-After."""
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            answer = mesh.chat()
        except (OSError, HTTPException):
            # Envoy itself was killed: nobody is there to say 503.
            answer = Answer(0, {}, b"")
        if answer.status == 200:
            assert "Paris" in answer.json["choices"][0]["message"]["content"]
            return answer
        assert answer.status in (0, 503), answer.body
        assert time.monotonic() < deadline, answer.body
        time.sleep(0.2)


class InBackground:
    """A request in flight while the test does something to the mesh."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._answer: Answer | None = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._answer = work()
            except (OSError, HTTPException) as error:
                self._error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_seconds: float = 180.0) -> Answer:
        self._thread.join(timeout_seconds)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer


def front_pid(mesh: RunningMesh) -> int:
    # Envoy may have answered by itself while the proxy, just started, waits for its workers.
    mesh.wait(lambda: bool(mesh.ready_replicas()), 30, "the proxy knows of the replica")
    return int(mesh.ready_replicas()[0]["pid"])


def session_of(pid: int) -> list[int]:
    leader = os.getsid(pid)
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_a_killed_replica_is_replaced_and_leaves_no_process(mesh: RunningMesh) -> None:
    answers(mesh)
    front = front_pid(mesh)
    tree = session_of(front)
    assert len(tree) >= 2, "a replica is several processes"
    os.kill(front, signal.SIGKILL)
    answers(mesh)
    mesh.wait(lambda: not any(psutil.pid_exists(pid) for pid in tree), 15, "the whole tree is gone")
    assert front_pid(mesh) != front


def test_a_killed_engine_core_takes_its_replica_with_it(mesh: RunningMesh) -> None:
    answers(mesh)
    front = front_pid(mesh)
    child = next(pid for pid in session_of(front) if pid != front)
    os.kill(child, signal.SIGKILL)
    mesh.wait(lambda: not psutil.pid_exists(front), 30, "the replica has ended")
    answers(mesh)


def test_a_client_of_a_replica_that_dies_mid_stream_sees_the_end(mesh: RunningMesh) -> None:
    answers(mesh)
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 2000, "stream": True, "ignore_eos": True}

    def stream() -> Answer:
        return mesh.request("/v1/chat/completions", json.dumps(body).encode())

    streaming = InBackground(stream)
    mesh.wait(lambda: running_requests(mesh) > 0, 30, "the request runs")
    os.kill(front_pid(mesh), signal.SIGKILL)
    with pytest.raises((OSError, HTTPException)):
        raise_if_cut(streaming.result(30))
    answers(mesh)


def raise_if_cut(answer: Answer) -> None:
    if b"[DONE]" not in answer.body:
        raise OSError("the stream ended without [DONE]")


def running_requests(mesh: RunningMesh) -> int:
    return sum(int(replica.get("load", {}).get("running_requests", 0)) for replica in mesh.ready_replicas())


@pytest.mark.parametrize("name", ["worker", "storage", "registry", "proxy", "envoy"])
def test_a_killed_process_comes_back_and_the_next_request_works(mesh: RunningMesh, name: str) -> None:
    answers(mesh)
    old = kill(mesh, name)
    answers(mesh)
    comes_back(mesh, name, old)
    answers(mesh)


def test_replicas_outlive_their_supervisor(mesh: RunningMesh) -> None:
    answers(mesh)
    front = front_pid(mesh)
    old = kill(mesh, "worker")
    comes_back(mesh, "worker", old)
    answers(mesh)
    mesh.wait(
        lambda: [int(replica["pid"]) for replica in mesh.ready_replicas()] == [front], 30, "the same replica serves"
    )


def test_warm_traffic_flows_while_the_registry_is_down(mesh: RunningMesh) -> None:
    answers(mesh)
    old = kill(mesh, "registry")
    assert mesh.chat().status == 200
    comes_back(mesh, "registry", old)


def test_a_cold_model_starts_after_every_process_was_killed(mesh: RunningMesh) -> None:
    mesh.go_cold()
    killed = {name: kill(mesh, name) for name in ("registry", "storage", "proxy", "worker")}
    for name, old in killed.items():
        comes_back(mesh, name, old)
    answers(mesh)


def test_a_request_held_at_zero_outlives_a_restart_of_the_proxy(mesh: RunningMesh) -> None:
    mesh.go_cold()
    held = InBackground(mesh.chat)
    mesh.wait(lambda: bool(mesh.replicas()), 10, "a replica is asked for")
    assert not held.is_over, "a cold start takes longer than this"
    old = kill(mesh, "proxy")
    answer = held.result()
    assert answer.status in (200, 503), answer.body
    if answer.status == 503:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["type"] == "server_error"
    comes_back(mesh, "proxy", old)
    answers(mesh)


def test_two_first_requests_start_one_replica(mesh: RunningMesh) -> None:
    mesh.go_cold()
    seen: set[str] = set()
    requests = [InBackground(mesh.chat) for _ in range(2)]
    while not all(request.is_over for request in requests):
        seen |= {replica["replica_id"] for replica in mesh.replicas()}
        time.sleep(0.1)
    seen |= {replica["replica_id"] for replica in mesh.replicas()}
    assert [request.result().status for request in requests] == [200, 200]
    assert len(seen) == 1


def test_a_client_that_leaves_frees_its_replica(mesh: RunningMesh) -> None:
    answers(mesh)
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 4000, "ignore_eos": True}

    def impatient() -> Answer:
        return mesh.request("/v1/chat/completions", json.dumps(body).encode(), timeout_seconds=3)

    request = InBackground(impatient)
    mesh.wait(lambda: running_requests(mesh) > 0, 30, "the request runs")
    with pytest.raises(OSError):  # noqa: PT011 - the client's own timeout
        request.result()
    mesh.wait(lambda: running_requests(mesh) == 0, 10, "the engine has nothing to do")
    answers(mesh)


def test_sigstopped_proxy_is_no_hole(mesh: RunningMesh) -> None:
    answers(mesh)
    pid = mesh.pid_of("proxy")
    os.kill(pid, signal.SIGSTOP)
    try:
        held = InBackground(mesh.chat)
        time.sleep(1.0)
        assert not held.is_over or held.result().status == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    assert held.result().status in (200, 503)
    answers(mesh)
