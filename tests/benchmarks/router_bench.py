"""Helios beside the Rust router of the vLLM project (`vllm-router`, policy cache_aware), on the same machine in turns.

Both stand before replicas in C that answer at once, so that the gateway is what is measured. Of Helios there are three
ways: a model with four replicas, all scorers on, for whose requests Envoy picks, prompts read, by what the proxy says
ten times a second; the same with requests that Envoy asks the proxy about, one by one, as it does wherever keys, limits
or a rollout bear on them; and a model with one replica, which Envoy routes by itself (the express lane).

The router speaks to its workers in the clear, so like is compared with like: Helios without TLS of its own, as it runs
behind sidecars. What its mTLS costs beyond that is measured beside it, and reported without a bar.

Latency is measured at 200 requests a second; what a gateway adds is the difference to the same client at an HTTP server
of the replicas. Then each is given as much as it takes, by 64 connections. Both are reported as medians over rounds of
ratios within a round. CPU is the gateway's: the router's process, Envoy and proxy.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import psutil

from tests.benchmarks.children import cpu_seconds
from tests.benchmarks.compiled import LoadClient, Served
from tests.benchmarks.edge_mesh import EdgeMesh, running_edge
from tests.ports import free_port

LATENCY_ROUNDS: Final = 12
LOAD_ROUNDS: Final = 7
BATCH: Final = 200
PER_SECOND: Final = 200.0
CONNECTIONS: Final = 16
LOAD_CONNECTIONS: Final = 64
LOAD_SECONDS: Final = 1.5
REPLICAS: Final = 4
PICKED, ASKED, EXPRESS, ROUTER, DIRECT = "picked", "asked", "express", "router", "direct"
TLS: Final = "_tls"
OURS: Final = (EXPRESS, PICKED, ASKED, EXPRESS + TLS, PICKED + TLS)
# What the proxy alone can weigh has Envoy ask it.
_ASKING: Final = "x-helios-durable: false\r\n"
_START_SECONDS: Final = 60.0
_EXPRESS_SECONDS: Final = 30.0
# A pick takes some 150 microseconds of the proxy's time, the report of a request some 20, a pick of Envoy's 20 more.
_EXPRESS_CPU_SECONDS: Final = 75e-6
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Side:
    """Something that is measured, and the processes whose time it takes."""

    client: LoadClient
    port: int
    processes: tuple[psutil.Process, ...] = ()

    def paced(self) -> Served:
        """A batch at a fixed rate."""
        return self.client.paced(self.port, connections=CONNECTIONS, per_second=PER_SECOND, count=BATCH)

    def saturated(self) -> tuple[float, float, float]:
        """Requests a second, CPU a request in microseconds, and half of the requests' milliseconds."""
        before = self._cpu_seconds()
        served = self.client.saturating(self.port, connections=LOAD_CONNECTIONS, seconds=LOAD_SECONDS)
        return served.per_second, (self._cpu_seconds() - before) * 1e6 / served.completed, served.p50_ms

    def _cpu_seconds(self) -> float:
        return sum(cpu_seconds(process.pid) for process in self.processes)


def run() -> Iterator[dict[str, Any]]:
    """Measures; `baseline` is the router."""
    models = {EXPRESS: 1, PICKED: REPLICAS}
    with running_edge(models, http_count=REPLICAS, has_tls=False) as clear, running_edge(models) as tls:
        sides = _sides(clear, tls)
        for name in (EXPRESS, PICKED):
            _wait_express(clear, sides[name])
            _wait_express(tls, sides[name + TLS])
        for side in sides.values():
            side.paced()
        rounds = [_in_turns(sides, number, Side.paced) for number in range(LATENCY_ROUNDS)]
        yield from _latencies(rounds)
        del sides[DIRECT]
        loads = [_in_turns(sides, number, Side.saturated) for number in range(LOAD_ROUNDS)]
        yield from _loads(loads)


