"""The power fails before each operation of fetch, lend, promote, evict and mend: what the next start makes of it."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.order import TransferOptions
from helios.storage.disk_tier import DiskTier
from helios.storage.manifest import Digest
from helios.storage.materializer import Materializer
from helios.storage.object_source import ObjectStoreSource
from helios.storage.tiers import TierKind, TierOptions
from tests.mesh.transfer.blob_server import serve_blob
from tests.power_cut import Cut, PowerCutFileSystem
from tests.storage.harness import Shelf, digest_of, make_shelf
from tests.storage.local import check_consistent, lend, local_agent, tiers_of, use

CHUNK = 64 << 10
SHARED, OLD, NEW = b"shared" * 500, b"old" * 700, b"new" * 900
CONTENTS = {digest_of(content): content for content in (SHARED, OLD, NEW)}
DISK, FAST = TierOptions("disk"), TierOptions("fast", TierKind.NVME, low_ratio=1.0, high_ratio=1.0)


@pytest.fixture(autouse=True)
def disk_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is the double's to say; real syncs would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


class Scenario:
    """What was done, and from which cut to which a blob was promised to be there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shelf: Shelf = make_shelf(directory / "shelf")
        self.old = self.shelf.add({"shared": SHARED, "deep/er/old": OLD})
        self.new = self.shelf.add({"shared": SHARED, "new": NEW})
        self.promised: dict[Digest, tuple[int, int]] = {}

    def disk(self, name: str) -> PowerCutFileSystem:
        root = self.directory / name
        root.mkdir()
        return PowerCutFileSystem(root, self.directory / "cuts")

    def promise(self, files: PowerCutFileSystem, *contents: bytes) -> None:
        """From now on these are on the disk, whatever happens."""
        for content in contents:
            self.promised[digest_of(content)] = len(files.cuts), 1 << 30

    def take_back(self, files: PowerCutFileSystem, content: bytes) -> None:
        start, _ = self.promised[digest_of(content)]
        self.promised[digest_of(content)] = start, len(files.cuts)

    async def check(self, files: PowerCutFileSystem, *, is_index_lost: bool) -> int:
        """Starts an agent on each disk; returns how many there were."""
        for number, cut in enumerate(files.cuts):
            where = f"{cut.survived} reached the disk before: {cut.operation}"
            directory = self.directory / "after" / f"{number}-{is_index_lost}"
            _copy(cut.root, directory / "disk")
            if is_index_lost:
                for path in (directory / "disk").glob("index.db*"):
                    path.unlink()
            async with local_agent(directory, self.shelf) as agent:
                self._check_bytes(agent, cut, number, where)
                # And it works: what is missing comes again.
                if number % 7 == 0:
                    await use(agent, self.new)
                    assert tiers_of(agent, self.new) == ("disk",), where
            shutil.rmtree(directory)
        return len(files.cuts)

    def _check_bytes(self, agent: Materializer, cut: Cut, number: int, where: str) -> None:
        check_consistent(agent)
        tier = agent.rooms[0].tier
        for blob in tier.inventory.blobs():
            path = tier.store.blob_path(blob.hash)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == blob.hash, where
            assert path.stat().st_mode & 0o777 == 0o444, where
        for resident in tier.inventory.revisions():
            for entry in resident.manifest.entries:
                view = tier.view_path(resident.revision) / entry.path
                assert view.read_bytes() == CONTENTS[entry.digest], where
        for digest, (start, end) in self.promised.items():
            assert not start <= number < end or tier.inventory.has_blob(digest), f"{where}: {digest} was promised"


@pytest.mark.parametrize("is_link_allowed", [False, True])
async def test_no_power_failure_leaves_a_wrong_byte_or_loses_what_was_lent(
    scratch_path: Path, is_link_allowed: bool
) -> None:
    scenario = Scenario(scratch_path)
    files = scenario.disk("disk")
    async with local_agent(scratch_path, scenario.shelf, DISK, files=files, is_link_allowed=is_link_allowed) as agent:
        old = await lend(agent, scenario.old)
        scenario.promise(files, SHARED, OLD)
        await use(agent, scenario.new)
        scenario.promise(files, NEW)
        await agent.release(old.lease.id)
        scenario.take_back(files, OLD)
        await agent.evict(scenario.old)
    files.close()
    assert files.operation_count > 25
    assert await scenario.check(files, is_index_lost=False) > files.operation_count
    await scenario.check(files, is_index_lost=True)


async def test_what_a_kill_left_and_a_start_adopted_survives_a_power_failure(scratch_path: Path) -> None:
    """The start read the right bytes from memory; that they are on the disk is for it to see to."""
    scenario = Scenario(scratch_path)
    files = scenario.disk("disk")
    for content in (SHARED, NEW):
        path = scratch_path / "disk" / "blobs" / "sha256" / digest_of(content).hash[:2] / digest_of(content).hash
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    async with local_agent(scratch_path, scenario.shelf, DISK, files=files) as agent:
        assert len(agent.rooms[0].tier.inventory.strays()) == 2
        scenario.promise(files, SHARED, NEW)
        assert (await lend(agent, scenario.new)).fetched_bytes == 0
    files.close()
    await scenario.check(files, is_index_lost=False)


