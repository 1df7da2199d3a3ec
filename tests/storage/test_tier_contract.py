"""The promises of a tier, held by every kind: a disk, a tmpfs, sealed memory; and by an agent's, across gRPC.

What differs between them is what a restart leaves, which is said for each. Everything else is one contract: all or
nothing of a blob, no wrong byte, files that nobody can write, room that is counted once and given back.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.mesh.errors import DigestMismatch, HeliosError, Unavailable
from helios.storage.disk_tier import DiskTier
from helios.storage.eviction import plan_evict_one
from helios.storage.fetch import DirectorySource, FetchToken
from helios.storage.manifest import make_manifest, manifest_digest
from helios.storage.memory.memory_tier import MemoryTier
from helios.storage.statistics import EvictionReason
from helios.storage.tiers import TierKind, TierOptions
from tests.storage.harness import Agent, Mesh, Shelf, digest_of, entry_of, make_shelf

MIB = 1 << 20
NOW = datetime(2030, 1, 1, tzinfo=UTC)
LOCAL = ("disk", "tmpfs", "sealed")
KINDS = (*LOCAL, "across gRPC")
MEMORY = TierOptions("memory", TierKind.MEMORY)


class Subject(Protocol):
    """A tier, however it is reached."""

    shelf: Shelf

    async def bring(self, files: Mapping[str, bytes]) -> str:
        """Makes a revision of the shelf resident; returns its digest. Raises HeliosError."""
        ...

    async def read(self, revision: str) -> dict[str, bytes]:
        """What a holder reads of it."""
        ...

    async def give_up(self, revision: str) -> int:
        """Drops it; returns what that freed."""
        ...

    async def used_bytes(self) -> int:
        """What is taken."""
        ...

    async def revisions(self) -> set[str]:
        """What is there."""
        ...


def read_view(path: Path) -> dict[str, bytes]:
    found = {}
    for file in path.rglob("*"):
        if not file.is_dir():
            # Root may open anything; what a file is for others its mode says.
            assert file.stat().st_mode & 0o777 == 0o444
            found[str(file.relative_to(path))] = file.read_bytes()
    return found


@dataclass
class Here:
    """A tier in this process."""

    tier: DiskTier
    shelf: Shelf

    async def bring(self, files: Mapping[str, bytes]) -> str:
        entries = [entry_of(path, content) for path, content in sorted(files.items())]
        manifest = make_manifest(manifest_digest(entries), entries)
        for blob in self.tier.inventory.missing(manifest):
            await self.tier.fetch(DirectorySource(self.shelf.base), blob, lambda _: None)
        await self.tier.add_revision(manifest, NOW)
        return manifest.revision

    async def read(self, revision: str) -> dict[str, bytes]:
        return read_view(self.tier.view_path(revision))

    async def give_up(self, revision: str) -> int:
        plan = await self.tier.drop(lambda: plan_evict_one(self.tier.inventory, revision), EvictionReason.ASKED)
        return plan.freed_bytes

    async def used_bytes(self) -> int:
        return self.tier.inventory.used_bytes

    async def revisions(self) -> set[str]:
        return {resident.revision for resident in self.tier.inventory.revisions()}


@dataclass
class There:
    """The only tier of an agent, over mTLS."""

    agent: Agent
    shelf: Shelf

    async def bring(self, files: Mapping[str, bytes]) -> str:
        entries = [entry_of(path, content) for path, content in files.items()]
        revision = self.shelf.add_entries(entries)
        async with self.agent.client.materialize(revision, holder="test"):
            return revision

    async def read(self, revision: str) -> dict[str, bytes]:
        async with self.agent.client.materialize(revision, holder="test") as lent:
            return read_view(Path(lent.path))

    async def give_up(self, revision: str) -> int:
        return await self.agent.client.evict(revision)

    async def used_bytes(self) -> int:
        return (await self.agent.client.residency()).tiers[0].used_bytes

    async def revisions(self) -> set[str]:
        return {found.revision for found in (await self.agent.client.residency()).revisions}


def make_tier(kind: str, root: Path) -> DiskTier:
    if kind == "sealed":
        return MemoryTier(root, options=MEMORY)
    options = MEMORY if kind == "tmpfs" else TierOptions()
    return DiskTier(root, fetch_thread_count=2, is_link_allowed=False, options=options)


@asynccontextmanager
async def opened(kind: str, root: Path, shelf: Shelf) -> AsyncIterator[Here]:
    async with make_tier(kind, root) as tier:
        yield Here(tier, shelf)


@pytest.fixture(params=KINDS)
async def subject(
    request: pytest.FixtureRequest, tmp_path: Path, scratch_path: Path, mesh: Mesh
) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        if request.param == "across gRPC":
            yield There(await stack.enter_async_context(mesh.agent(is_link_allowed=False)), mesh.shelf)
        else:
            root = (scratch_path if request.param == "tmpfs" else tmp_path) / "tier"
            yield await stack.enter_async_context(opened(request.param, root, mesh.shelf))


def put(shelf: Shelf, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    for content in files.values():
        shelf.put(content)
    return files


async def test_what_was_brought_is_read_and_nobody_may_write_it(subject: Subject) -> None:
    files = put(subject.shelf, {"w": os.urandom(3 * MIB + 1), "config.json": b"{}", "sub/empty": b"", "sub/e2": b""})
    revision = await subject.bring(files)
    assert await subject.read(revision) == files
    assert await subject.revisions() == {revision}
    assert await subject.used_bytes() == sum(map(len, set(files.values())))


async def test_bringing_it_again_changes_nothing(subject: Subject) -> None:
    files = put(subject.shelf, {"w": b"some bytes"})
    assert await subject.bring(files) == await subject.bring(files)
    assert await subject.used_bytes() == len(b"some bytes")


async def test_what_two_revisions_share_is_there_once_and_stays_for_the_other(subject: Subject) -> None:
    one = put(subject.shelf, {"base": b"shared" * 1000, "own": b"one"})
    two = put(subject.shelf, {"base": b"shared" * 1000, "own": b"two"})
    first, second = await subject.bring(one), await subject.bring(two)
    assert await subject.used_bytes() == 6000 + 3 + 3
    assert await subject.give_up(first) == 3
    assert await subject.revisions() == {second}
    assert await subject.read(second) == two
    assert await subject.give_up(second) == 6000 + 3
    assert await subject.used_bytes() == 0


async def test_giving_up_what_is_not_there_is_nothing(subject: Subject) -> None:
    assert await subject.give_up("sha256:" + "0" * 64) == 0


@pytest.mark.parametrize("damage", ["other bytes", "too short", "too long", "missing"])
async def test_bytes_that_are_not_what_their_name_says_are_refused(subject: Subject, damage: str) -> None:
    content = os.urandom(MIB)
    place = subject.shelf.blob_path(digest_of(put(subject.shelf, {"w": content})["w"]))
    place.chmod(0o644)
    match damage:
        case "other bytes":
            place.write_bytes(bytes(MIB))
        case "too short":
            place.write_bytes(content[:-1])
        case "too long":
            place.write_bytes(content + b"x")
        case _:
            place.unlink()
    with pytest.raises(HeliosError) as refused:
        await subject.bring({"w": content})
    assert isinstance(refused.value, Unavailable if damage == "missing" else DigestMismatch)
    assert await subject.used_bytes() == 0
    assert await subject.revisions() == set()
    place.unlink(missing_ok=True)
    # What was refused is in nobody's way.
    revision = await subject.bring(put(subject.shelf, {"w": content}))
    assert await subject.read(revision) == {"w": content}


async def test_who_leaves_in_the_middle_leaves_all_or_nothing(subject: Subject) -> None:
    files = put(subject.shelf, {"w": os.urandom(8 * MIB)})
    for pause_seconds in (0.0, 0.001, 0.01):
        async with asyncio.TaskGroup() as group:
            bringing = group.create_task(subject.bring(files))
            await asyncio.sleep(pause_seconds)
            bringing.cancel()
        async with asyncio.timeout(20):
            while await subject.used_bytes() not in (0, 8 * MIB):
                await asyncio.sleep(0.01)
    revision = await subject.bring(files)
    assert await subject.read(revision) == files


async def test_whoever_reads_keeps_what_is_given_up(subject: Subject) -> None:
    files = put(subject.shelf, {"w": os.urandom(MIB)})
    revision = await subject.bring(files)
    if isinstance(subject, Here):
        path = subject.tier.view_path(revision) / "w"
    else:
        assert isinstance(subject, There)
        path = next((subject.agent.root / "views").rglob("w"))
    with path.open("rb") as held:
        await subject.give_up(revision)
        assert held.read() == files["w"]
    assert await subject.used_bytes() == 0


@pytest.mark.parametrize("kind", LOCAL)
async def test_another_tier_may_take_it_from_here(kind: str, tmp_path: Path, scratch_path: Path) -> None:
    shelf, content = make_shelf(tmp_path / "shelf"), os.urandom(2 * MIB)
    blob = digest_of(content)
    async with (
        opened(kind, scratch_path / "from", shelf) as source,
        opened("disk", tmp_path / "to", shelf) as target,
    ):
        await source.bring(put(shelf, {"w": content}))
        await target.tier.fetch(source.tier.source(), blob, lambda _: None)
        assert target.tier.store.blob_path(blob.hash).read_bytes() == content
        found = await source.tier.read(blob, FetchToken(), bytes_per_second=0)
        assert (found.hash, found.size_bytes) == (blob.hash, blob.size_bytes)


@pytest.mark.parametrize("kind", LOCAL)
async def test_what_a_restart_leaves(kind: str, tmp_path: Path, scratch_path: Path) -> None:
    shelf, files = make_shelf(tmp_path / "shelf"), {"w": os.urandom(MIB), "c": b"{}"}
    root = scratch_path / "tier"
    async with opened(kind, root, shelf) as before:
        revision = await before.bring(put(shelf, files))
        await before.tier.put_pin(revision)
    async with opened(kind, root, shelf) as after:
        assert after.tier.persisted_pins == [revision]
        if kind == "sealed":
            # Memory that nobody held is gone with the process.
            assert (await after.revisions(), await after.used_bytes()) == (set(), 0)
        else:
            assert await after.read(revision) == files
        assert await after.bring(files) == revision
        assert await after.read(revision) == files


steps = st.lists(
    st.tuples(st.sampled_from(["bring", "give up", "restart"]), st.integers(0, 3)), min_size=1, max_size=12
)


@pytest.mark.parametrize("kind", LOCAL)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_order_of_steps_leaves_what_it_should(
    kind: str, steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("tier")
    shelf = make_shelf(directory / "shelf")
    models = [put(shelf, {"shared": b"s" * 100, "pair": bytes([n // 2]) * 50, "own": bytes([n])}) for n in range(4)]

    async def run() -> None:
        here: dict[str, Mapping[str, bytes]] = {}
        async with AsyncExitStack() as stack:
            subject = await stack.enter_async_context(opened(kind, directory / "tier", shelf))
            for step, number in steps:
                if step == "bring":
                    here[await subject.bring(models[number])] = models[number]
                elif step == "give up" and here:
                    revision = sorted(here)[number % len(here)]
                    await subject.give_up(revision)
                    del here[revision]
                elif step == "restart":
                    await stack.aclose()
                    here = {} if kind == "sealed" else here
                    subject = await stack.enter_async_context(opened(kind, directory / "tier", shelf))
                assert await subject.revisions() == set(here)
                blobs = {content for files in here.values() for content in files.values()}
                assert await subject.used_bytes() == sum(map(len, blobs))
                for revision, files in here.items():
                    assert await subject.read(revision) == files

    asyncio.run(run())