def _sides(clear: EdgeMesh, tls: EdgeMesh) -> dict[str, Side]:
    port = free_port()
    router = clear.children.start("router", _router(clear.http, port), clear.environment)
    direct = int(clear.http[0].rpartition(":")[2])
    sides = {
        DIRECT: Side(clear.client(PICKED), direct),
        ROUTER: Side(clear.client(PICKED), port, (router,)),
    }
    for suffix, edge in (("", clear), (TLS, tls)):
        for model in (EXPRESS, PICKED):
            sides[model + suffix] = Side(edge.client(model), edge.port, (edge.envoy, edge.proxy))
    sides[ASKED] = Side(clear.client(PICKED, headers=_ASKING), clear.port, (clear.envoy, clear.proxy))
    clear.children.wait(lambda: _answers(sides[ROUTER]), _START_SECONDS, "the router answers")
    return sides


def _router(servers: list[str], port: int) -> list[str]:
    urls = [f"http://{address}" for address in servers]
    options = {"--policy": "cache_aware", "--host": "127.0.0.1", "--port": port, "--prometheus-port": free_port()}
    flags = [str(part) for option in options.items() for part in option]
    launcher = [sys.executable, "-m", "vllm_router.launch_router"]
    return [*launcher, *flags, "--log-level", "warning", "--worker-urls", *urls]


def _answers(side: Side) -> bool:
    try:
        return bool(side.client.paced(side.port, connections=1, per_second=100, count=1))
    except RuntimeError:
        return False


def _wait_express(edge: EdgeMesh, side: Side) -> None:
    """Has the model used until Envoy routes it alone: until the proxy's time for a request is that of its report."""
    deadline = time.monotonic() + _EXPRESS_SECONDS
    while True:
        before = cpu_seconds(edge.proxy.pid)
        completed = side.client.saturating(edge.port, connections=CONNECTIONS, seconds=1.0).completed
        if (cpu_seconds(edge.proxy.pid) - before) / completed < _EXPRESS_CPU_SECONDS:
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the model is not in the express lane")


def _in_turns(sides: dict[str, Side], number: int, measure: Callable[[Side], _Result]) -> dict[str, _Result]:
    """Measures each side; who begins changes from round to round."""
    names = list(sides)
    turn = number % len(names)
    return {name: measure(sides[name]) for name in (*names[turn:], *names[:turn])}


def _latencies(rounds: list[dict[str, Served]]) -> Iterator[dict[str, Any]]:
    def added(name: str) -> list[float]:
        return [batches[name].p50_ms - batches[DIRECT].p50_ms for batches in rounds]

    router, samples = added(ROUTER), LATENCY_ROUNDS * BATCH
    baseline = statistics.median(router)
    yield _row("router_added_latency_p50", baseline, "ms", statistics.median(b[DIRECT].p50_ms for b in rounds), samples)
    for name in OURS:
        own = added(name)
        yield _row(f"{name}_added_latency_p50", statistics.median(own), "ms", baseline, samples)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(own, router, strict=True))
        yield _row(f"{name}_added_latency_ratio", ratio, "ratio", baseline, samples)


def _loads(rounds: list[dict[str, tuple[float, float, float]]]) -> Iterator[dict[str, Any]]:
    def median(name: str, which: int) -> float:
        return statistics.median(loads[name][which] for loads in rounds)

    def ratio(name: str, which: int) -> float:
        return statistics.median(loads[name][which] / loads[ROUTER][which] for loads in rounds)

    for name in OURS:
        yield _row(f"{name}_requests_ratio", ratio(name, 0), "ratio", round(median(ROUTER, 0)), LOAD_ROUNDS)
        yield _row(f"{name}_cpu_per_request", median(name, 1), "us", median(ROUTER, 1), LOAD_ROUNDS)
        yield _row(f"{name}_loaded_latency_ratio", ratio(name, 2), "ratio", median(ROUTER, 2), LOAD_ROUNDS)


def _row(name: str, value: float, unit: str, baseline: float, samples: int) -> dict[str, Any]:
    rounded = {"value": round(value, 3), "baseline": round(baseline, 3)}
    return {"name": f"edge.{name}", "unit": unit, "samples": samples, **rounded}


if __name__ == "__main__":
    for entry in run():
        print(entry)
