"""What a durable token costs: the relay and what its replica does for it, beside a token that goes by itself.

A replica of the simulated engine, which takes no processor to make tokens, answers the same streams in turns: asked by
an edge, and asked by the relay (a process of its own) that an edge asks. What is compared is the CPU of the processes
that carry tokens, Envoy aside, which both ways have; and the time to the first message, which the relay's hop adds to.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.mesh import names
from helios.mesh.channel import Dialer
from tests.benchmarks.children import Children
from tests.ports import free_port
from tests.worker.replica.support import MODEL, REVISION, Launcher, Leaves, make_spec

STREAMS: Final = 32
"""At once: as many as a replica has under load, where what leaves together shares its cost."""
TOKENS: Final = 200
STEP_SECONDS: Final = 0.01
ROUNDS: Final = 4
FIRSTS: Final = 40
"""Short requests, one after the other, of which the time to the first message is taken."""
START_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Way:
    """How tokens come: through whom, and which processes carry them."""

    dialer: Dialer
    processes: tuple[psutil.Process, ...]
    metadata: tuple[tuple[str, str], ...]

    def cpu_seconds(self) -> float:
        """What its processes have used so far."""
        times = [process.cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)

    async def stream(self, number: int, tokens: int) -> float:
        """Reads one stream to its end; returns the seconds until its first message."""
        document = {"model": MODEL, "prompt": f"{number} two three", "max_tokens": tokens, "stream": True}
        body = HttpBody(content_type="application/json", data=orjson.dumps(document))
        stub = self.dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        metadata = (*self.metadata, (names.REQUEST_ID_HEADER, f"r-{number}"))
        began, first = time.perf_counter(), 0.0
        async for _ in stub.CreateCompletion(body, metadata=metadata, timeout=60):
            first = first or time.perf_counter() - began
        return first

    async def token_seconds(self) -> float:
        """Returns the CPU of a token, many streams at once."""
        before = self.cpu_seconds()
        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(self.stream(number, TOKENS), name=f"stream {number}")
        return (self.cpu_seconds() - before) / (STREAMS * TOKENS)


def run() -> list[dict[str, Any]]:
    """Measures both ways in turns."""
    with tempfile.TemporaryDirectory(prefix="hd") as name:
        directory = Path(name)
        leaves = Leaves.issue(directory / "pki")
        launcher = Launcher("simulated")
        with Children(directory / "logs") as children:
            try:
                return asyncio.run(_measure(directory, leaves, launcher, children))
            finally:
                launcher.close()


async def _measure(directory: Path, leaves: Leaves, launcher: Launcher, children: Children) -> list[dict[str, Any]]:
    (directory / "replica").mkdir()
    options = {"decode_seconds_per_token": str(STEP_SECONDS), "prefill_seconds_per_token": "0"}
    options |= {"max_batch": str(STREAMS), "kv_bytes_per_token": "1"}
    spec = make_spec(directory / "replica", leaves, options=options, orphan_seconds=600.0, kv_cache_bytes=1 << 20)
    replica = psutil.Process(launcher.fork(spec).pid)
    relay_address = f"127.0.0.1:{free_port()}"
    relay = _start_relay(children, leaves, relay_address, directory)
    endpoint = f"{spec.host}:{spec.port}"
    routed = ((names.ROUTE_MODEL_HEADER, MODEL), (names.ROUTE_REVISION_HEADER, REVISION))
    async with AsyncExitStack() as stack:
        direct = await stack.enter_async_context(leaves.dial(endpoint))
        edge = leaves.files("edge")
        relayed = await stack.enter_async_context(Dialer(relay_address, identity=edge, peer="relay"))
        ordinary = Way(direct, (replica,), routed)
        durable = Way(relayed, (replica, relay), (*routed, (names.ENDPOINT_HEADER, endpoint)))
        return await _compare(ordinary, durable, relay)


async def _compare(ordinary: Way, durable: Way, relay: psutil.Process) -> list[dict[str, Any]]:
    costs: dict[str, list[float]] = {"ordinary": [], "durable": [], "relay": []}
    firsts: dict[str, list[float]] = {"ordinary": [], "durable": []}
    for way in (ordinary, durable):
        # Connections, and code that runs for the first time.
        await way.stream(0, TOKENS)
    for number in range(ROUNDS):
        costs["ordinary"].append(await ordinary.token_seconds())
        before = sum(relay.cpu_times()[:2])
        costs["durable"].append(await durable.token_seconds())
        costs["relay"].append((sum(relay.cpu_times()[:2]) - before) / (STREAMS * TOKENS))
        for turn in range(FIRSTS // ROUNDS):
            for name, way in (("ordinary", ordinary), ("durable", durable)):
                firsts[name].append(await way.stream(number * FIRSTS + turn, 1))
    cost = {name: statistics.median(values) * 1e6 for name, values in costs.items()}
    first = {name: statistics.median(values) * 1e3 for name, values in firsts.items()}
    return [
        _result("proxy.durable_cpu_ratio", cost["durable"] / cost["ordinary"], "ratio", cost["ordinary"], ROUNDS),
        _result("proxy.durable_token_us", cost["durable"] - cost["ordinary"], "us", cost["ordinary"], ROUNDS),
        _result("proxy.durable_relay_us", cost["relay"], "us", cost["ordinary"], ROUNDS),
        _result("proxy.durable_first_ms", first["durable"] - first["ordinary"], "ms", first["ordinary"], FIRSTS),
    ]


def _start_relay(children: Children, leaves: Leaves, address: str, directory: Path) -> psutil.Process:
    ready = directory / "relay.ready.json"
    command = [sys.executable, "-m", "helios.proxy.relay", f"--ready-file={ready}", f"--listen={address}"]
    # Nobody is asked for another replica here.
    command += ["--proxies=127.0.0.1:1", f"--mesh.identity-directory={leaves.files('relay').directory}"]
    process = children.start("relay", command)
    children.wait(ready.exists, START_SECONDS, "the relay serves")
    return process


def _result(name: str, value: float, unit: str, baseline: float, samples: int) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "baseline": round(baseline, 3),
        "samples": samples,
    }


if __name__ == "__main__":
    for entry in run():
        print(entry)
