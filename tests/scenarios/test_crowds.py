"""Many clients, slow clients and clients that leave, on real processes whose engine only takes time.

A mesh of its own with ten models of the simulated engine on one device that holds two of them, so that what is tried
is everything but the engine: Envoy, holds, turns, starts, drains. What a client may see is an answer, or a 503 or 429
with Retry-After; a connection that is cut is a failure, because nothing that carries an answer is killed.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.registry import tiny
from tests.scenarios.running_mesh import RunningMesh

pytestmark = pytest.mark.timeout(900)

MODELS = tuple(f"crowd-{number}" for number in range(10))
GIB = 1 << 30
# Two replicas with their 256 MiB of KV cache and 208 MiB for processes fit, a third does not.
DEVICE_BYTES = 1_200_000_000
WORDS = "how many clients are too many"
SEED = 20261122
# Of an hour of traffic: models are idle after 15 minutes of it.
COMPRESSION = 20
HOUR_SECONDS = 3600 / COMPRESSION
IDLE_SECONDS = 900 / COMPRESSION


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    # The engine reads nothing of it.
    directory = tiny.write_model(Path(tmp_path_factory.mktemp("model")) / "tiny")
    settings = [
        f"proxy.idle_timeout_seconds={IDLE_SECONDS:.0f}",
        "proxy.replica.residency_seconds=1",
        "proxy.replica.turn_seconds=2",
        f"worker.device.memory_bytes={DEVICE_BYTES}",
        # vLLM is not imported for what it does not run.
        "worker.replica.engine=simulated",
    ]
    mesh = RunningMesh(
        Path(tmp_path_factory.mktemp("crowd")) / "state", settings, options=("--model", "", "--proxies", "2")
    )
    try:
        mesh.start()
        for name in MODELS:
            add(mesh, name, directory)
        yield mesh
    finally:
        status = mesh.stop()
    assert status == 0


def add(mesh: RunningMesh, name: str, directory: Path) -> None:
    settings = {"engine": "simulated", "options": {"start_seconds": "0.2", "decode_seconds_per_token": "0.01"}}
    document = {"name": name, "source": str(directory), "engine_settings": settings}
    answer = mesh.request("/admin/v1/models:ingest", json.dumps(document).encode(), is_admin=True)
    assert answer.status == 200, answer.body
    assert '"done"' in answer.body.decode(), answer.body


@dataclass
class Seen:
    """What clients saw, by outcome, and when each model answered last."""

    outcomes: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)

    @property
    def lost(self) -> dict[str, int]:
        """Everything that is no answer and no refusal that says when to come again."""
        return {key: count for key, count in self.outcomes.items() if key not in ("answered", "refused")}


@asynccontextmanager
async def connected(mesh: RunningMesh) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", mesh.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def request_of(model: str, *, is_streamed: bool = False, max_tokens: int = 8) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": WORDS}],
            "max_tokens": max_tokens,
            "stream": is_streamed,
            "ignore_eos": True,
        }
    )
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: mesh\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def ask(mesh: RunningMesh, model: str, seen: Seen, *, is_streamed: bool = False) -> None:
    """Sends one request on a connection of its own and notes how it ended."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(320), connected(mesh) as (reader, writer):
            writer.write(request_of(model, is_streamed=is_streamed))
            answer = await reader.read(-1)
    except (OSError, TimeoutError) as error:
        seen.outcomes[f"{type(error).__name__}"] += 1
        return
    seen.outcomes[outcome(answer)] += 1
    seen.waits.append(time.monotonic() - began)


