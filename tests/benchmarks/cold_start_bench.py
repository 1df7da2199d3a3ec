"""From a request for a model that runs nowhere to its first streamed token, beside a `vllm serve` that is started cold.

A whole mesh is up with its model at zero: weights on the node's disk, launcher warm. A raw client asks over the public
address and stops the clock at the first text. vLLM's own server is started between the rounds, eager and with the same
flags, and the clock runs from its exec to the first text of the same request; once the server is started as it is by
default, with compilation (its compile cache is the user's, warm from the second run on a machine on).

Phases are what the mesh says of the same requests (`helios why`): they add up to the time from the edge to the first
token, `unexplained` included; `client` is what the client measured beyond that. The second model has the same weights
under another name, and starts while the first one streams on its core.

`python -m tests.benchmarks.cold_start_bench --quick` leaves the default server out and takes fewer rounds; `make bench`
does not.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.children import Children
from tests.benchmarks.stock import EAGER, KV_CACHE_BYTES, is_listening, start_stock
from tests.benchmarks.streams import first_token_seconds, stream_all
from tests.scenarios.running_mesh import MODEL, PROMPT, RunningMesh

SECOND_MODEL: Final = "second"
# Cold starts of Helios before each one of the stock server; one takes a second, the other half a minute.
STARTS_A_ROUND: Final = 5
ROUNDS: Final = 3
SECOND_STARTS: Final = 5
ANSWER_SECONDS: Final = 120.0
# A compiling start takes 100 to 130 s on two quiet cores.
STOCK_SECONDS: Final = 600.0
# Between two starts: the tree of the last one is gone, its memory is back and the cores are idle.
REST_SECONDS: Final = 0.5
# As long as the context allows: the stream must outlast the second model's start.
STREAM_TOKENS: Final = 1500

Start = Mapping[str, float]


def run(*, is_quick: bool = False) -> Iterator[dict[str, Any]]:
    """Measures; `baseline` of the ratios is the other server's time in seconds."""
    with tempfile.TemporaryDirectory(prefix="hc") as name:
        sizes = [f"proxy.replica.{bound}_kv_cache_bytes={KV_CACHE_BYTES}" for bound in ("min", "max")]
        mesh = RunningMesh(Path(name, "state"), sizes)
        mesh.start()
        try:
            yield from _measure(mesh, Path(name), is_quick=is_quick)
        finally:
            mesh.stop()


def _measure(mesh: RunningMesh, directory: Path, *, is_quick: bool) -> Iterator[dict[str, Any]]:
    first = first_token_seconds(mesh.port, _body(MODEL), timeout_seconds=ANSWER_SECONDS)
    yield _row("worker.cold_start_first_seconds", first, "s", None, 1)
    (config,) = (mesh.state / "storage" / "views").rglob("config.json")
    weights = config.parent
    starts: list[Start] = []
    eager: list[float] = []
    for _ in range(1 if is_quick else ROUNDS):
        starts += [_start(mesh, MODEL) for _ in range(STARTS_A_ROUND)]
        mesh.go_cold()
        eager.append(_stock_seconds(directory, weights, EAGER))
    ours = statistics.median(start["whole"] for start in starts)
    yield _row("worker.cold_start_seconds", ours, "s", None, len(starts))
    for phase in dict.fromkeys(name for start in starts for name in start if name != "whole"):
        seconds = statistics.median(start.get(phase, 0.0) for start in starts)
        yield _row(f"worker.cold_start_phase_{phase}", seconds, "s", None, len(starts))
    yield _ratio("worker.cold_start_ratio_eager", ours, statistics.median(eager), len(eager))
    second = [_second_start(mesh, weights) for _ in range(2 if is_quick else SECOND_STARTS)]
    yield _ratio("worker.cold_start_second_model_ratio", statistics.median(second), ours, len(second))
    if not is_quick:
        yield _ratio("worker.cold_start_ratio_default", ours, _stock_seconds(directory, weights, ()), 1)


