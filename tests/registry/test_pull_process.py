"""A registry that is killed while it pulls: the next one goes on where it was, and nothing of it is wrong."""

import asyncio
import hashlib
import random
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helios.mesh.errors import HeliosError
from helios.registry.client import IngestDone, RegistryClient
from tests.emulators import faulty_proxy as faults
from tests.emulators.faulty_proxy import FaultyProxy
from tests.emulators.hugging_face import HuggingFace, hugging_face
from tests.registry import tiny
from tests.registry.support import Mesh
from tests.registry.test_process import running
from tests.registry.test_pull import CHUNK, fetched_bytes, model_files

KILLS = 2


def flags(proxy: FaultyProxy) -> tuple[str, ...]:
    return (
        f"--sources.hugging-face.endpoint=http://{proxy.address}",
        f"--sources.downloads.chunk-bytes={CHUNK}",
        f"--sources.downloads.sync-bytes={CHUNK}",
        "--sources.downloads.in-flight=2",
    )


async def pull(client: RegistryClient) -> IngestDone:
    last = None
    async for event in client.ingest("m", "hf:org/m"):
        last = event
    assert isinstance(last, IngestDone)
    return last


async def passed(hub: HuggingFace, count: int) -> None:
    while fetched_bytes(hub) < count:
        await asyncio.sleep(0.005)


@pytest.mark.slow
async def test_killed_registries_lose_no_more_than_what_was_on_its_way(tmp_path: Path, mesh: Mesh) -> None:
    files = model_files(tmp_path / "model")
    weights = files["model.safetensors"]
    root, chance = tmp_path / "registry", random.Random(7)
    async with hugging_face() as hub:
        hub.repository("org/m", files)
        with FaultyProxy(hub.address) as proxy:
            proxy.inject(faults.slow_drip(bytes_per_second=600_000, part="/cdn/", times=10_000))
            for number in range(KILLS):
                asked_before = fetched_bytes(hub)
                async with running(root, mesh, *flags(proxy)) as (process, address), mesh.client(address) as client:
                    pulling = asyncio.get_running_loop().create_task(pull(client), name="pull")
                    async with asyncio.timeout(30):
                        await passed(hub, asked_before + (128 << 10) + chance.randrange(4 * CHUNK, 9 * CHUNK))
                    process.kill()
                    await process.wait()
                    with suppress(HeliosError):
                        await pulling
                assert not list((root / "blobs").rglob("sha256/*/*")), number
            proxy.heal()
            async with running(root, mesh, *flags(proxy)) as (_, address), mesh.client(address) as client:
                before = fetched_bytes(hub)
                done = await pull(client)
                located = await client.get_manifest(done.model.revision.digest)
            # Each life got at least two chunks to the disk that the next one did not ask for again.
            assert fetched_bytes(hub) - before <= len(weights) + (128 << 10) - KILLS * 2 * CHUNK
        assert hub.leaked == []
    store = Path(urlsplit(located.blob_store_url).path)
    entry = next(entry for entry in located.manifest.entries if entry.path == "model.safetensors")
    blob = store / "sha256" / entry.digest.hash[:2] / entry.digest.hash
    assert entry.digest.hash == hashlib.sha256(weights).hexdigest()
    assert blob.read_bytes() == weights
    assert list((root / "downloads").iterdir()) == []


@pytest.mark.slow
async def test_a_registry_may_be_killed_at_some_times(tmp_path: Path, mesh: Mesh) -> None:
    await kill_at_random(tmp_path, mesh, random.Random(20261122), count=3)


@pytest.mark.soak
async def test_a_registry_may_be_killed_at_any_time(tmp_path: Path, mesh: Mesh) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    await kill_at_random(tmp_path, mesh, random.Random(seed), count=100)


async def kill_at_random(tmp_path: Path, mesh: Mesh, chance: random.Random, *, count: int) -> None:
    """Kills registries that pull four shards at once; what is pulled meanwhile gets a new commit, with new bytes."""
    root = tmp_path / "registry"
    async with hugging_face() as hub:
        commits = [shards(tmp_path, 0)]
        repository = hub.repository("org/m", commits[0])
        with FaultyProxy(hub.address) as proxy:
            proxy.inject(faults.slow_drip(bytes_per_second=500_000, part="/cdn/", times=1_000_000))
            for _ in range(count):
                async with running(root, mesh, *flags(proxy)) as (process, address), mesh.client(address) as client:
                    pulling = asyncio.get_running_loop().create_task(pull(client), name="pull")
                    # The moment is what is random; nothing is waited for.
                    await asyncio.sleep(chance.uniform(0, 2))
                    process.kill()
                    await process.wait()
                    with suppress(HeliosError):
                        await pulling
                        commits.append(shards(tmp_path, len(commits)))
                        repository.push(commits[-1])
                check_blobs(root)
            proxy.heal()
            async with running(root, mesh, *flags(proxy)) as (_, address), mesh.client(address) as client:
                done = await pull(client)
                manifests = [
                    (await client.get_manifest(revision.digest)).manifest
                    for revision in await client.list_revisions("m")
                ]
    check_blobs(root)
    known = [{path: hashlib.sha256(content).hexdigest() for path, content in commit.items()} for commit in commits]
    found = [{entry.path: entry.digest.hash for entry in manifest.entries} for manifest in manifests]
    assert done.model.revision.digest == manifests[0].digest()
    assert found[0] == known[-1]
    # A commit that was never said to be there may be there all the same: the kill came between the two.
    assert all(one in known for one in found)
    blobs = {path.name for path in (root / "blobs").rglob("sha256/*/*")}
    assert blobs == {hash_ for one in found for hash_ in one.values()}


def shards(tmp_path: Path, seed: int) -> dict[str, bytes]:
    directory = tiny.write_sharded(tmp_path / f"model-{seed}", 4, noise_bytes=400_000, seed=seed)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check_blobs(root: Path) -> None:
    """Every blob is what its name says."""
    for path in (root / "blobs").rglob("sha256/*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
