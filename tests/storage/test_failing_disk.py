"""A disk that fails, each operation in turn: it is said as an error of ours, nothing wrong is lent, nothing is left."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from helios.mesh.errors import DiskFull, Unavailable
from helios.mesh.file_system import LocalFileSystem
from helios.storage.materializer import Materializer
from helios.storage.tiers import TierKind, TierOptions
from tests.storage.harness import Shelf, make_shelf
from tests.storage.local import SetClock, check_consistent, lend, local_agent, tiers_of, use
from tests.storage.test_moves import flip

SHARED, OLD, NEW = b"shared" * 500, b"old" * 700, b"new" * 900
NVME = TierOptions("fast", TierKind.NVME)


class FailingFileSystem(LocalFileSystem):
    """Fails from the given operation on: for once, or for good, as a disk that the kernel has made read-only."""

    def __init__(self, code: int, *, first: int, is_lasting: bool) -> None:
        self._code = code
        self._first = first
        self._is_lasting = is_lasting
        self.operation_count = 0
        self.is_broken = True

    def sync_file(self, descriptor: int) -> None:
        self._count()
        super().sync_file(descriptor)

    def sync_directory(self, directory: Path) -> None:
        self._count()
        super().sync_directory(directory)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def link(self, source: Path, target: Path, *, symbolic: bool = False) -> None:
        self._count()
        super().link(source, target, symbolic=symbolic)

    def remove(self, path: Path) -> None:
        self._count()
        super().remove(path)

    def make_directory(self, path: Path) -> None:
        self._count()
        super().make_directory(path)

    def _count(self) -> None:
        self.operation_count += 1
        is_due = self.operation_count > self._first if self._is_lasting else self.operation_count == self._first + 1
        if self.is_broken and is_due:
            raise OSError(self._code, os.strerror(self._code))


@pytest.fixture(autouse=True)
def disk_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about what was synced."""
    monkeypatch.setattr("os.fsync", lambda _: None)


async def live(agent: Materializer, shelf: Shelf) -> int:
    """Borrows, gives back, evicts, scrubs; returns how much of it failed. Anything but our errors ends the test."""
    old, new = shelf.manifests
    failures = 0
    lease_id = ""
    for step in ("lend", "use", "bad", "scrub", "release", "evict"):
        try:
            match step:
                case "lend":
                    loan = await lend(agent, old)
                    lease_id = loan.lease.id
                    assert (loan.path / "deep/old").read_bytes() == OLD
                case "use":
                    await use(agent, new)
                case "bad":
                    path = agent.rooms[-1].tier.store.blob_path(hashlib.sha256(SHARED).hexdigest())
                    if path.exists():
                        flip(path)
                case "scrub":
                    async for _ in agent.scrubber.scrub_all(bytes_per_second=0):
                        pass
                case "release":
                    await agent.release(lease_id)
                case _:
                    await agent.evict(old)
        except (DiskFull, Unavailable):
            failures += 1
    return failures


@pytest.mark.parametrize(
    ("code", "is_lasting", "step"),
    [(errno.EIO, False, 1), (errno.ENOSPC, False, 3), (errno.EROFS, True, 3)],
    ids=["EIO once", "ENOSPC once", "EROFS from then on"],
)
async def test_each_operation_may_fail(scratch_path: Path, code: int, is_lasting: bool, step: int) -> None:
    first, operation_count = 4, 1 << 30
    failed_count = 0
    while first < operation_count:
        directory = scratch_path / str(first)
        shelf = make_shelf(directory / "shelf")
        shelf.add({"shared": SHARED, "deep/old": OLD})
        shelf.add({"shared": SHARED, "new": NEW})
        files = FailingFileSystem(code, first=first, is_lasting=is_lasting)
        # The directories of a tier are made before: a disk that fails then ends the start.
        async with local_agent(directory, shelf):
            pass
        async with local_agent(directory, shelf, files=files) as agent:
            failed_count += await live(agent, shelf) > 0
        operation_count = files.operation_count
        async with local_agent(directory, shelf) as agent:
            check_consistent(agent)
            async for _ in agent.scrubber.scrub_all(bytes_per_second=0):
                pass
            for revision in shelf.manifests:
                await use(agent, revision)
            for room in agent.rooms:
                for blob in room.tier.inventory.blobs():
                    content = room.tier.store.blob_path(blob.hash).read_bytes()
                    assert hashlib.sha256(content).hexdigest() == blob.hash
        shutil.rmtree(directory)
        first += step
    assert failed_count > 10 // step


