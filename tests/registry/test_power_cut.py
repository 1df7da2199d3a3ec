"""The power fails before each operation of put, delete, collection and start: what the next start makes of it.

Rows are a file that no power cut harms, as SQLite's are with `synchronous=FULL`; everything else is the registry's own.
"""

import hashlib
import json
import random
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, cast

import pytest

from helios.mesh.errors import PreconditionFailed
from helios.registry.__main__ import _open_blobs
from helios.registry.blob_rows import BlobRows
from helios.registry.blobs import Blobs
from helios.registry.collector import Collector
from helios.registry.directory_store import DirectoryStore
from helios.registry.settings import BlobStoreSettings, CollectionSettings, IngestSettings, RegistrySettings
from helios.registry.state import StateDirectory
from tests.power_cut import PowerCutFileSystem

# Two of one size, so that one may be taken for the other.
CONTENTS: Final = (b"old" * 700, b"new" * 700, b"other" * 900, b"")
OLD, NEW, OTHER, EMPTY = CONTENTS
MINE, NEXT = "mine", "next"
# Operations of a first start around the owner's file getting its name.
OWNER_NAMED: Final = range(8, 11)
# A first start, two puts and more.
OTHERS: Final = [number for number in range(1, 61) if number not in OWNER_NAMED]


@pytest.fixture(autouse=True)
def disk_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is the double's to say; real syncs would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Killed(Exception):
    """The process is gone; nothing of it touches the disk any more."""


class KillingFileSystem(PowerCutFileSystem):
    """Kills the process at the operation of this number, of those that were since ``live``; 0: never."""

    def __init__(self, root: Path, states: Path) -> None:
        super().__init__(root, states)
        self.live()

    def live(self, until: int = 0) -> None:
        """Begins another life, which ends before its operation of this number."""
        self._ends_at = until and self.operation_count + until

    def _cut(self, operation: str) -> None:
        if self._ends_at and self.operation_count >= self._ends_at - 1:
            raise Killed
        super()._cut(operation)


@dataclass(frozen=True)
class Rows:
    """Which blobs something refers to: all of `BlobRows` that is asked for here."""

    path: Path
    database: str = MINE

    def get(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.path.read_bytes())["blobs"] if self.path.exists() else {}
        return found

    def set(self, blobs: dict[str, int]) -> None:
        """Also notes whose the store is by now: who may write rows has claimed it."""
        self.path.write_text(json.dumps({"blobs": blobs, "owner": self.database}))

    def claimed_by(self) -> str | None:
        """Returns who has claimed the store, None where nobody has been told so."""
        return str(json.loads(self.path.read_bytes())["owner"]) if self.path.exists() else None

    async def owner(self) -> str:
        return self.database

    async def count(self) -> int:
        return len(self.get())

    async def read(self, prefix: str = "") -> dict[str, int]:
        return {hash_: size for hash_, size in self.get().items() if hash_.startswith(prefix)}

    async def referenced(self, hashes: Collection[str]) -> frozenset[str]:
        return frozenset(hashes) & self.get().keys()

    async def of_size(self, size_bytes: int, limit: int) -> Sequence[str]:
        return [hash_ for hash_, size in self.get().items() if size == size_bytes][:limit]

    async def sizes_among(self, sizes: Collection[int]) -> frozenset[int]:
        return frozenset(sizes) & frozenset(self.get().values())


