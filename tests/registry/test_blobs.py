"""The blob store: complete blobs or none, whatever goes wrong."""

import asyncio
import errno
import os
import resource
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import Conflict, DigestMismatch, DiskFull
from helios.registry.blobs import Blobs
from helios.registry.directory_store import DirectoryStore
from helios.registry.hashing import BUFFER_BYTES, looks_alike
from helios.registry.offload import Stop
from tests.registry.tiny import sha256


def ignore(_: int) -> None:
    """Takes progress and forgets it."""


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStore:
    directory = DirectoryStore(tmp_path / "blobs")
    directory.prepare()
    return directory


@pytest.fixture
def store(directory: DirectoryStore, tmp_path: Path) -> Blobs:
    return Blobs(directory, Known(directory), disk=tmp_path, reserve_bytes=0)


async def nothing(_: Collection[str]) -> set[str]:
    """Reads the rows of a registry that has none."""
    return set()


@dataclass
class Known:
    """Rows of a registry that refers to all that is in its directory."""

    directory: DirectoryStore

    async def of_size(self, size_bytes: int, limit: int) -> Sequence[str]:
        return [blob.hash for blob in self.directory.scan() if blob.size_bytes == size_bytes][:limit]

    async def sizes_among(self, sizes: Collection[int]) -> frozenset[int]:
        return frozenset(sizes) & {blob.size_bytes for blob in self.directory.scan()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(BUFFER_BYTES + 12_345))
    return path


def path_of(store: Blobs, hash_: str) -> Path:
    assert isinstance(store.store, DirectoryStore)
    return store.store.path(hash_)


def files_of(store: Blobs) -> list[Path]:
    return [path for path in path_of(store, "00").parents[2].rglob("*") if path.is_file()]


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Makes every write beyond this size fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_sweep_leaves_what_is_being_stored(directory: DirectoryStore, source: Path, tmp_path: Path) -> None:
    # It was written long ago, as far as the file system knows: a download that is stored by a move.
    os.utime(source, (0, 0))
    left = tmp_path / "blobs" / "tmp" / "left"
    left.write_bytes(b"by a crash")
    content = source.read_bytes()
    with directory.stage(source, is_owned=True, on_bytes=ignore, stop=Stop()) as staged:
        assert directory.sweep(before=datetime.now(UTC) + timedelta(hours=1)) == 1
        staged.commit(ignore, Stop())
    assert directory.path(staged.digest.hash).read_bytes() == content
    assert not left.exists()


async def test_stores_a_file_once(store: Blobs, source: Path) -> None:
    seen: list[int] = []
    with store.hold() as hold:
        first = await hold.put(source, on_bytes=seen.append)
        second = await hold.put(source, on_bytes=ignore)
    size = source.stat().st_size
    assert (first.digest.hash, first.digest.size_bytes) == (sha256(source), size)
    assert (first.new_bytes, second.new_bytes) == (size, 0)
    assert sum(seen) == size
    path = path_of(store, first.digest.hash)
    assert path.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert files_of(store) == [path]


async def test_a_blob_does_not_change_with_its_source(store: Blobs, source: Path) -> None:
    with store.hold() as hold:
        stored = await hold.put(source, on_bytes=ignore)
    with source.open("r+b") as file:
        file.write(b"changed in place")
    assert sha256(path_of(store, stored.digest.hash)) == stored.digest.hash


async def test_an_owned_file_is_moved(store: Blobs, source: Path) -> None:
    digest = sha256(source)
    inode = source.stat().st_ino
    with store.hold() as hold:
        await hold.put(source, is_owned=True, on_bytes=ignore)
    assert not source.exists()
    assert path_of(store, digest).stat().st_ino == inode


async def test_another_file_of_a_known_size_is_stored_and_progress_adds_up(store: Blobs, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 100)
    two.write_bytes(b"b" * 100)
    seen: list[int] = []
    with store.hold() as hold:
        await hold.put(one, on_bytes=ignore)
        stored = await hold.put(two, on_bytes=seen.append)
    assert stored.new_bytes == 100
    assert sum(seen) == 100


async def test_a_file_that_only_has_the_size_of_a_blob_is_read_once(store: Blobs, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(source.stat().st_size))
    seen: list[int] = []
    with store.hold() as hold:
        await hold.put(source, on_bytes=ignore)
        await hold.put(other, on_bytes=seen.append)
    # What is hashed first and then copied takes back what it has counted.
    assert min(seen) > 0
    assert sum(seen) == other.stat().st_size