async def test_no_power_failure_makes_bytes_from_a_network_wrong(
    scratch_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written by the transfer engine, some chunks at a time; what was begun is gone on with."""
    scenario = Scenario(scratch_path)
    files = scenario.disk("disk")
    content = random.Random(3).randbytes(5 * CHUNK + 7)
    blob = digest_of(content)
    monkeypatch.setattr("os.fsync", files.sync_file)
    downloader = Downloader(TransferOptions(chunk_bytes=CHUNK, in_flight=1, sync_bytes=CHUNK))
    with serve_blob(content) as server:
        store = ObjectStoreSource(server.url.removesuffix("/blob"), {})
        async with DiskTier(scratch_path / "disk", fetch_thread_count=1, files=files, downloader=downloader) as tier:
            await tier.fetch(store, blob, lambda _: None)
        files.close()
        monkeypatch.setattr("os.fsync", lambda _: None)
        assert any(cut.operation == "sync file" and "partial" in str(list(cut.root.iterdir())) for cut in files.cuts)
        for cut in files.cuts:
            async with DiskTier(cut.root, fetch_thread_count=1, downloader=downloader) as tier:
                assert tier.inventory.blobs() in ([], [blob])
                if not tier.inventory.has_blob(blob):
                    await tier.fetch(store, blob, lambda _: None)
                assert tier.store.blob_path(blob.hash).read_bytes() == content, cut


async def test_a_power_failure_during_a_promotion_spares_the_source_and_leaves_no_wrong_copy(
    scratch_path: Path,
) -> None:
    scenario = Scenario(scratch_path)
    files = scenario.disk("fast")
    async with local_agent(scratch_path, scenario.shelf, DISK) as agent:
        await use(agent, scenario.new, times=3)
    async with local_agent(scratch_path, scenario.shelf, DISK, FAST, files=files) as agent:
        await agent.mover.look()
        assert tiers_of(agent, scenario.new) == ("fast", "disk")
        scenario.promise(files, SHARED, NEW)
    files.close()
    assert await scenario.check(files, is_index_lost=False) > files.operation_count


async def test_a_power_failure_while_a_bad_blob_is_replaced_leaves_the_bad_one_or_the_good_one(
    scratch_path: Path,
) -> None:
    """The bad one can be there again after the failure: nobody promised more, and the next scrub finds it again."""
    scenario = Scenario(scratch_path)
    async with local_agent(scratch_path, scenario.shelf, DISK) as agent:
        await use(agent, scenario.new)
    blob = scratch_path / "disk" / "blobs" / "sha256" / digest_of(NEW).hash[:2] / digest_of(NEW).hash
    bad = bytes([NEW[0] ^ 1]) + NEW[1:]
    blob.chmod(0o644)
    blob.write_bytes(bad)
    blob.chmod(0o444)
    before = scratch_path / "before"
    (scratch_path / "disk").rename(before)
    files = _resume(before, scratch_path)
    async with local_agent(scratch_path, scenario.shelf, DISK, files=files) as agent:
        loan = await lend(agent, scenario.new)
        found = [step async for step in agent.scrubber.scrub_all(bytes_per_second=0)][-1].found
        assert [(bad.is_lent, bad.is_healed) for bad in found] == [(True, True)]
        assert (loan.path / "new").read_bytes() == NEW
    files.close()
    for cut in files.cuts:
        directory = scratch_path / "after" / cut.root.name
        _copy(cut.root, directory / "disk")
        async with local_agent(directory, scenario.shelf) as agent:
            path = agent.rooms[0].tier.store.blob_path(digest_of(NEW).hash)
            assert not path.exists() or path.read_bytes() in (NEW, bad), cut
            async for _ in agent.scrubber.scrub_all(bytes_per_second=0):
                pass
            await use(agent, scenario.new)
            assert path.read_bytes() == NEW


def _copy(source: Path, target: Path) -> None:
    """Copies a disk; files that have several names still do, and only the index may be written to."""

    def copy(path: str, copied: str) -> None:
        if Path(path).name.startswith("index.db"):
            shutil.copyfile(path, copied)
        else:
            Path(copied).hardlink_to(path)

    shutil.copytree(source, target, copy_function=copy)


def _resume(source: Path, directory: Path) -> PowerCutFileSystem:
    """A disk on which everything is durable so far."""
    root = directory / "disk"
    _copy(source, root)
    files = PowerCutFileSystem(root, directory / "cuts")
    files.make_durable()
    return files