def _start(mesh: RunningMesh, model: str) -> Start:
    """Returns the seconds of one cold start: `whole` and its phases by name."""
    mesh.go_cold()
    time.sleep(REST_SECONDS)
    whole = first_token_seconds(mesh.port, _body(model), timeout_seconds=ANSWER_SECONDS)
    phases = _phases(mesh, model)
    return {"whole": whole, **phases, "client": whole - sum(phases.values())}


def _phases(mesh: RunningMesh, model: str) -> dict[str, float]:
    """Returns what the mesh says of the last request: seconds by phase, which add up to its first token."""

    def last() -> dict[str, Any]:
        answer = mesh.request(f"/admin/v1/requests?model={model}&page_size=1", is_admin=True)
        return dict(next(iter(answer.json.get("requests", ())), {}))

    # The replica's account of it comes a moment after its first token did.
    mesh.wait(lambda: "time_to_first_token" in last(), ANSWER_SECONDS, "the request is accounted for")
    answer = mesh.request(f"/admin/v1/requests/{last()['request_id']}", is_admin=True)
    entries = answer.json["explanation"]["phases"]
    return {entry["phase"]: float(entry["duration"].removesuffix("s")) for entry in entries}


def _second_start(mesh: RunningMesh, weights: Path) -> float:
    """Returns the seconds of a cold start of another model while the first one streams."""
    if SECOND_MODEL not in mesh.helios("models", "list").stdout:
        done = mesh.helios("models", "add", SECOND_MODEL, str(weights))
        assert done.returncode == 0, done.stdout + done.stderr
        # Brings its revision to the node, as the first start of the first model did.
        first_token_seconds(mesh.port, _body(SECOND_MODEL), timeout_seconds=ANSWER_SECONDS)
    done = mesh.helios("scale", SECOND_MODEL, "0")
    assert done.returncode == 0, done.stdout + done.stderr
    mesh.wait(lambda: not _replicas_of(mesh, SECOND_MODEL), ANSWER_SECONDS, "the second model is at zero")
    first_token_seconds(mesh.port, _body(MODEL), timeout_seconds=ANSWER_SECONDS)
    bodies = [_body(MODEL, max_tokens=STREAM_TOKENS, ignore_eos=True)]
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(stream_all, mesh.port, bodies, timeout_seconds=ANSWER_SECONDS)
        time.sleep(REST_SECONDS)
        seconds = first_token_seconds(mesh.port, _body(SECOND_MODEL), timeout_seconds=ANSWER_SECONDS)
        was_streaming = not streaming.done()
        streamed_seconds, tokens = streaming.result()
    assert was_streaming, (
        f"the start took {seconds:.2f} s, the stream beside it {streamed_seconds:.2f} s ({tokens} tokens)"
    )
    return seconds


def _replicas_of(mesh: RunningMesh, model: str) -> list[dict[str, Any]]:
    return [replica for replica in mesh.replicas() if replica["model"] == model]


def _stock_seconds(directory: Path, weights: Path, switches: tuple[str, ...]) -> float:
    """Returns the seconds from the exec of vLLM's own server to the first text."""
    with Children(directory / "logs") as children:
        begin = time.perf_counter()
        port = start_stock(children, directory, weights, switches)
        children.wait(lambda: is_listening(port), STOCK_SECONDS, "vLLM's server takes connections")
        first_token_seconds(port, _body(MODEL), timeout_seconds=ANSWER_SECONDS)
        return time.perf_counter() - begin


def _body(model: str, **fields: Any) -> bytes:
    document = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(document | fields).encode()


def _ratio(name: str, ours: float, theirs: float, samples: int) -> dict[str, Any]:
    return _row(name, ours / theirs, "ratio", theirs, samples)


def _row(name: str, value: float, unit: str, baseline: float | None, samples: int) -> dict[str, Any]:
    shown = None if baseline is None else round(baseline, 3)
    return {"name": name, "value": round(value, 5), "unit": unit, "baseline": shown, "samples": samples}


if __name__ == "__main__":
    for entry in run(is_quick="--quick" in sys.argv[1:]):
        print(entry)
