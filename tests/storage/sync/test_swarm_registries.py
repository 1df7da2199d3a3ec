"""Two registries on one PostgreSQL, agents at either, and SeaweedFS: a model that all pull comes from there once.

One of the registries brings the agents of both together; when it is killed, the other one does (in the long form).
"""

import asyncio
import json
import os
import random
import secrets
from contextlib import AsyncExitStack
from pathlib import Path

import psycopg
import pytest

from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority
from helios.registry.client import RegistryClient, SyncClient
from helios.registry.coordination.seats import LEASE
from tests.emulators.servers import Emulator
from tests.registry import tiny
from tests.registry.postgresql import postgresql
from tests.registry.support import Mesh as RegistryMesh
from tests.registry.test_process import ingest, running
from tests.storage.harness import Mesh, agent_process, make_shelf
from tests.storage.sync.test_swarm_bucket import LARGE_BYTES, pull, wait_indexed

pytestmark = pytest.mark.slow

WAIT_SECONDS = 60.0
NODES = ("one", "two", "three")


async def wait_agents(registry: Dialer, *nodes: str) -> None:
    """Waits until a registry tells of these agents, wherever they are connected."""
    async with asyncio.timeout(WAIT_SECONDS):
        while [agent.node for agent in await SyncClient(registry).list_agents()] != sorted(nodes):
            await asyncio.sleep(0.05)


def write_model(directory: Path, seed: int) -> None:
    tiny.write_big(directory, LARGE_BYTES)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-LARGE_BYTES, os.SEEK_END)
        file.write(random.Random(seed).randbytes(LARGE_BYTES))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.soak)])
async def test_a_bucket_is_read_once_by_the_agents_of_two_registries(
    tmp_path: Path, seaweedfs_server: Emulator, seaweedfs_bucket: str, count: int
) -> None:
    nodes = NODES[:count]
    certificates = RegistryMesh(tmp_path / "pki")
    authority = CertificateAuthority.open(tmp_path / "pki")
    for number in (1, 2):
        write_model(tmp_path / f"model-{number}", number)
    own = json.dumps({name: value for name, value in seaweedfs_server.options.items() if "endpoint" not in name})
    with postgresql() as server:
        async with AsyncExitStack() as stack:
            stack.enter_context(server.running())
            flags = (
                f"--database-url={server.make_database('registry')}",
                f"--blob-store.url=s3://{seaweedfs_bucket}/{secrets.token_hex(4)}",
                # A registry that a busy machine holds up must not lose its seat in the middle.
                f"--sync.coordinator-seconds={30 if count == 2 else 5}",
            )
            registries = [
                await stack.enter_async_context(
                    running(tmp_path / name, certificates, *flags, environment=seaweedfs_server.environment())
                )
                for name in ("first", "second")
            ]
            leader = await coordinator(server.url("registry"))
            registries.sort(key=lambda registry: registry[1] != leader)
            admins = [
                await stack.enter_async_context(certificates.dialer(address, "admin-edge")) for _, address in registries
            ]
            storage = await stack.enter_async_context(certificates.dialer(registries[1][1], "storage"))
            client = RegistryClient(admins[1])
            meshes = [Mesh(tmp_path, authority, make_shelf(tmp_path), address) for _, address in registries]
            agents = []
            for node, mesh in zip(nodes, (*meshes, meshes[1]), strict=False):
                flag = f"--fetch.stores.s3={own}"
                agents.append(
                    await stack.enter_async_context(agent_process(mesh, f"--node={node}", flag, root=tmp_path / node))
                )
            for admin in admins:
                await wait_agents(admin, *nodes)

            # What agents tell is counted since their start.
            read_before: dict[int, int] = {}

            async def check_read_once(name: str, model: str, pulling: list[int]) -> None:
                revision = (await ingest(client, name, tmp_path / model)).model.revision.digest
                entries = (await client.get_manifest(revision)).manifest.entries
                weights = max((entry.digest for entry in entries), key=lambda digest: digest.size_bytes)
                await wait_indexed(storage, weights.hash)
                async with asyncio.TaskGroup() as group:
                    pulls = [group.create_task(pull(meshes[0], agents[number], revision)) for number in pulling]
                came = [one.result() for one in pulls]
                total_bytes = sum(entry.digest.size_bytes for entry in entries)
                read_bytes = dict(zip(pulling, (counts.get("store", 0) for counts in came), strict=True))
                more_bytes = sum(count - read_before.get(number, 0) for number, count in read_bytes.items())
                read_before.update(read_bytes)
                assert more_bytes <= 1.05 * total_bytes, came

            await check_read_once("m", "model-1", list(range(count)))
            if count == 2:
                return
            registries[0][0].kill()
            await registries[0][0].wait()
            # Those that have dialled the other one are brought together by it, and the first node is gone with its own.
            await wait_agents(admins[1], *nodes[1:])
            await check_read_once("n", "model-2", list(range(1, count)))


async def coordinator(url: str) -> str:
    """Returns the address of the registry that brings agents together, once there is one."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            with psycopg.connect(url) as connection:
                row = connection.execute("SELECT address FROM leases WHERE name = %s", [LEASE]).fetchone()
            if row is not None:
                return str(row[0])
            await asyncio.sleep(0.05)
