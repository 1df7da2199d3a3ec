"""Tokens per second, and CPU time per token outside the engine, against vLLM's own HTTP server.

A whole mesh (Envoy, proxy, worker, replica) and ``vllm serve`` are up at the same time, with the same weights, flags
and cores; one of them has work at a time, and they take turns. Streams are greedy chat completions of 64 tokens, as
server-sent events over HTTP. What is reported are medians of the rounds' ratios: what else the machine does hits both
halves of a round alike.

Outside the engine means: Envoy, the proxy, the worker's supervisor and the replica's front process here, the API server
there; EngineCore and Worker, which are vLLM's on both sides, are left out.

Both also answer the same prompts greedily, one at a time, and must draw the same tokens. At the end a server with
vLLM's defaults, which compile, takes turns with the mesh: the price in steady state of a replica that starts eagerly.
Then the mesh is told to swap its eager replica for a compiled one, and they take turns again.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from tests.benchmarks.children import Children, cpu_seconds
from tests.benchmarks.stock import EAGER, KV_CACHE_BYTES, is_listening, listener, start_stock
from tests.benchmarks.streams import stream_all
from tests.ports import free_port
from tests.scenarios.running_mesh import HELIOS, MODEL

# Streams → rounds: short ones are noisier.
ROUNDS: Final = {1: 6, 8: 10, 32: 8, 64: 6}
COMPILED_ROUNDS: Final = {1: 2, 8: 2, 32: 2}
TOKENS: Final = 64
PROMPTS: Final = 50
# A server that compiles takes 100 to 130 s on two quiet cores.
START_SECONDS: Final = 600.0
STREAM_SECONDS: Final = 240.0
REST_SECONDS: Final = 60.0
# Name of the result → field of a sample.
_MEASURED: Final = {"tokens_per_second": "tokens_per_second", "cpu_per_token": "cpu_seconds_per_token"}
TOPICS: Final = ("rivers", "bread", "chess", "stars", "ships", "glass", "maps", "wool")


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    ``outside`` are the processes whose CPU time counts; a turn begins when ``everything``, both sides, is at rest.
    """

    port: int
    model: str
    outside: Sequence[int]
    everything: Children


@dataclass(frozen=True)
class Sample:
    """One turn of one side."""

    tokens_per_second: float
    cpu_seconds_per_token: float


def run() -> list[dict[str, Any]]:
    """Measures; `baseline` is the median of vLLM's own server, in tokens/s and in CPU seconds per token."""
    with tempfile.TemporaryDirectory(prefix="hb") as name, Children(Path(name, "logs")) as children:
        state = Path(name, "state")
        port = _start_mesh(children, state)
        front = _front_of(state)
        stock_port = _start_stock(children, Path(name), _weights(state))
        helios = Side(port, MODEL, [*_pids(state, "envoy", "proxy", "worker"), front.pid], children)
        stock = Side(stock_port, MODEL, [_stock_server(front, stock_port)], children)
        results: list[dict[str, Any]] = []
        for streams, rounds in ROUNDS.items():
            pairs = _take_turns(helios, stock, streams, rounds)
            results += [_ratio(name, field, pairs, streams) for name, field in _MEASURED.items()]
        results.append(_identical(helios, stock))
        compiled_port = _start_stock(children, Path(name), _weights(state), ())
        compiled = Side(compiled_port, MODEL, [], children)
        for streams, rounds in COMPILED_ROUNDS.items():
            pairs = _take_turns(helios, compiled, streams, rounds)
            results.append(_ratio("compiled_tokens_per_second", "tokens_per_second", pairs, streams))
        if _swap(state, port):
            swapped = Side(port, MODEL, [], children)
            for streams, rounds in COMPILED_ROUNDS.items():
                pairs = _take_turns(swapped, compiled, streams, rounds)
                results.append(_ratio("swapped_tokens_per_second", "tokens_per_second", pairs, streams))
    return results


