"""Two proxies: the one that leads is killed, the other one is, the registry goes away, a worker is drained. No request
is lost by it, and nothing is started twice.

A mesh of its own whose engine only takes time. What a replica does for its clients never passes a proxy, so streams go
on whatever becomes of proxies; requests that a killed proxy held move to the other one.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.registry.tiny import write_model
from tests.scenarios.running_mesh import RunningMesh

pytestmark = pytest.mark.timeout(600)

MODEL = "first"
SPREAD = "spread"
PROXIES = ("proxy", "proxy-2")
# Long enough that a proxy can be killed while requests wait for it, on a machine however quick.
START_SECONDS = 3
WAIT_SECONDS = 90


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Two proxies, and a model of the simulated engine at zero replicas."""
    settings = ["worker.replica.engine=simulated", "proxy.idle_timeout_seconds=600"]
    options = ("--proxies", "2", "--model", "")
    mesh = RunningMesh(Path(tmp_path_factory.mktemp("pair")) / "state", settings, options=options)
    mesh.start()
    try:
        directory = write_model(tmp_path_factory.mktemp("weights") / "tiny")
        add(mesh, MODEL, directory)
        add(mesh, SPREAD, directory, start_seconds=0.2)
        yield mesh
    finally:
        status = mesh.stop()
    assert status == 0


def add(mesh: RunningMesh, name: str, directory: Path, *, start_seconds: float = START_SECONDS) -> None:
    options = {"start_seconds": str(start_seconds), "decode_seconds_per_token": "0.02"}
    document = {
        "name": name,
        "source": str(directory),
        "engine_settings": {"engine": "simulated", "options": options},
    }
    answer = mesh.request("/admin/v1/models:ingest", json.dumps(document).encode(), is_admin=True)
    assert answer.status == 200, answer.body
    assert '"done"' in answer.body.decode(), answer.body


def lease(mesh: RunningMesh) -> tuple[str, int]:
    """Returns who leads by the registry's word, and by which epoch; nobody: empty."""
    answer = mesh.request("/admin/v1/leases", is_admin=True)
    assert answer.status == 200, answer.body
    leases: list[dict[str, str]] = answer.json.get("leases", [])
    found = next((lease for lease in leases if lease["name"] == "proxy-leader"), {})
    return found.get("holder", ""), int(found.get("epoch", 0))


def leader(mesh: RunningMesh) -> str:
    """Waits until a proxy leads; returns the name of its process."""
    mesh.wait(lambda: lease(mesh)[0] in PROXIES, WAIT_SECONDS, "a proxy leads")
    return lease(mesh)[0]


def other(name: str) -> str:
    return next(proxy for proxy in PROXIES if proxy != name)


def accepted_starts(mesh: RunningMesh) -> int:
    """Returns how many starts the worker has accepted since it runs."""
    return measure(mesh, "worker", r'helios_worker_commands_total\{command="start",outcome="accepted"\}')


