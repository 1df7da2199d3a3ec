"""What a storage agent takes while nothing happens: memory and cores of a real process with mTLS, tiers and a revision.

Memory is what the process has to itself (USS: private pages, clean and dirty): what the node gets back if it ends. RSS
would count the interpreter's and gRPC's libraries in full, which every Helios process of the node maps, and PSS a share
of them that depends on who else runs; both are reported. CPU time covers the looks at marks, heat, leases and scrubs
that never end.
"""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from helios.mesh.identity import CertificateAuthority
from helios.storage.client import StorageClient
from tests.storage.harness import AgentProcess, Mesh, make_shelf, serve_registry

SETTLE_SECONDS = 5.0
"""The first looks, which import and open what they need."""

SECONDS = 30.0
"""Six looks of the mover, thirty at leases; the kernel counts CPU time in steps of 10 ms, a thirtieth of a percent."""

MODEL_BYTES = 64 << 20
TIERS = '[{"name": "memory", "kind": "memory", "capacity_bytes": 268435456}]'


def run() -> list[dict[str, Any]]:
    """Measures one agent."""
    return asyncio.run(_run())


async def _run() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="rest-bench-") as name:
        directory = Path(name)
        authority = CertificateAuthority.open(directory / "ca")
        shelf = make_shelf(directory / "registry" / "blobs")
        shelf.base.mkdir(parents=True)
        async with serve_registry(shelf, authority.issue("registry", directory / "pki" / "registry")) as address:
            mesh = Mesh(directory, authority, shelf, address)
            revision = shelf.add({"model.safetensors": os.urandom(MODEL_BYTES)})
            agent = AgentProcess(mesh, directory / "storage", f"--tiers={TIERS}")
            await agent.start()
            try:
                async with (
                    mesh.dial(agent.address) as dialer,
                    StorageClient(dialer).materialize(revision, holder="bench"),
                ):
                    # It is given back at once: what is at rest is lent to nobody.
                    pass
                return await _measure(psutil.Process(agent.pid))
            finally:
                agent.stop()


async def _measure(process: psutil.Process) -> list[dict[str, Any]]:
    await asyncio.sleep(SETTLE_SECONDS)
    before, started = process.cpu_times(), time.monotonic()
    await asyncio.sleep(SECONDS)
    after, seconds = process.cpu_times(), time.monotonic() - started
    cpu_seconds = after.user + after.system - before.user - before.system
    memory = process.memory_full_info()
    return [
        _result("storage.agent_rest_mib", memory.uss / (1 << 20), "MiB"),
        _result("storage.agent_rest_pss_mib", memory.pss / (1 << 20), "MiB"),
        _result("storage.agent_rest_rss_mib", memory.rss / (1 << 20), "MiB"),
        _result("storage.agent_rest_core_percent", 100 * cpu_seconds / seconds, "percent"),
    ]


def _result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 2), "unit": unit, "baseline": None, "samples": 1}


if __name__ == "__main__":
    for entry in run():
        print(entry)