async def test_a_tier_that_fails_gives_the_fetch_to_the_next(scratch_path: Path) -> None:
    shelf = make_shelf(scratch_path / "shelf")
    revision = shelf.add({"new": NEW})
    async with local_agent(scratch_path, shelf, TierOptions(), NVME) as agent:
        broken = agent.rooms[0].tier.store
        broken.files = FailingFileSystem(errno.EROFS, first=0, is_lasting=True)
        await use(agent, revision)
        assert tiers_of(agent, revision) == ("disk",)
        assert agent.rooms[0].tier.inventory.used_bytes == 0


async def test_a_disk_that_can_not_be_opened_takes_its_tier_along_and_not_the_node(scratch_path: Path) -> None:
    shelf = make_shelf(scratch_path / "shelf")
    revision = shelf.add({"new": NEW})
    (scratch_path / "fast").write_bytes(b"no directory")
    async with local_agent(scratch_path, shelf, TierOptions(), NVME) as agent:
        assert [room.name for room in agent.rooms] == ["disk"]
        await use(agent, revision)
    with pytest.raises(Unavailable) as raised:
        async with local_agent(scratch_path, shelf, NVME, TierOptions()):
            pytest.fail("the first tier is where the node keeps what it is told to keep")
    assert raised.value.reason == "TIER_FAILED"


async def test_a_view_that_could_not_be_removed_is_not_taken_for_a_new_one(scratch_path: Path) -> None:
    shelf = make_shelf(scratch_path / "shelf")
    revision = shelf.add({"new": NEW})
    async with local_agent(scratch_path, shelf) as agent:
        await use(agent, revision)
        store = agent.rooms[0].tier.store
        flip(store.blob_path(hashlib.sha256(NEW).hexdigest()))
        working, store.files = store.files, FailingFileSystem(errno.EROFS, first=0, is_lasting=True)
        async for _ in agent.scrubber.scrub_all(bytes_per_second=0):
            pass
        store.files = working
        assert agent.residency() == []
        assert ((await lend(agent, revision)).path / "new").read_bytes() == NEW


@pytest.mark.parametrize("error", [DiskFull("full"), Unavailable("read-only", reason="TIER_FAILED")])
async def test_a_disk_that_takes_no_renewal_ends_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    shelf, clock = make_shelf(tmp_path / "shelf"), SetClock()
    revision = shelf.add({"old": OLD})
    async with local_agent(tmp_path, shelf, clock=clock) as agent:
        loan = await lend(agent, revision)

        def refuse(*_: object) -> None:
            raise error

        monkeypatch.setattr("helios.storage.index.Index.put_lease", refuse)
        clock.advance(10)
        renewed = await agent.renew(loan.lease.id)
        assert renewed.ends_at > loan.lease.ends_at
        clock.advance(10)
        resumed = await agent.materialize(revision, holder="test", ttl=None, lease_id=loan.lease.id)
        assert resumed.path == loan.path
        assert resumed.lease.ends_at > renewed.ends_at
        with pytest.raises(type(error)):
            await lend(agent, revision)
        assert agent.residency()[0].lease_count == 1


async def test_a_blob_that_can_not_be_read_is_no_reason_against_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = make_shelf(tmp_path / "shelf")
    revision = shelf.add({"old": OLD})
    async with local_agent(tmp_path, shelf) as agent:
        await use(agent, revision)
        index = agent.rooms[0].tier.store.root / "index.db"
    index.unlink()

    def refuse(_: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("helios.storage.blob_store.hash_file", refuse)
        async with local_agent(tmp_path, shelf) as agent:
            assert agent.rooms[0].tier.inventory.blobs() == []
            await use(agent, revision)
            check_consistent(agent)