def measure(mesh: RunningMesh, process: str, pattern: str) -> int:
    """Returns a number from the metrics of a process; 0 where there is none."""
    address = mesh.process(process)["ops_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.search(rf"^{pattern} (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def kill(mesh: RunningMesh, name: str) -> int:
    pid = mesh.pid_of(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def is_back(mesh: RunningMesh, name: str, old_pid: int) -> bool:
    process = mesh.process(name)
    return bool(process["state"] == "ready" and process["pid"] != old_pid)


def held(mesh: RunningMesh) -> dict[str, int]:
    """Returns how many requests each proxy holds, by its own word."""
    return {name: measure(mesh, name, "helios_holds") for name in PROXIES}


@asynccontextmanager
async def client_of(mesh: RunningMesh) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a connection for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = f"http://{mesh.edge}"
    async with httpx.AsyncClient(base_url=base, timeout=180, trust_env=False, limits=limits) as client:
        yield client


async def ask(
    client: httpx.AsyncClient,
    outcomes: Counter[str],
    *,
    is_streamed: bool = False,
    max_tokens: int = 8,
    prompt: str = "ab cd",
) -> None:
    """Sends one request and notes how it ended."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": is_streamed}
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        outcomes[f"{type(error).__name__}: {error}"] += 1
        return
    is_whole = answer.status_code == 200 and ("[DONE]" if is_streamed else '"total_tokens"') in answer.text
    outcomes["answered" if is_whole else f"{answer.status_code}: {answer.text[-300:]}"] += 1


@asynccontextmanager
async def asking(mesh: RunningMesh, outcomes: Counter[str], count: int) -> AsyncIterator[None]:
    """Sends requests, half of them with prompts that the picker is sent; all have ended when the block does."""
    async with client_of(mesh) as client, asyncio.TaskGroup() as group:
        for number in range(count):
            prompt = "ab cd " * (1 if number % 4 < 2 else 200)
            group.create_task(ask(client, outcomes, is_streamed=number % 2 == 1, prompt=prompt))
        yield


async def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def go_cold(mesh: RunningMesh) -> None:
    """Brings the model to zero replicas and waits until they are gone."""
    result = await asyncio.to_thread(mesh.helios, "scale", MODEL, "0")
    assert result.returncode == 0, result.stdout + result.stderr
    await until(lambda: not mesh.replicas(), "no replica is left")


async def test_the_leader_is_killed_while_requests_wait(pair: RunningMesh) -> None:
    leads = await asyncio.to_thread(leader, pair)
    _, epoch = lease(pair)
    seen, before = Counter[str](), accepted_starts(pair)
    async with asking(pair, seen, 16):
        await until(lambda: all(held(pair).values()), "requests wait at both")
        pid = kill(pair, leads)
    assert seen == {"answered": 16}, seen
    await until(lambda: lease(pair)[0] in PROXIES and lease(pair)[1] > epoch, "a proxy leads, by another epoch")
    assert accepted_starts(pair) - before == 1
    await until(lambda: is_back(pair, leads, pid), f"{leads} is back")


@pytest.mark.soak
async def test_a_follower_is_killed_while_requests_wait(pair: RunningMesh) -> None:
    follows, seen = other(await asyncio.to_thread(leader, pair)), Counter[str]()
    await go_cold(pair)
    before, led_before = accepted_starts(pair), lease(pair)
    async with asking(pair, seen, 16):
        await until(lambda: all(held(pair).values()), "requests wait at both")
        pid = kill(pair, follows)
    assert seen == {"answered": 16}, seen
    assert accepted_starts(pair) - before == 1
    assert lease(pair) == led_before
    status = await asyncio.to_thread(pair.helios, "status")
    assert f"{led_before[0]} leads the proxies (epoch {led_before[1]})" in status.stdout, status.stdout + status.stderr
    await until(lambda: is_back(pair, follows, pid), f"{follows} is back")


@pytest.mark.soak
async def test_streams_go_on_whichever_proxy_dies(pair: RunningMesh) -> None:
    await asyncio.to_thread(leader, pair)
    seen = Counter[str]()
    async with client_of(pair) as client, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(ask(client, seen, is_streamed=True, max_tokens=800))
        await until(lambda: sum(int(r.get("load", {}).get("running_requests", 0)) for r in pair.replicas()) == 4, "run")
        for name in PROXIES:
            pid = kill(pair, name)
            await until(lambda name=name, pid=pid: is_back(pair, name, pid), f"{name} is back")
        assert not seen, "the streams were over too early"
    assert seen == {"answered": 4}, seen


@pytest.mark.soak
async def test_a_leader_that_hangs_is_replaced_and_starts_nothing_when_it_wakes(pair: RunningMesh) -> None:
    leads = await asyncio.to_thread(leader, pair)
    await go_cold(pair)
    _, epoch = lease(pair)
    seen, before, pid = Counter[str](), accepted_starts(pair), pair.pid_of(leads)
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asking(pair, seen, 8):
            pass
        assert seen == {"answered": 8}, seen
        await until(lambda: lease(pair)[0] == other(leads), "the other one leads")
        assert lease(pair)[1] > epoch
    finally:
        os.kill(pid, signal.SIGCONT)
    await until(lambda: held(pair) == dict.fromkeys(PROXIES, 0), "it speaks again, and holds nothing")
    async with asking(pair, seen, 8):
        pass
    assert seen == {"answered": 16}, seen
    assert accepted_starts(pair) - before == 1


@pytest.mark.soak
async def test_the_leader_goes_on_while_the_registry_is_away(pair: RunningMesh) -> None:
    leads = await asyncio.to_thread(leader, pair)
    # Its weights come to the node.
    result = await asyncio.to_thread(pair.helios, "preload", MODEL)
    assert result.returncode == 0, result.stdout + result.stderr
    await go_cold(pair)
    seen, before, pid = Counter[str](), accepted_starts(pair), pair.pid_of("registry")
    os.kill(pid, signal.SIGSTOP)
    try:
        # Far beyond what a lease lasts.
        await asyncio.sleep(15)
        async with asking(pair, seen, 8):
            pass
    finally:
        os.kill(pid, signal.SIGCONT)
    assert seen == {"answered": 8}, seen
    assert accepted_starts(pair) - before == 1
    assert await asyncio.to_thread(leader, pair) == leads


async def test_a_cordon_made_at_either_proxy_counts_for_both(pair: RunningMesh) -> None:
    # One that was just started has yet to hear from the worker.
    await until(lambda: all(len(look) == 1 for look in looks(pair)), "all proxies know the worker")
    worker_id = looks(pair)[0][0]["worker_id"]
    for is_cordoned in (True, False):
        verb = "cordon" if is_cordoned else "uncordon"
        answer = pair.request(f"/admin/v1/workers/{worker_id}:{verb}", b"{}", is_admin=True)
        assert answer.status == 200, answer.body
        await until(lambda expected=is_cordoned: all_say(pair, cordoned=expected), "all proxies know of it")


def looks(mesh: RunningMesh) -> list[list[dict[str, Any]]]:
    """Returns the workers as several calls in a row tell them, which Envoy spreads over the proxies."""
    return [json.loads(mesh.request("/admin/v1/workers", is_admin=True).body)["workers"] for _ in range(6)]


def all_say(mesh: RunningMesh, *, cordoned: bool) -> bool:
    """Whether all proxies say of the worker that it is cordoned, or that it is not."""
    return all(entry.get("cordoned", False) is cordoned for look in looks(mesh) for entry in look)


@contextmanager
def second_worker(mesh: RunningMesh) -> Iterator[str]:
    """Runs another worker with the settings of the mesh's own, and gives its name."""
    name, ready = "second", mesh.state / "run" / "second.ready.json"
    given = psutil.Process(mesh.pid_of("worker")).cmdline()
    other = {"worker-id": name, "node": name, "state-directory": mesh.state / name, "ready-file": ready}
    other |= {"supervisor-listen": f"unix:{mesh.state / 'run' / 'second.sock'}"}
    kept = [each for each in given if not each.startswith(tuple(f"--{key}=" for key in other))]
    with (mesh.state / "logs" / "second.log").open("ab") as log:
        flags = [f"--{key}={value}" for key, value in other.items()]
        process = subprocess.Popen([*kept, *flags], stdout=log, stderr=subprocess.STDOUT)
    try:
        mesh.wait(lambda: ready.exists() or process.poll() is not None, WAIT_SECONDS, "the second worker is ready")
        assert process.poll() is None, (mesh.state / "logs" / "second.log").read_text(errors="replace")[-4000:]
        yield name
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait(5)


def spread(mesh: RunningMesh) -> dict[str, dict[str, Any]]:
    """Returns the ready replicas of the model that is on both workers, by id, each with its worker."""
    listed = json.loads(mesh.request("/admin/v1/replicas", is_admin=True).body)["replicas"]
    found = [one["replica"] | {"worker_id": one["worker_id"]} for one in listed if one["replica"]["model"] == SPREAD]
    return {one["replica_id"]: one for one in found if one["state"] == "REPLICA_STATE_READY"}


def workers_of(mesh: RunningMesh) -> set[str]:
    return {replica["worker_id"] for replica in spread(mesh).values()}


async def count_tokens(client: httpx.AsyncClient, *, is_durable: bool) -> tuple[str, str, dict[str, int]]:
    """Streams an answer; returns its request's id, its text, and what it says it took."""
    body = {"model": SPREAD, "prompt": "ab cd", "max_tokens": 600, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "temperature": 0}
    headers = {"x-helios-durable": "true"} if is_durable else {}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]", lines[-2:]
    events = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return answer.headers["x-request-id"], text, events[-1]["usage"]


async def test_a_drained_worker_s_durable_streams_go_on_at_the_other_one(pair: RunningMesh) -> None:
    await until(lambda: all(len(look) == 1 for look in looks(pair)), "all proxies know the worker")
    first = looks(pair)[0][0]["worker_id"]
    with second_worker(pair) as second:
        try:
            await drain_while_it_streams(pair, first, second)
        finally:
            # However it went: what comes after finds the mesh as this found it, but for the model.
            answer = pair.request(f"/admin/v1/workers/{first}:uncordon", b"{}", is_admin=True)
            result = await asyncio.to_thread(pair.helios, "models", "rm", SPREAD)
            assert answer.status == 200, answer.body
            assert result.returncode == 0, result.stdout + result.stderr
            await until(lambda: not spread(pair), "no replica of it is left")


async def drain_while_it_streams(mesh: RunningMesh, first: str, second: str) -> None:
    """Drains the mesh's own worker, the first, while both have streams."""
    result = await asyncio.to_thread(mesh.helios, "models", "policy", SPREAD, "--min", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    await until(lambda: workers_of(mesh) == {first, second}, "each worker has a replica")
    (replica_id,) = (one["replica_id"] for one in spread(mesh).values() if one["worker_id"] == first)
    async with client_of(mesh) as client, asyncio.TaskGroup() as group:
        ordinary = [group.create_task(count_tokens(client, is_durable=False)) for _ in range(2)]
        durable = [group.create_task(count_tokens(client, is_durable=True)) for _ in range(6)]
        # More than the ordinary ones, so a durable one is among them.
        await until(
            lambda: int(spread(mesh)[replica_id].get("load", {}).get("running_requests", 0)) > 2, "both have some"
        )
        answer = await asyncio.to_thread(mesh.request, f"/admin/v1/workers/{first}:drain", b"{}", is_admin=True)
        assert answer.status == 200, answer.body
        assert not any(task.done() for task in durable), "the streams were over too early"
    # What ended where it began, and what moved, are the same to the last token.
    told = [task.result()[1:] for task in (*ordinary, *durable)]
    assert all(one == told[0] for one in told), told
    assert told[0][1]["completion_tokens"] == 600
    moved = [await asyncio.to_thread(moves, mesh, task.result()[0]) for task in durable]
    assert any(moved), "none was at the drained worker"
    for move in filter(None, moved):
        assert (move["is_drain"], move["left"]) == (True, replica_id)
        assert spread(mesh)[move["reached"]]["worker_id"] == second
    await until(lambda: workers_of(mesh) == {second}, "the drained worker has no replica")


def moves(mesh: RunningMesh, request_id: str) -> dict[str, Any]:
    """Returns how a request's answer moved, as `helios why` shows it; empty: it did not."""
    answer = mesh.request(f"/admin/v1/requests/{request_id}", is_admin=True)
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json["explanation"].get("moves", [])
    assert len(found) <= 1
    return found[0] if found else {}
