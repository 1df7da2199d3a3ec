"""A registry and two agents, each a process of its own, and SeaweedFS: a model that both pull comes from there once."""

import asyncio
import json
import os
import random
import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.api.registry.v1.chunk_service_pb2_grpc import ChunkServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority
from helios.registry.client import RegistryClient, SyncClient
from helios.storage.client import StorageClient
from tests.emulators.servers import Emulator
from tests.registry import tiny
from tests.registry.support import Mesh as RegistryMesh
from tests.registry.test_process import ingest, running
from tests.storage.harness import AgentProcess, Mesh, agent_process, make_shelf

pytestmark = pytest.mark.slow

MIB = 1 << 20
LARGE_BYTES = 32 * MIB
WAIT_SECONDS = 60.0
NODES = ("one", "two")


async def test_a_bucket_is_read_once(tmp_path: Path, seaweedfs_server: Emulator, seaweedfs_bucket: str) -> None:
    certificates = RegistryMesh(tmp_path / "pki")
    url = f"s3://{seaweedfs_bucket}/{secrets.token_hex(4)}"
    source = tmp_path / "model"
    tiny.write_big(source, LARGE_BYTES)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-LARGE_BYTES, os.SEEK_END)
        file.write(random.Random(8).randbytes(LARGE_BYTES))
    flags = (f"--blob-store.url={url}",)
    async with (
        running(tmp_path / "registry", certificates, *flags, environment=seaweedfs_server.environment()) as (
            _,
            address,
        ),
        certificates.dialer(address, "storage") as dialer,
        certificates.dialer(address, "admin-edge") as admin,
        AsyncExitStack() as stack,
    ):
        client = RegistryClient(admin)
        revision = (await ingest(client, "m", source)).model.revision.digest
        entries = (await client.get_manifest(revision)).manifest.entries
        weights = max((entry.digest for entry in entries), key=lambda digest: digest.size_bytes)
        await wait_indexed(dialer, weights.hash)
        mesh = Mesh(tmp_path, CertificateAuthority.open(tmp_path / "pki"), make_shelf(tmp_path), address)
        own = json.dumps({name: value for name, value in seaweedfs_server.options.items() if "endpoint" not in name})
        agents = [
            await stack.enter_async_context(
                agent_process(mesh, f"--node={node}", f"--fetch.stores.s3={own}", root=tmp_path / node)
            )
            for node in NODES
        ]
        async with asyncio.timeout(WAIT_SECONDS):
            while [agent.node for agent in await SyncClient(admin).list_agents()] != list(NODES):
                await asyncio.sleep(0.05)
        async with asyncio.TaskGroup() as group:
            pulls = [group.create_task(pull(mesh, agent, revision)) for agent in agents]
        came = [pull.result() for pull in pulls]
    small_bytes = sum(entry.digest.size_bytes for entry in entries) - weights.size_bytes
    # What is small has no chunk index, and is read by both.
    assert sum(counts.get("store", 0) for counts in came) <= weights.size_bytes + 2 * small_bytes
    assert sum(counts.get("peer", 0) for counts in came) == weights.size_bytes


async def wait_indexed(registry: Dialer, hash_: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                await registry.stub(ChunkServiceStub).GetChunkIndex(pb.GetChunkIndexRequest(hash=hash_), timeout=10.0)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                await asyncio.sleep(0.1)
            else:
                return


async def pull(mesh: Mesh, agent: AgentProcess, revision: str) -> Mapping[str, int]:
    """Returns where the bytes came from."""
    async with asyncio.timeout(WAIT_SECONDS), mesh.dial(agent.address) as dialer:
        client = StorageClient(dialer)
        async with client.materialize(revision, holder="test"):
            return (await client.statistics()).tiers[0].written_bytes
