"""A registry process with a bucket, killed at any moment of an upload: what it left is invisible, used again, or swept.

Invariants after each kill, by another client of the bucket: every object under a blob's name hashes to it; what is
listed as a model can be read whole; the next ingest succeeds and sends no part that the store had confirmed; a
collection then leaves exactly what the models need, and no unfinished upload.
"""

import asyncio
import hashlib
import os
import random
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import Unavailable
from helios.registry.client import RegistryClient
from helios.registry.ownership import OWNER_FILE
from tests.emulators.buckets import s3_client
from tests.emulators.faulty_proxy import FaultyProxy
from tests.emulators.servers import Emulator
from tests.registry import tiny
from tests.registry.support import Mesh
from tests.registry.test_process import ingest, running

pytestmark = pytest.mark.slow

PART_BYTES = 5 << 20
# Five parts, the last a short one: with its begin and its end some twelve requests.
LARGE_BYTES = 4 * PART_BYTES + 1000
REQUESTS = 14


@pytest.fixture
def proxy(seaweedfs_server: Emulator) -> Iterator[FaultyProxy]:
    with FaultyProxy(seaweedfs_server.address) as opened:
        yield opened


@dataclass(frozen=True)
class Bucket:
    """A bucket as somebody else sees it."""

    server: Emulator
    name: str
    prefix: str
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}/{self.prefix}"

    def objects(self) -> dict[str, str]:
        """Returns the sha256 of every object, by its key."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=self.prefix).get("Contents", [])
        keys = [each["Key"] for each in listed if not each["Key"].endswith(OWNER_FILE)]
        return {key: hashlib.sha256(self._get(key)).hexdigest() for key in keys}

    def unfinished(self) -> list[str]:
        """Returns the keys of unfinished uploads."""
        return [
            each["Key"]
            for each in self.client.list_multipart_uploads(Bucket=self.name, Prefix=self.prefix).get("Uploads", [])
        ]

    def _get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return content


@pytest.fixture
def bucket(seaweedfs_server: Emulator, seaweedfs_bucket: str) -> Iterator[Bucket]:
    with closing(s3_client(seaweedfs_server)) as client:
        yield Bucket(seaweedfs_server, seaweedfs_bucket, secrets.token_hex(4), client)


@asynccontextmanager
async def registry(root: Path, mesh: Mesh, server: Emulator, url: str) -> AsyncIterator[tuple[Any, RegistryClient]]:
    """Runs a registry on the bucket; its credentials come from its environment, as a deployment's do."""
    flags = (f"--blob-store.url={url}", f"--blob-store.part-bytes={PART_BYTES}")
    async with (
        running(root, mesh, *flags, environment=server.environment()) as (process, address),
        mesh.client(address) as client,
    ):
        yield process, client


def write_large(directory: Path) -> Path:
    """Writes a model whose weights are parts that differ from one another."""
    tiny.write_big(directory, LARGE_BYTES)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-LARGE_BYTES, os.SEEK_END)
        file.write(random.Random(7).randbytes(LARGE_BYTES))
    return directory


async def kill_after(process: Any, proxy: FaultyProxy, count: int, pause_seconds: float) -> None:
    """Kills the registry once its store has been asked this often."""
    async with asyncio.timeout(60):
        while len(proxy.requests) < count:
            await asyncio.sleep(0.001)
        await asyncio.sleep(pause_seconds)
    process.kill()


async def ingest_and_die(
    process: Any, client: RegistryClient, source: Path, killing: Coroutine[Any, Any, None]
) -> None:
    """Ingests until the registry is killed, or to the end where that comes first; then it is killed all the same."""
    async with asyncio.TaskGroup() as group:
        killer = group.create_task(killing, name="kill")
        with suppress(Unavailable):
            await ingest(client, "m", source)
        killer.cancel()
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def check_kill(seed: int, tmp_path: Path, mesh: Mesh, proxy: FaultyProxy, bucket: Bucket) -> None:
    chance = random.Random(seed)
    when = (chance.randrange(REQUESTS), chance.random() * 0.03)
    root, source = tmp_path / "registry", write_large(tmp_path / "model")
    through = bucket.server.through(proxy.address)
    proxy.requests.clear()
    async with registry(root, mesh, through, bucket.url) as (process, client):
        await ingest_and_die(process, client, source, kill_after(process, proxy, *when))
    for key, hash_ in bucket.objects().items():
        assert key.rsplit("/", 1)[1] == hash_, f"a wrong object after seed {seed}"
    noted = {path.stem: path.read_bytes().count(b"\n") - 1 for path in (root / "uploads").glob("*.jsonl")}
    proxy.requests.clear()
    async with registry(root, mesh, through, bucket.url) as (_, client):
        done = await ingest(client, "m", source)
        sent = [target for method, target in proxy.requests if method == "PUT" and "partNumber=" in target]
        assert len(sent) <= 5 - max(noted.values(), default=0), f"seed {seed}: parts were sent again"
        report = await client.collect_blobs(grace=timedelta(0))
        assert report.missing == ()
        located = await client.get_manifest(done.model.revision.digest)
        assert located.blob_store_url == bucket.url
        assert located.locations[0].options["aws_endpoint"] == f"http://{proxy.address}"
        assert not any("secret" in name or "key" in name for name in located.locations[0].options)
    assert set(bucket.objects().values()) == {entry.digest.hash for entry in located.manifest.entries}
    assert bucket.unfinished() == []
    assert not list((root / "uploads").glob("*"))


@pytest.mark.parametrize("seed", [1])
async def test_kill_9_at_a_random_point_of_an_upload(
    seed: int, tmp_path: Path, mesh: Mesh, proxy: FaultyProxy, bucket: Bucket
) -> None:
    await check_kill(seed, tmp_path, mesh, proxy, bucket)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
async def test_kill_9_at_many_random_points_of_an_upload(
    seed: int, tmp_path: Path, mesh: Mesh, proxy: FaultyProxy, bucket: Bucket
) -> None:
    await check_kill(seed, tmp_path, mesh, proxy, bucket)