def outcome(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.partition(b" ")[2][:3].decode()
    if status == "200":
        return "answered" if b'"total_tokens"' in body or b"[DONE]" in body else f"cut: {body[-80:]!r}"
    if status in ("503", "429") and b"\r\nretry-after: " in head.lower():
        return "refused"
    return f"{status}: {answer[:300]!r}"


async def test_a_thousand_connections_at_once_are_all_answered(crowded: RunningMesh) -> None:
    seen = Seen()
    async with asyncio.TaskGroup() as group:
        for number in range(1000):
            group.create_task(ask(crowded, MODELS[0], seen, is_streamed=number % 2 == 1))
    assert not seen.lost, seen.outcomes
    # 512 may wait for one model; who comes while it starts and finds no room comes again.
    assert seen.outcomes["answered"] >= 500, seen.outcomes
    crowded.wait(lambda: not running(crowded), 30, "nothing runs any more")


async def test_a_slow_client_holds_up_nobody_and_gets_all_of_its_answer(crowded: RunningMesh) -> None:
    with socket.create_connection(("127.0.0.1", crowded.port), timeout=60) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(request_of(MODELS[0], is_streamed=True, max_tokens=400))
        read = [await asyncio.to_thread(slow.recv, 64)]
        seen = Seen()
        for _ in range(20):
            async with asyncio.timeout(30):
                await ask(crowded, MODELS[0], seen)
        assert seen.outcomes == {"answered": 20}
        while piece := await asyncio.to_thread(slow.recv, 1 << 16):
            read.append(piece)
    text = b"".join(read).decode()
    # The first event has the role, the last one the reason.
    assert text.count('"content"') >= 400
    assert "data: [DONE]" in text


async def test_a_client_that_leaves_a_hundred_times_leaves_nothing_behind(crowded: RunningMesh) -> None:
    choose = random.Random(SEED)
    seen = Seen()
    await ask(crowded, MODELS[0], seen)
    for _ in range(100):
        async with connected(crowded) as (reader, writer):
            writer.write(request_of(MODELS[0], is_streamed=True, max_tokens=2000))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(choose.uniform(0, 0.1)):
                    await reader.read(-1)
            writer.transport.abort()
    crowded.wait(lambda: not running(crowded), 30, "the engine works for nobody any more")
    await ask(crowded, MODELS[0], seen)
    assert seen.outcomes == {"answered": 2}


async def test_ten_models_on_a_device_for_two_are_all_served_and_do_not_thrash(crowded: RunningMesh) -> None:
    """What llama-swap's users complain of: two models that are asked for in turns are loaded for each request."""
    seen = Seen()
    before = starts(crowded)
    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            for model in MODELS:
                group.create_task(ask(crowded, model, seen))
    assert seen.outcomes == {"answered": 60}, seen.outcomes
    # Each model has its turn, and serves in it whoever waits: hardly more starts than models, and not one a request.
    assert starts(crowded) - before <= 2 * len(MODELS)


def running(mesh: RunningMesh) -> int:
    loads = [replica.get("load", {}) for replica in mesh.replicas()]
    return sum(int(load.get("running_requests", 0)) + int(load.get("waiting_requests", 0)) for load in loads)


def events(mesh: RunningMesh) -> list[dict[str, Any]]:
    answer = mesh.request("/admin/v1/events?after=&until_now=true", is_admin=True)
    assert answer.status == 200, answer.body
    told = [json.loads(line) for line in answer.body.decode().removeprefix("data: ").split("\n\ndata: ")]
    return [each["event"] for each in told if "event" in each]


def starts(mesh: RunningMesh) -> int:
    return sum(event["kind"] == "FLEET_EVENT_KIND_START_BEGUN" for event in events(mesh))


@pytest.mark.soak
async def test_an_hour_of_traffic_with_proxies_and_workers_killed_loses_no_request(crowded: RunningMesh) -> None:
    """Models go from zero to one and back all the time, while the proxy and the worker are killed at random."""
    choose = random.Random(SEED)
    seen = Seen()
    doubles: list[tuple[str, int]] = []
    kills: Counter[str] = Counter()
    end = time.monotonic() + HOUR_SECONDS
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch_doubles(crowded, doubles))
        while time.monotonic() < end:
            # Few models are asked for often, and most of them rarely: Zipf.
            model = choose.choices(MODELS, [1 / (rank + 1) for rank in range(len(MODELS))])[0]
            for _ in range(choose.choice((1, 1, 1, 5))):
                group.create_task(ask(crowded, model, seen, is_streamed=choose.random() < 0.5))
            await asyncio.sleep(choose.expovariate(2.0))
            if choose.random() < 0.03:
                name = choose.choice(("proxy", "proxy-2", "worker"))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(crowded.pid_of(name), signal.SIGKILL)
                    kills[name] += 1
        # What waits has its deadline; the watch has none.
        await asyncio.sleep(0)
        watching.cancel()
    assert kills.keys() == {"proxy", "proxy-2", "worker"}, kills
    assert not seen.lost, (seen.outcomes, kills)
    assert seen.outcomes["answered"] >= 0.9 * seen.outcomes.total(), seen.outcomes
    assert not doubles, doubles
    for model in MODELS:
        last = Seen()
        await ask(crowded, model, last)
        assert last.outcomes == {"answered": 1}, f"{model} is dead: {last.outcomes}"


async def watch_doubles(mesh: RunningMesh, doubles: list[tuple[str, int]]) -> None:
    """Notes every model that had two replicas at a time, which none asks for here: a double start."""
    while True:
        await asyncio.sleep(0.2)
        with contextlib.suppress(OSError, AssertionError, ValueError):
            replicas = await asyncio.to_thread(mesh.replicas)
            staying = Counter(r["model"] for r in replicas if r["state"] != "REPLICA_STATE_DRAINING")
            doubles += [(model, count) for model, count in staying.items() if count > 1]
