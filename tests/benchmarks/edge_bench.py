"""The time that Helios adds to a warm unary request, over Envoy alone, and what it costs at rest and while tokens flow.

Two Envoys of the same binary stand before the same replicas: one with Helios's own configuration, its picks answered by
the real proxy process, which knows a hundred ready replicas of the model and scores all of them for each prompt; one
with a plain configuration before one of them. A client sends 200 requests a second to one, then to the other, in short
batches that take turns. What is reported is the median, over all rounds, of the difference between the batches' medians
(and of their 99th percentiles): what else the machine does hits both batches of a round alike.

Then 64 streams at once, of 200 tokens at 50 a second, for what the proxy takes of them; then a proxy with a hundred
workers that nobody asks anything.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

from tests.benchmarks.children import cpu_seconds
from tests.benchmarks.compiled import LoadClient, Served
from tests.benchmarks.edge_mesh import EdgeMesh, running_edge

ROUNDS: Final = 20
BATCH: Final = 300
PER_SECOND: Final = 200.0
# Requests that the 99th percentile of a busy second overlaps with.
CONNECTIONS: Final = 16
REPLICAS: Final = 100
STREAMS: Final = 64
STREAM_SECONDS: Final = 13.0
# As native/worker.c has it.
TOKENS: Final = 200
RESTING: Final = 100
REST_SECONDS: Final = 20.0
MODEL: Final = "m"


def run() -> Iterator[dict[str, Any]]:
    """Measures; `baseline` is Envoy alone, in milliseconds."""
    with running_edge({MODEL: REPLICAS}) as edge:
        ports = edge.port, edge.start_plain(edge.replicas[MODEL][0])
        client = edge.client(MODEL)
        for port in ports:
            _batch(client, port)
        rounds = [_round(client, ports, is_turned=bool(number % 2)) for number in range(ROUNDS)]
        for which in ("p50", "p99"):
            yield _added(which, rounds)
        yield _of_streams(edge)
    with running_edge({MODEL: 1}, resting_count=RESTING) as edge:
        yield _at_rest(edge)


def _batch(client: LoadClient, port: int) -> Served:
    return client.paced(port, connections=CONNECTIONS, per_second=PER_SECOND, count=BATCH)


def _round(client: LoadClient, ports: tuple[int, int], *, is_turned: bool) -> tuple[Served, Served]:
    """One batch each; the order turns round, so that none always runs after the same other one."""
    order = ports[::-1] if is_turned else ports
    batches = {port: _batch(client, port) for port in order}
    return batches[ports[0]], batches[ports[1]]


def _added(which: str, rounds: list[tuple[Served, Served]]) -> dict[str, Any]:
    helios, plain = ([getattr(batch, f"{which}_ms") for batch in side] for side in zip(*rounds, strict=True))
    added = statistics.median(h - p for h, p in zip(helios, plain, strict=True))
    return {
        "name": f"edge.added_latency_{which}",
        "value": round(added, 3),
        "unit": "ms",
        "baseline": round(statistics.median(plain), 3),
        "samples": ROUNDS * BATCH,
    }


def _of_streams(edge: EdgeMesh) -> dict[str, Any]:
    client = edge.client(MODEL, stream=True)
    before = cpu_seconds(edge.proxy.pid)
    served = client.saturating(edge.port, connections=STREAMS, seconds=STREAM_SECONDS)
    # The first stream of each connection is not counted among the completed ones.
    tokens = (served.completed + STREAMS) * TOKENS
    spent = cpu_seconds(edge.proxy.pid) - before
    value = round(spent * 100_000 / tokens, 3)
    return {
        "name": "proxy.cpu_per_100000_tokens",
        "value": value,
        "unit": "s",
        "baseline": None,
        "samples": tokens,
    }


def _at_rest(edge: EdgeMesh) -> dict[str, Any]:
    time.sleep(2.0)
    before = edge.gateway_seconds()
    time.sleep(REST_SECONDS)
    value = round((edge.gateway_seconds() - before) / REST_SECONDS, 4)
    return {"name": "proxy.idle_cores_100_workers", "value": value, "unit": "cores", "baseline": None, "samples": 1}


if __name__ == "__main__":
    for entry in run():
        print(entry)