@dataclass(frozen=True)
class Registry:
    """A registry that runs: its blobs and its rows, and where its sources are."""

    state: StateDirectory
    store: DirectoryStore
    blobs: Blobs
    rows: Rows
    sources: Path
    files: PowerCutFileSystem | None

    async def put(self, content: bytes, *, home: Path | None = None) -> None:
        """Stores a file, and acknowledges it. In a home in the state directory it is on the disk, and is moved."""
        directory = home or self.sources
        directory.mkdir(exist_ok=True)
        source = directory / f"source-{hash_of(content)[:8]}"
        source.write_bytes(content)
        if home is not None and self.files is not None:
            with source.open("rb") as file:
                self.files.sync_file(file.fileno())
            self.files.sync_directory(home)
            self.files.sync_directory(home.parent)
        with self.blobs.hold() as hold:
            stored = await hold.put(
                source, is_owned=home is not None, expected=hash_of(content), on_bytes=lambda _: None
            )
            self.rows.set(self.rows.get() | {stored.digest.hash: stored.digest.size_bytes})

    async def discard(self, content: bytes) -> None:
        """Stores a file for which no row comes: an ingest that is cancelled and could not clean up."""
        source = self.sources / "discarded"
        source.write_bytes(content)
        with self.blobs.hold() as hold:
            await hold.put(source, on_bytes=lambda _: None)

    def forget(self, content: bytes) -> None:
        """Removes a row; the blob is for others to remove."""
        self.rows.set({hash_: size for hash_, size in self.rows.get().items() if hash_ != hash_of(content)})

    async def delete(self, content: bytes) -> None:
        self.forget(content)
        await self.blobs.collect({hash_of(content)}, self.rows.referenced)

    async def collect(self) -> None:
        collector = Collector(cast(BlobRows, self.rows), self.blobs, CollectionSettings())
        await collector.collect(grace=timedelta(0))


@asynccontextmanager
async def registry(
    disk: Path, files: PowerCutFileSystem | None = None, *, database: str = MINE, take_over_from: str = ""
) -> AsyncIterator[Registry]:
    """Starts a registry on a disk, as its process does, and stops it."""
    settings = RegistrySettings.model_construct(
        ingest=IngestSettings(reserve_bytes=0), blob_store=BlobStoreSettings(take_over_from=take_over_from)
    )
    sources = disk.parent / "sources"
    sources.mkdir(exist_ok=True)
    with StateDirectory(disk / "state").owned(files) as state:
        store, rows = DirectoryStore(state.blobs, files), Rows(disk / "index.db", database)
        blobs = await _open_blobs(settings, state, store, cast(BlobRows, rows), is_shared=False)
        yield Registry(state, store, blobs, rows, sources, files)


def owner_of(disk: Path) -> str | None:
    """Returns whose the store on a disk is, as far as that is written there."""
    content = DirectoryStore(disk / "state" / "blobs").read_owner()
    return None if content is None else str(json.loads(content)["database"])


@contextmanager
def recorded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, has_state: bool = False
) -> Iterator[KillingFileSystem]:
    """Yields a disk whose power may fail, for the length of the block."""
    disk = directory / "disk"
    (disk / "state" if has_state else disk).mkdir(parents=True)
    files = KillingFileSystem(disk, directory / "cuts")
    files.make_durable()
    with monkeypatch.context() as patch:
        # What bypasses the port is noticed: a directory that is synced so is no file that the double knows.
        patch.setattr("os.fsync", files.sync_file)
        yield files
        files.live()
        files.close()


async def check(files: PowerCutFileSystem) -> None:
    """Starts a registry on each disk: what was acknowledged is there and right, and nothing else is."""
    for number, cut in enumerate(files.cuts):
        where = f"{cut.survived} reached the disk before: {cut.operation}"
        # Who writes rows was told that the store is its own.
        assert owner_of(cut.root) == MINE or Rows(cut.root / "index.db").claimed_by() is None, where
        async with registry(cut.root) as after:
            check_blobs(after, where)
            assert owner_of(cut.root) == MINE, where
            # And it works: what was never acknowledged comes again.
            if number % 7 == 0:
                await after.put(NEW)
                check_blobs(after, where)


