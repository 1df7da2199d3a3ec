"""Clients that stream answers one after the other, while something happens to the replicas behind them."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.scenarios.running_mesh import QUESTION, RunningMesh

_ANSWER_SECONDS = 120.0


@dataclass
class Streamed:
    """What the clients saw. `tokens` are moments of events with text, on the monotonic clock."""

    answer_count: int = 0
    tokens: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def tokens_per_second(self, since: float, until: float) -> float:
        """Tokens of all clients together."""
        return sum(since <= at < until for at in self.tokens) / (until - since)


@contextmanager
def streaming(mesh: RunningMesh, model: str, *, clients: int, max_tokens: int) -> Iterator[Streamed]:
    """Streams for the block; at its end every answer that was begun is read to its end."""
    seen = Streamed()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                _stream(mesh, model, max_tokens, seen)
            except (OSError, AssertionError, ValueError) as error:
                seen.failures.append(f"{time.monotonic():.1f}: {error!r}")

    threads = [threading.Thread(target=run, name=f"client {number}") for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(_ANSWER_SECONDS)


def _stream(mesh: RunningMesh, model: str, max_tokens: int, seen: Streamed) -> None:
    document = {"model": model, "messages": QUESTION, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    body = json.dumps(document | {"ignore_eos": True}).encode()
    url, headers = f"http://{mesh.edge}/v1/chat/completions", {"content-type": "application/json"}
    finish, count = None, 0
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=_ANSWER_SECONDS) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            assert "choices" in event, event
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
                if choice["delta"].get("content"):
                    count += 1
                    seen.tokens.append(time.monotonic())
    assert finish == "length", f"ended as {finish} after {count} tokens"
    seen.answer_count += 1
