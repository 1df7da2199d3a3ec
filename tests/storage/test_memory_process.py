"""A real agent with a tier of sealed memory: one copy for all replicas, which outlives the agent's death."""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from helios.storage.client import Residency, StorageClient
from tests.storage.harness import AgentProcess, Mesh
from tests.storage.test_shared_pages import REPLICA, memory_of

MIB = 1 << 20
SECONDS = 60.0
"""For what takes a second or two on an idle machine; promotion is looked at every five."""

TIER = '[{"name": "memory", "kind": "memory", "capacity_bytes": %d}]'


async def wait_promoted(client: StorageClient, revision: str) -> Residency:
    async with asyncio.timeout(SECONDS):
        while True:
            residency = await client.residency()
            found = next(each for each in residency.revisions if each.revision == revision)
            if "memory" in found.tiers:
                return residency
            await asyncio.sleep(0.1)


async def test_one_copy_for_all_replicas_that_a_killed_agent_gets_back(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"model.safetensors": save({"w": np.arange(4 << 20, dtype=np.float32)})})
    # The path of a socket has 107 bytes, which a test's own directory may exceed.
    with tempfile.TemporaryDirectory(prefix="helios-", dir="/tmp") as short:
        agent = AgentProcess(mesh, Path(short) / "agent", f"--tiers={TIER % (64 * MIB)}")
        await agent.start()
        try:
            async with mesh.dial(agent.address) as dialer:
                client = StorageClient(dialer, sealed_directory=mesh.directory / "sealed")
                for _ in range(3):
                    async with client.materialize(revision, holder="use"):
                        pass
                await wait_promoted(client, revision)
                async with client.materialize(revision, holder="t", ttl_seconds=SECONDS) as lent:
                    path = Path(lent.path) / "model.safetensors"
                    assert path.is_relative_to(mesh.directory / "sealed")
                    inode = path.stat().st_ino
                    replicas = start_replicas(path)
                    try:
                        for replica in replicas:
                            rss, pss = memory_of(replica.pid, inode)
                            assert rss >= 16 << 10
                            assert pss < 0.6 * rss
                        agent.kill()
                        await agent.start()
                        residency = await wait_promoted(client, revision)
                        # The very pages that the replicas map, and nothing was read again.
                        assert {tier.name: tier.used_bytes for tier in residency.tiers}["memory"] > 16 * MIB
                        statistics = {each.tier.name: each for each in (await client.statistics()).tiers}
                        assert statistics["memory"].written_bytes == {}
                        async with client.materialize(revision, holder="later") as later:
                            assert (Path(later.path) / "model.safetensors").stat().st_ino == inode
                        lent.check()
                    finally:
                        for replica in replicas:
                            replica.communicate(timeout=20)
        finally:
            assert agent.stop() == 0
    assert not os.listdir(mesh.directory / "sealed")  # noqa: PTH208 - names are enough


def start_replicas(path: Path) -> list[subprocess.Popen[bytes]]:
    """Starts two processes that map a file and read all of it."""
    replicas = [
        subprocess.Popen([sys.executable, "-c", REPLICA, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert replica.stdout.readline().startswith(b"[4194304]")
    return replicas
