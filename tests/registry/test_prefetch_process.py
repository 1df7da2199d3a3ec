"""What is expected is fetched ahead: real registry and agent, usage of days, and what people ask for."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from helios.mesh.channel import Dialer
from helios.registry.client import Counts, Delta, NodePrefetches, PrefetchClient, UsageClient, hour_of
from helios.registry.usage.store import UsageStore
from helios.storage.client import StorageClient
from tests.registry.stores import opened
from tests.registry.support import Mesh, open_parts
from tests.registry.test_process import running
from tests.registry.tiny import write_model

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 60.0


@asynccontextmanager
async def agent(root: Path, mesh: Mesh, registry: str, *flags: str) -> AsyncIterator[str]:
    """Runs a storage agent; yields its address."""
    ready = root.with_name("agent-ready.json")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "helios.storage", f"--state-directory={root}", f"--registry-target={registry}"),
        *(f"--mesh.identity-directory={mesh.identity('storage').directory}", f"--ready-file={ready}", *flags),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not ready.exists():
                assert process.returncode is None, f"the agent ended with {process.returncode}"
                await asyncio.sleep(0.02)
        yield json.loads(ready.read_text())["address"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                await process.wait()


async def in_use(root: Path, directory: Path) -> dict[str, tuple[str, int]]:
    """Makes models: one that is used hourly, one never; returns revisions and sizes."""
    made: dict[str, tuple[str, int]] = {}
    hour = hour_of(datetime.now(UTC))
    async with open_parts(root) as parts:
        for seed, name in enumerate(("busy", "never")):
            done = await parts.ingest(name, write_model(directory / name, seed=seed))
            made[name] = done.model.revision.digest, done.model.revision.size_bytes
    async with opened(root / "registry.db") as database:
        deltas = [Delta("busy", hour - back, Counts(30, busy_ms=30_000)) for back in range(72)]
        await UsageStore(database).report("p", 1, deltas, now=datetime.now(UTC))
    return made


async def settled(client: PrefetchClient, revision: str) -> NodePrefetches:
    """Waits until a node has what it was to fetch."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            for node in await client.list():
                if any(order.revision == revision and order.state == "here" for order in node.orders):
                    return node
                if node.fetched_bytes and not node.orders:
                    return node
            await asyncio.sleep(0.1)


async def test_a_model_that_is_expected_is_on_the_node_before_it_is_asked_for(tmp_path: Path, mesh: Mesh) -> None:
    made = await in_use(tmp_path / "registry", tmp_path / "models")
    (busy, busy_bytes), (never, never_bytes) = made["busy"], made["never"]
    # Room for one model in the budget of an hour, and for no second one.
    budget = f"--prefetch.bytes-per-hour={busy_bytes + never_bytes // 2}"
    async with (
        running(tmp_path / "registry", mesh, "--usage.forecast-delay-seconds=0") as (_, registry),
        agent(tmp_path / "agent", mesh, registry, budget, "--node=here", "--tier.links=never") as address,
        mesh.dialer(registry, "admin-edge") as people,
        Dialer(address, identity=mesh.identity("worker"), peer="storage") as holder,
    ):
        storage, client = StorageClient(holder), PrefetchClient(people)
        node = await settled(client, busy)
        assert node.node == "here"
        assert node.fetched_bytes == busy_bytes
        assert (node.used_bytes, node.wasted_bytes) == (0, 0)
        usage = await UsageClient(people).get("busy")
        assert usage.target is not None
        # What nobody expects stays away.
        assert {one.revision for one in (await storage.residency()).revisions} == {busy}
        async with storage.materialize(busy, holder="t", ttl_seconds=30) as lent:
            assert lent.fetched_bytes == 0, "the start that was expected fetched nothing"
        async with asyncio.timeout(WAIT_SECONDS):
            while (await client.list())[0].used_bytes != busy_bytes:
                await asyncio.sleep(0.1)
        asked = await client.prefetch("never", is_dry=True)
        assert (asked.revision, asked.asked_nodes, asked.holding_nodes) == (never, ("here",), ())
        assert (await client.prefetch("busy")).holding_nodes == ("here",)
        await client.prefetch("never", node="here")
        async with asyncio.timeout(WAIT_SECONDS):
            while never not in {one.revision for one in (await storage.residency()).revisions}:
                await asyncio.sleep(0.1)
