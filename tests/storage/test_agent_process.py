"""A real agent process: killed at the worst moment, restarted, and out of room."""

import asyncio
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from helios.mesh.errors import DiskFull, NotFound, PreconditionFailed, Unavailable
from helios.storage.client import StorageClient
from tests.storage.harness import AgentProcess, Mesh, agent_process, files_below, is_clean, raw_stream

MIB = 1 << 20


async def test_a_lease_is_resumed_after_kill_and_restart(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"w": os.urandom(MIB)})
    async with agent_process(mesh) as agent, mesh.dial(agent.address) as dialer:
        client = StorageClient(dialer)
        with raw_stream(dialer) as stream:
            ready = await stream.want(revision).ready()
            agent.kill()
        await agent.start()
        with pytest.raises(PreconditionFailed):
            await _patiently_evict(client, revision)
        async with client.materialize(revision, holder="t", lease_id=ready.lease_id) as lent:
            assert lent.path == ready.path
            assert lent.fetched_bytes == 0
            assert (Path(lent.path) / "w").stat().st_size == MIB
        assert await client.evict(revision) == MIB


async def test_the_client_keeps_its_lease_over_kill_and_restart(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"w": os.urandom(MIB)})
    async with agent_process(mesh) as agent, mesh.dial(agent.address) as dialer, mesh.dial(agent.address) as other:
        client = StorageClient(dialer)
        async with client.materialize(revision, holder="t", ttl_seconds=15) as lent:
            before = lent.expires_at
            agent.kill()
            await agent.start()
            # The client's renewal, five seconds after the one before, meets the new process.
            async with asyncio.timeout(20):
                while lent.expires_at == before and not lent.lost.is_set():
                    await asyncio.sleep(0.05)
            assert not lent.lost.is_set()
            with pytest.raises(PreconditionFailed):
                await _patiently_evict(StorageClient(other), revision)
        assert await _patiently_evict(StorageClient(other), revision) == MIB


async def test_a_lease_that_ended_while_the_agent_was_down_is_gone(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"w": os.urandom(MIB)})
    async with agent_process(mesh) as agent, mesh.dial(agent.address) as dialer:
        client = StorageClient(dialer)
        async with client.materialize(revision, holder="t", ttl_seconds=5, keep=True) as lent:
            pass
        agent.kill()
        await asyncio.sleep(5)
        await agent.start()
        with pytest.raises(NotFound) as raised:
            async with client.materialize(revision, holder="t", lease_id=lent.lease_id):
                pytest.fail("an ended lease was resumed")
        assert raised.value.reason == "LEASE_NOT_FOUND"
        async with client.materialize(revision, holder="t") as again:
            assert again.fetched_bytes == 0


async def test_a_kill_during_a_fetch_leaves_nothing_after_the_next_start(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"w": os.urandom(256 * MIB)})
    async with agent_process(mesh, "--tier.links=never") as agent, mesh.dial(agent.address) as dialer:
        with raw_stream(dialer) as stream:
            stream.want(revision)
            async with asyncio.timeout(20):
                while not (unfinished := list((agent.root / "tmp").iterdir())):
                    await asyncio.sleep(0.001)
            agent.kill()
        assert unfinished[0].exists()
        assert not files_below(agent.root / "blobs")
        await agent.start()
        assert is_clean(agent.root)
        async with StorageClient(dialer).materialize(revision, holder="t", ttl_seconds=60) as lent:
            assert lent.fetched_bytes == 256 * MIB


async def test_a_second_agent_on_the_same_root_is_refused(mesh: Mesh) -> None:
    async with agent_process(mesh) as agent:
        second = AgentProcess(mesh, agent.root)
        with pytest.raises(AssertionError, match="ended while starting"):
            await second.start()
        assert second.stop() == 1


async def test_stops_when_asked(mesh: Mesh) -> None:
    revision = mesh.shelf.add({"w": b"w"})
    async with agent_process(mesh) as agent, mesh.dial(agent.address) as dialer:
        with raw_stream(dialer) as stream:
            await stream.want(revision).ready()
        assert await asyncio.to_thread(agent.stop) == 0


@pytest.fixture(params=["file size limit", *(["full disk"] if os.geteuid() == 0 else [])])
def small_root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A root without room for 16 MiB, and whether that takes a limit: mounting is root's, a limit is everybody's."""
    root = tmp_path / "small"
    root.mkdir()
    if request.param == "file size limit":
        yield root, True
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", root], check=True)
    try:
        yield root, False
    finally:
        subprocess.run(["umount", root], check=True)


async def test_a_full_disk_is_said_and_leaves_nothing(mesh: Mesh, small_root: tuple[Path, bool]) -> None:
    root, is_limited = small_root
    small, large = mesh.shelf.add({"w": os.urandom(MIB)}), mesh.shelf.add({"a": os.urandom(MIB), "w": bytes(16 * MIB)})
    async with (
        agent_process(mesh, "--tier.links=never", root=root) as agent,
        mesh.dial(agent.address) as dialer,
    ):
        if is_limited:
            resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (8 * MIB, 8 * MIB))
        client = StorageClient(dialer)
        with pytest.raises(DiskFull) as raised:
            async with client.materialize(large, holder="t"):
                pytest.fail("more than there is room for was lent")
        assert raised.value.reason == "DISK_FULL"
        assert raised.value.metadata["errno"] == ("EFBIG" if is_limited else "ENOSPC")
        assert is_clean(root)
        async with client.materialize(small, holder="t") as lent:
            assert (Path(lent.path) / "w").stat().st_size == MIB
        assert psutil.Process(agent.pid).is_running()


async def _patiently_evict(client: StorageClient, revision: str) -> int:
    """Evicts, once the channel has met the new process."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await client.evict(revision)
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_a_copy_in_memory_outlives_the_agent_and_the_stock_library_maps_it(
    mesh: Mesh, scratch_path: Path
) -> None:
    """A tier of a tmpfs by a flag: filled by use, found again after a kill, lent to who loads by path."""
    weights = np.arange(1 << 20, dtype=np.float32)
    revision = mesh.shelf.add({"model.safetensors": save({"w": weights})})
    tier = {"name": "ram", "kind": "memory", "path": str(scratch_path / "ram"), "capacity_bytes": 64 * MIB}
    async with (
        agent_process(mesh, "--tier.links=never", f"--tiers={json.dumps(tier)}") as agent,
        mesh.dial(agent.address) as dialer,
    ):
        client = StorageClient(dialer)
        for _ in range(3):
            async with client.materialize(revision, holder="t"):
                pass
        async with asyncio.timeout(60):
            while (await client.residency()).revisions[0].tiers != ("ram", "disk"):
                await asyncio.sleep(0.1)
        agent.kill()
        await agent.start()
        async with client.materialize(revision, holder="t") as lent:
            assert Path(lent.path).is_relative_to(scratch_path)
            with safe_open(Path(lent.path) / "model.safetensors", framework="numpy") as opened:
                assert np.array_equal(opened.get_tensor("w"), weights)
        memory, disk = (await client.statistics()).tiers
        assert (memory.tier.kind, memory.hit_count, disk.hit_count) == ("memory", 1, 0)
