"""Prefix affinity against picks by load alone, on a workload of shared prefixes with the real model.

Two replicas, eight conversations with long system prompts of their own, two clients that take the conversations in a
new order each round. A replica's KV cache has room for five of the prompts: all eight fit into both together where each
conversation stays in one place, and drive one another out where load alone decides, which with two clients goes round
(four of ten prompts are not where they are sent: the mean and the slow ones tell, the median does not).
Two meshes, one after the other, so that the ratio is of one machine within minutes; the same seeds in both.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.benchmarks.streams import first_token_seconds, stream_all
from tests.scenarios.running_mesh import MODEL, RunningMesh

CONVERSATIONS: Final = 8
CLIENTS: Final = 2
ROUNDS: Final = 4
ANSWER_SECONDS: Final = 120.0
# 7,281 tokens of this model.
KV_CACHE_BYTES: Final = 160 << 20
WORDS: Final = ("river", "bread", "chess", "star", "ship", "glass", "map", "wool", "stone", "violin", "market", "lamp")


class Arm(NamedTuple):
    """What one mesh did: seconds to the first token, one a request, and tokens per second, one a round."""

    first_token_seconds: list[float]
    tokens_per_second: list[float]


def run() -> Iterator[dict[str, Any]]:
    """Measures; `baseline` is what picks by load alone took."""
    with _mesh("proxy.routing.prefix_weight=0") as port:
        by_load = _measure(port)
    with _mesh() as port:
        by_prefix = _measure(port)
    for name, of in (("mean", statistics.fmean), ("p90", _p90)):
        base, ours = (of(arm.first_token_seconds) for arm in (by_load, by_prefix))
        yield _row(f"proxy.affinity_ttft_{name}_ratio", ours / base, base, len(by_prefix.first_token_seconds))
    base, ours = (statistics.median(arm.tokens_per_second) for arm in (by_load, by_prefix))
    yield _row("proxy.affinity_tokens_per_second_ratio", ours / base, base, ROUNDS)


@contextmanager
def _mesh(*settings: str) -> Iterator[int]:
    """A mesh with two replicas."""
    with tempfile.TemporaryDirectory(prefix="ha") as name:
        sizes = [f"proxy.replica.{bound}_kv_cache_bytes={KV_CACHE_BYTES}" for bound in ("min", "max")]
        mesh = RunningMesh(Path(name, "state"), [*sizes, *settings])
        mesh.start()
        try:
            mesh.helios("scale", MODEL, "2")
            mesh.wait(lambda: len(mesh.ready_replicas()) == CLIENTS, ANSWER_SECONDS, "two replicas are ready")
            yield mesh.port
        finally:
            mesh.stop()


def _measure(port: int) -> Arm:
    order = random.Random(7)
    first: list[float] = []
    rates: list[float] = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        # The first round fills the caches of both meshes.
        for number in range(1 + ROUNDS):
            bodies = [_body(talk, number) for talk in order.sample(range(CONVERSATIONS), CONVERSATIONS)]
            seconds = list(clients.map(lambda body: first_token_seconds(port, body, timeout_seconds=60), bodies))
            bodies = [_body(talk, -number) for talk in order.sample(range(CONVERSATIONS), CONVERSATIONS)]
            begin = time.perf_counter()
            tokens = sum(clients.map(lambda body: stream_all(port, [body], timeout_seconds=60)[1], bodies))
            if number:
                first += seconds
                rates.append(tokens / (time.perf_counter() - begin))
    return Arm(first, rates)


def _body(talk: int, number: int) -> bytes:
    """A question after a system prompt of some 1,500 tokens, which only its talk has."""
    words = random.Random(talk)
    system = f"Talk {talk}. " + " ".join(words.choice(WORDS) for _ in range(1400))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}?"}]
    limits = {"max_tokens": 16, "ignore_eos": True, "temperature": 0, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    return json.dumps({"model": MODEL, "messages": messages, **limits, **usage}).encode()


def _p90(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.9)]


def _row(name: str, value: float, baseline: float, samples: int) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "unit": "ratio", "baseline": baseline, "samples": samples}


if __name__ == "__main__":
    for entry in run():
        print(entry)
