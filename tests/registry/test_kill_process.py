"""A registry process that is killed at any moment while models come and go and blobs are collected, again and again.

Invariants after each restart: what was answered holds, what was under way happened whole or not at all; every file
under a blob's name hashes to it; every model's manifest can be read and its blobs are there; nothing unfinished is
left. After a last collection the directory holds what the models need and nothing else. The models share files, so what
one operation deletes another one may want.
"""

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from helios.mesh.errors import HeliosError, ModelNotFound
from helios.registry.client import RegistryClient
from helios.registry.ownership import OWNER_FILE
from tests.registry import tiny
from tests.registry.support import Mesh
from tests.registry.test_process import ingest, leftovers, running

pytestmark = pytest.mark.slow

NAMES: Final = ("a", "b", "c")
# An operation on small files takes some hundredths of a second, one on the large ones tenths.
LARGE_BYTES: Final = (24 << 20, 40 << 20)
LONGEST_SECONDS: Final = 0.8


def write_sources(directory: Path) -> list[Path]:
    """Writes models, of which all have the same small files."""
    small = [tiny.write_model(directory / f"small-{seed}", seed=seed) for seed in range(2)]
    return small + [tiny.write_big(directory / f"large-{size}", size) for size in LARGE_BYTES]


class Life:
    """What somebody who uses the registry knows of it: each model's possible revisions, None being no model."""

    def __init__(self, root: Path, sources: list[Path], chance: random.Random) -> None:
        self.root = root
        self.sources = sources
        self.chance = chance
        self.models: dict[str, set[str | None]] = {name: {None} for name in NAMES}
        self.revisions: dict[Path, str] = {}

    async def act(self, client: RegistryClient) -> None:
        """Does something; what is answered is known."""
        match self.chance.randrange(6):
            case 0 | 1 | 2:
                await self._ingest(client, self.chance.choice(NAMES), self.chance.choice(self.sources))
            case 3 | 4:
                await self._delete(client, self.chance.choice(NAMES))
            case _:
                report = await client.collect_blobs(grace=timedelta(0))
                assert report.missing == ()

    async def _ingest(self, client: RegistryClient, name: str, source: Path) -> None:
        self.models[name].add(self.revisions[source])
        done = await ingest(client, name, source)
        self.models[name] = {done.model.revision.digest}
        assert done.model.revision.digest == self.revisions[source]

    async def _delete(self, client: RegistryClient, name: str) -> None:
        self.models[name].add(None)
        with suppress(ModelNotFound):
            await client.delete_model(name)
        self.models[name] = {None}

    async def learn(self, client: RegistryClient) -> None:
        """Finds what each source becomes, and forgets it again in the registry."""
        for source in self.sources:
            self.revisions[source] = (await ingest(client, "learned", source)).model.revision.digest
        await client.delete_model("learned")

    async def check(self, client: RegistryClient) -> Mapping[str, int]:
        """Checks all invariants; returns hash and size of what the models need."""
        found = {model.name: model.revision.digest for model in await client.list_models()}
        needed: dict[str, int] = {}
        for name, possible in self.models.items():
            assert found.get(name) in possible, f"{name} is {found.get(name)}"
            self.models[name] = {found.get(name)}
        for digest in found.values():
            for entry in (await client.get_manifest(digest)).manifest.entries:
                needed[entry.digest.hash] = entry.digest.size_bytes
        blobs = self.blobs()
        for hash_, path in blobs.items():
            assert tiny.sha256(path) == hash_
        assert needed.keys() <= blobs.keys()
        # A start clears away what a crash left. A blob of an earlier revision of a model is needed, too.
        assert [path for path in leftovers(self.root) if Path(path).name not in blobs] == []
        return needed

    def blobs(self) -> dict[str, Path]:
        """Returns the directory's files by name."""
        files = (path for path in (self.root / "blobs").rglob("*") if path.is_file())
        return {path.name: path for path in files if path.name != OWNER_FILE}


async def act_and_die(process: Any, client: RegistryClient, life: Life) -> None:
    """Acts until the registry is killed."""

    async def kill() -> None:
        await asyncio.sleep(life.chance.random() * LONGEST_SECONDS)
        process.kill()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        killing = group.create_task(kill(), name="kill")
        try:
            while True:
                await life.act(client)
        except HeliosError as error:
            if not killing.done():
                raise AssertionError("a registry that lives does what it is asked") from error
    await process.wait()


async def live_and_die(seed: int, kills: int, tmp_path: Path, mesh: Mesh) -> None:
    root = tmp_path / "registry"
    life = Life(root, write_sources(tmp_path / "sources"), random.Random(seed))
    async with running(root, mesh) as (_, address), mesh.client(address) as client:
        await life.learn(client)
        assert life.blobs() == {}
    for _ in range(kills):
        async with running(root, mesh) as (process, address), mesh.client(address) as client:
            await life.check(client)
            await act_and_die(process, client, life)
    async with running(root, mesh) as (_, address), mesh.client(address) as client:
        await life.check(client)
        for name in NAMES:
            # With one revision a model, what models need is what they serve.
            with suppress(ModelNotFound):
                await client.delete_model(name)
            life.models[name] = {None}
        done = await ingest(client, "last", life.sources[0])
        life.models["last"] = {done.model.revision.digest}
        report = await client.collect_blobs(grace=timedelta(0))
        assert (report.missing, report.unfinished_count) == ((), 0)
        assert (await life.check(client)).keys() == life.blobs().keys()


async def test_kill_9_while_models_come_and_go(tmp_path: Path, mesh: Mesh) -> None:
    await live_and_die(1, 2, tmp_path, mesh)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 130))
async def test_many_kills_while_models_come_and_go(seed: int, tmp_path: Path, mesh: Mesh) -> None:
    await live_and_die(seed, 8, tmp_path, mesh)