async def test_a_file_that_is_a_blob_already_is_not_copied(
    store: Blobs, source: Path, directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.hold() as hold:
        first = await hold.put(source, on_bytes=ignore)
        monkeypatch.setattr(directory, "stage", None)
        assert (await hold.put(source, on_bytes=ignore)).digest == first.digest


@given(
    size=st.integers(0, 300_000),
    changes=st.lists(st.tuples(st.integers(0, 299_999), st.integers(1, 255)), max_size=3),
)
def test_what_is_the_same_looks_alike(size: int, changes: list[tuple[int, int]]) -> None:
    one = bytes(size)
    two = bytearray(one)
    for at, change in changes:
        if at < size:
            two[at] ^= change
    with TemporaryFile(buffering=0) as file, TemporaryFile(buffering=0) as other:
        file.write(one)
        other.write(two)
        is_alike = looks_alike(file, other)
        assert is_alike or one != two
        # Below this everything is looked at.
        assert size > 64 * 4096 or is_alike == (one == two)


async def test_a_full_disk_leaves_nothing(store: Blobs, source: Path) -> None:
    with store.hold() as hold, largest_file(1 << 20), pytest.raises(DiskFull):
        await hold.put(source, on_bytes=ignore)
    assert files_of(store) == []


def test_full_is_what_disks_and_quotas_say() -> None:
    from helios.registry.directory_store import _translate  # noqa: PLC0415

    for code in (errno.ENOSPC, errno.EDQUOT):
        assert isinstance(_translate(OSError(code, "full"), Path("x")), DiskFull)


async def test_keeps_the_reserve(tmp_path: Path) -> None:
    directory = DirectoryStore(tmp_path)
    store = Blobs(directory, Known(directory), disk=tmp_path, reserve_bytes=1 << 60)
    with pytest.raises(DiskFull) as caught:
        store.require_space(1)
    assert caught.value.metadata["needed_bytes"] == "1"


async def test_a_file_of_another_digest_is_refused(store: Blobs, source: Path) -> None:
    with store.hold() as hold, pytest.raises(DigestMismatch):
        await hold.put(source, expected="0" * 64, on_bytes=ignore)
    assert files_of(store) == []


async def test_a_file_that_changes_while_it_is_read_is_refused(store: Blobs, source: Path) -> None:
    def grow(_: int) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with store.hold() as hold, pytest.raises(Conflict) as caught:
        await hold.put(source, on_bytes=grow)
    assert caught.value.reason == "SOURCE_CHANGED"
    assert files_of(store) == []


async def test_a_missing_source_is_a_conflict(store: Blobs, tmp_path: Path) -> None:
    with store.hold() as hold, pytest.raises(Conflict):
        await hold.put(tmp_path / "nothing", on_bytes=ignore)


async def test_cancelling_stops_the_copy_and_leaves_nothing(store: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "big"
    with source.open("wb") as file:
        file.truncate(2 << 30)
    counts: list[int] = []
    with store.hold() as hold:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(hold.put(source, on_bytes=counts.append), name="put")
            while not counts:
                await asyncio.sleep(0.001)
            task.cancel()
    assert sum(counts) < 1 << 30
    assert files_of(store) == []


async def test_never_deletes_a_held_blob(store: Blobs, source: Path) -> None:
    digest = sha256(source)
    with store.hold() as first:
        await first.put(source, on_bytes=ignore)
        with store.hold() as second:
            await second.put(source, on_bytes=ignore)
            assert await store.collect([digest], nothing) == set()
        assert await store.collect([digest], nothing) == set()
        assert path_of(store, digest).exists()
    assert await store.collect([digest], nothing) == {digest}
    assert files_of(store) == []


async def test_start_clears_away_what_a_crash_left(store: Blobs, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("kept", "orphan", "torn", "lost")]
    referenced: dict[str, int] = {}
    with store.hold() as hold:
        for path in paths:
            path.write_bytes(path.name.encode() * 100)
            digest = (await hold.put(path, on_bytes=ignore)).digest
            if path.name != "orphan":
                referenced[digest.hash] = digest.size_bytes
    torn, lost = path_of(store, sha256(paths[2])), path_of(store, sha256(paths[3]))
    torn.chmod(0o644)
    torn.write_bytes(b"half")
    lost.unlink()
    temporary = tmp_path / "blobs" / "tmp" / "half-written"
    temporary.write_bytes(b"x" * 10)

    root = tmp_path / "blobs"
    directory = DirectoryStore(root)
    assert directory.prepare() == 10
    freed_bytes, missing = directory.repair("", referenced)
    assert freed_bytes == len("orphan") * 100 + 4
    assert set(missing) == {torn.name, lost.name}
    assert files_of(store) == [path_of(store, sha256(paths[0]))]


async def test_says_which_blobs_are_missing(store: Blobs, source: Path) -> None:
    with store.hold() as hold:
        digest = (await hold.put(source, on_bytes=ignore)).digest
        assert await store.missing([digest]) == []
        path_of(store, digest.hash).unlink()
        assert await store.missing([digest]) == [digest]
        assert not await hold.take([digest])


async def test_an_ingest_waits_for_a_blob_that_is_being_deleted(store: Blobs, source: Path) -> None:
    with store.hold() as hold:
        digest = (await hold.put(source, on_bytes=ignore)).digest
    is_reading, go_on = asyncio.Event(), asyncio.Event()

    async def read_rows(_: Collection[str]) -> set[str]:
        is_reading.set()
        await go_on.wait()
        return set()

    with store.hold() as hold:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            collecting = group.create_task(store.collect([digest.hash], read_rows), name="collect")
            await is_reading.wait()
            putting = group.create_task(hold.put(source, on_bytes=ignore), name="put")
            await asyncio.sleep(0.05)
            assert not putting.done()
            go_on.set()
        assert collecting.result() == {digest.hash}
        # It was gone, so it was stored anew.
        assert putting.result().new_bytes == digest.size_bytes
        assert await store.missing([digest]) == []


async def test_a_collection_that_is_cancelled_lets_go(store: Blobs, source: Path) -> None:
    with store.hold() as hold:
        digest = (await hold.put(source, on_bytes=ignore)).digest
    is_reading = asyncio.Event()

    async def read_rows(_: Collection[str]) -> set[str]:
        is_reading.set()
        await asyncio.sleep(60)
        return set()

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        collecting = group.create_task(store.collect([digest.hash], read_rows), name="collect")
        await is_reading.wait()
        collecting.cancel()
    with store.hold() as hold:
        assert (await hold.put(source, on_bytes=ignore)).new_bytes == 0


async def test_two_ingests_of_a_file_store_it_once(store: Blobs, source: Path) -> None:
    with store.hold() as one, store.hold() as two:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hold.put(source, on_bytes=ignore), name="put") for hold in (one, two)]
    assert sorted(task.result().new_bytes for task in tasks) == [0, source.stat().st_size]