def _swap(state: Path, port: int) -> bool:
    """Uses the model until a compiled replica has taken its eager one's place; False where that took too long."""
    place = ("--state-dir", str(state))
    for command in (("models", "set", MODEL, "--set", "compilation=eager_then_compiled"), ("scale", MODEL, "0")):
        subprocess.run([HELIOS, *command, *place], check=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        stream_all(port, _bodies(MODEL, 1), timeout_seconds=START_SECONDS)
        status = subprocess.run([HELIOS, "status", "--json", *place], check=True, capture_output=True)
        replicas = [entry["replica"] for entry in json.loads(status.stdout)["replicas"]]
        if [replica["compilation"] for replica in replicas] == ["COMPILATION_MODE_COMPILED"]:
            return True
    print(f"no compiled replica took over within {START_SECONDS:.0f} s")
    return False


def _take_turns(helios: Side, stock: Side, streams: int, rounds: int) -> list[tuple[Sample, Sample]]:
    for side in (helios, stock):
        _turn(side, streams)
    pairs: list[tuple[Sample, Sample]] = []
    for number in range(rounds):
        # The order turns round each time, so that none always runs after the same other one.
        if number % 2:
            second = _turn(stock, streams)
            pairs.append((_turn(helios, streams), second))
        else:
            pairs.append((_turn(helios, streams), _turn(stock, streams)))
    return pairs


def _ratio(name: str, field: str, pairs: Sequence[tuple[Sample, Sample]], streams: int) -> dict[str, Any]:
    return {
        "name": f"worker.{name}_ratio_{streams}",
        "value": round(statistics.median(getattr(h, field) / getattr(s, field) for h, s in pairs), 3),
        "unit": "ratio",
        "baseline": float(f"{statistics.median(getattr(s, field) for _, s in pairs):.4g}"),
        "samples": len(pairs),
    }


def _identical(helios: Side, stock: Side) -> dict[str, Any]:
    """The share of prompts that both sides answer with the same tokens."""
    prompts = [
        f"Write {1 + index % 5} sentences about {TOPICS[index % len(TOPICS)]}, number {index}."
        for index in range(PROMPTS)
    ]
    same = sum(_greedy_tokens(helios, prompt) == _greedy_tokens(stock, prompt) for prompt in prompts)
    value = same / PROMPTS
    return {"name": "worker.greedy_identical", "value": value, "unit": "ratio", "baseline": None, "samples": PROMPTS}


def _greedy_tokens(side: Side, prompt: str) -> list[int]:
    body = {"model": side.model, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    body |= {"messages": [{"role": "user", "content": prompt}]}
    url = f"http://127.0.0.1:{side.port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=STREAM_SECONDS) as response:
        (choice,) = json.load(response)["choices"]
    tokens: list[int] = choice["token_ids"]
    assert tokens, "the server names token ids"
    return tokens


def _turn(side: Side, streams: int) -> Sample:
    side.everything.wait_at_rest(REST_SECONDS)
    before = sum(map(cpu_seconds, side.outside))
    seconds, tokens = stream_all(side.port, _bodies(side.model, streams), timeout_seconds=STREAM_SECONDS)
    assert tokens == streams * TOKENS, (tokens, streams)
    return Sample(tokens / seconds, (sum(map(cpu_seconds, side.outside)) - before) / tokens)


def _bodies(model: str, streams: int) -> list[bytes]:
    return [
        json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell story {index} of {TOPICS[index % len(TOPICS)]}."}],
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for index in range(streams)
    ]


def _start_mesh(children: Children, state: Path) -> int:
    """Starts a mesh and a replica; returns the public port."""
    port = free_port()
    sizes = [f"--set=proxy.replica.{bound}_kv_cache_bytes={KV_CACHE_BYTES}" for bound in ("min", "max")]
    command = [HELIOS, "up", "--state-dir", str(state), "--port", str(port), "--admin-port", str(free_port()), *sizes]
    children.start("mesh", command)
    children.wait(lambda: _record(state).get("state") == "ready", START_SECONDS, "the mesh is ready")
    stream_all(port, _bodies(MODEL, 1), timeout_seconds=START_SECONDS)
    # The first start of a model on a node has its weights packed behind it, for the later ones: what is measured is one
    # of those, with nothing behind it.
    packed = state / "worker" / "packed"
    children.wait(lambda: any(packed.glob("*/manifest.json")), START_SECONDS, "the weights are packed")
    subprocess.run([HELIOS, "scale", MODEL, "0", "--state-dir", str(state)], check=True, stdout=subprocess.DEVNULL)
    children.wait(lambda: not _engines(state), START_SECONDS, "the first replica is gone")
    stream_all(port, _bodies(MODEL, 1), timeout_seconds=START_SECONDS)
    return port


def _start_stock(children: Children, directory: Path, weights: Path, switches: Sequence[str] = EAGER) -> int:
    """Starts vLLM's own server with what a replica of Helios has and waits for it; returns its port."""
    port = start_stock(children, directory, weights, switches)
    children.wait(lambda: is_listening(port), START_SECONDS, "vLLM's server is ready")
    return port


def _stock_server(front: psutil.Process, port: int) -> int:
    """Returns the API server's pid, having checked that both sides compute on the same cores.

    What serves and schedules is where each side puts it: vLLM binds its Worker alone and leaves the rest to the kernel.
    """
    server = listener(port)
    (ours,) = _named(front, "VLLM::EngineCor")
    (computing,) = _named(server, "VLLM::Worker")
    assert os.sched_getaffinity(ours) == os.sched_getaffinity(computing), "both compute on the same cores"
    return server.pid


def _named(ancestor: psutil.Process, name: str) -> list[int]:
    """The descendants whose name begins so; the kernel keeps 15 characters of one."""
    return [process.pid for process in ancestor.children(recursive=True) if process.name().startswith(name)]


def _front_of(state: Path) -> psutil.Process:
    """The replica's own process: of the worker's descendants, the parent of the one that calls itself EngineCore."""
    for pid in _engines(state):
        if (parent := psutil.Process(pid).parent()) is not None:
            return parent
    raise RuntimeError("no replica runs")


def _engines(state: Path) -> list[int]:
    """The processes that compute."""
    (worker,) = _pids(state, "worker")
    return _named(psutil.Process(worker), "VLLM::EngineCor")


def _weights(state: Path) -> Path:
    """The directory that the replica loaded from."""
    (config,) = (state / "storage" / "views").rglob("config.json")
    return config.parent


def _record(state: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((state / "run" / "mesh.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _pids(state: Path, *names: str) -> list[int]:
    found = {entry["name"]: int(entry["pid"]) for entry in _record(state)["processes"]}
    return [found[name] for name in names]


if __name__ == "__main__":
    for entry in run():
        print(entry)