def check_blobs(after: Registry, where: str) -> None:
    expected = after.rows.get()
    assert {blob.hash: blob.size_bytes for blob in after.store.scan()} == expected, where
    for hash_ in expected:
        path, status = after.store.path(hash_), after.store.path(hash_).stat()
        with after.store.open(hash_) as file:
            assert hashlib.sha256(file.read()).hexdigest() == hash_, where
        # Another name would be one that the next download writes to.
        assert (status.st_mode & 0o777, status.st_nlink) == (0o444, 1), f"{where}: {path.name}"
    known = {"lock", "blobs/owner.json", *(f"blobs/sha256/{hash_[:2]}/{hash_}" for hash_ in expected)}
    names = {str(path.relative_to(after.state.root)) for path in after.state.root.rglob("*") if path.is_file()}
    # Downloads stay until they are asked for again, or are a day old.
    assert {name for name in names if not name.startswith("downloads/")} == known, where


async def test_no_power_failure_leaves_a_wrong_byte_or_loses_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(tmp_path, monkeypatch) as files:
        async with registry(files.root, files) as running:
            await running.put(OLD)
            await running.put(NEW, home=running.state.work)
            await running.put(EMPTY, home=running.state.downloads)
            await running.put(NEW)
            await running.delete(OLD)
            await running.discard(OTHER)
            running.forget(NEW)
            await running.collect()
            await running.put(OLD, home=running.state.downloads)
    assert files.operation_count > 50
    assert len(files.cuts) > files.operation_count
    await check(files)


@pytest.mark.parametrize(
    "killed_at",
    [*OWNER_NAMED, *(pytest.param(number, marks=pytest.mark.soak) for number in OTHERS)],
)
async def test_what_kills_left_and_starts_took_up_survives_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """A start reads the right names and bytes from memory; that they are on the disk is for it to see to."""
    choices = random.Random(killed_at)
    with recorded(tmp_path, monkeypatch, has_state=True) as files:
        for ends_at, step_count in ((killed_at, 10), (choices.randrange(5, 40), 10), (0, 4)):
            files.live(ends_at)
            with suppress(Killed):
                async with registry(files.root, files) as running:
                    for _ in range(step_count):
                        await _step(running, choices)
    await check(files)


async def _step(running: Registry, choices: random.Random) -> None:
    content = choices.choice(CONTENTS)
    match choices.randrange(6):
        case 0 | 1:
            await running.put(content)
        case 2:
            await running.put(content, home=choices.choice((running.state.work, running.state.downloads)))
        case 3:
            await running.delete(content)
        case 4:
            running.forget(content)
            await running.collect()
        case _:
            await running.discard(content)


async def test_a_power_failure_leaves_a_store_its_owner_or_gives_it_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(tmp_path, monkeypatch) as files:
        async with registry(files.root, files) as first:
            await first.put(OLD)
        taken_over_at = len(files.cuts)
        async with registry(files.root, files, database=NEXT, take_over_from=MINE) as second:
            await second.put(NEW)
    owners = set()
    for number, cut in enumerate(files.cuts):
        claimed_by, owner = Rows(cut.root / "index.db").claimed_by(), owner_of(cut.root)
        assert owner in ({MINE, NEXT} if number >= taken_over_at else {None, MINE}), cut
        assert claimed_by in (None, owner) or (claimed_by, owner) == (MINE, NEXT), cut
        owners.add(owner)
        async with registry(cut.root, database=NEXT, take_over_from=MINE) as after:
            check_blobs(after, f"{cut.survived} reached the disk before: {cut.operation}")
        with pytest.raises(PreconditionFailed):
            async with registry(cut.root):
                pass
    assert owners == {None, MINE, NEXT}


def test_an_owner_that_was_written_outlives_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(tmp_path, monkeypatch) as files:
        assert DirectoryStore(files.root / "state" / "blobs", files).create_owner(b'{"database": "mine"}')
        Rows(files.root / "index.db").set({})
    claimed = [cut.root for cut in files.cuts if Rows(cut.root / "index.db").claimed_by()]
    assert claimed
    assert {owner_of(root) for root in claimed} == {MINE}
