"""What the index does with a file that it can't use: one that is damaged goes, one that is only out of reach stays."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helios.mesh.errors import Unavailable
from helios.storage import index as index_module
from helios.storage.index import Index
from helios.storage.leases import Lease
from helios.storage.manifest import Digest, ManifestEntry, manifest_digest
from helios.storage.prefetch.state import Account

LEASE = Lease("id", "sha256:" + "a" * 64, "worker", timedelta(seconds=60), datetime(2030, 1, 1, tzinfo=UTC))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An index with one lease."""
    with closing(Index(tmp_path / "index.db")) as index:
        index.put_lease(LEASE)
    return tmp_path / "index.db"


def leases(path: Path) -> list[Lease]:
    with closing(Index(path)) as index:
        return index.load_leases()


def test_an_index_that_is_locked_is_an_error_and_keeps_its_leases(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="locked"):
            Index(path)
    assert leases(path) == [LEASE]


def test_an_index_of_the_version_before_keeps_what_it_has(tmp_path: Path) -> None:
    """A node that is upgraded neither hashes its blobs again nor loses its leases."""
    old = tmp_path / "old.db"
    blob = Digest("b" * 64, 3)
    entries = [ManifestEntry("w", blob, "raw")]
    revision = manifest_digest(entries)
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.executescript(index_module._SCHEMA_1 + "PRAGMA user_version = 1;")
        connection.execute("INSERT INTO blobs VALUES (?, ?)", (blob.hash, blob.size_bytes))
        connection.execute("INSERT INTO revisions VALUES (?, 1000.0)", (revision,))
        connection.execute("INSERT INTO entries VALUES (?, 'w', ?, 3, 'raw')", (revision, blob.hash))
        connection.execute("INSERT INTO leases VALUES ('id', ?, 'worker', 60.0, 2000.0)", (revision,))
    for _ in range(2):
        with closing(Index(old)) as index:
            assert index.load_blobs() == [blob]
            assert index.load_scrub_times() == {blob.hash: 0.0}
            (resident,) = index.load_revisions()
            assert (resident.revision, resident.use_count, resident.clock) == (revision, 1, 0.0)
            assert [lease.id for lease in index.load_leases()] == ["id"]
            assert (index.load_pins(), index.load_facts()) == ([], {})


def test_what_was_fetched_ahead_is_known_again(path: Path) -> None:
    account = Account(490_000, 5 << 40, {LEASE.revision: 3 << 40, "other": 1}, 7 << 40, 1, 2)
    with closing(Index(path)) as index:
        assert index.load_account() == Account()
        index.put_account(Account(unused={"gone": 1}))
        index.put_account(account)
    with closing(Index(path)) as index:
        assert index.load_account() == account


def test_an_index_of_a_version_to_come_is_replaced(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert leases(path) == []


def test_an_index_that_is_damaged_is_replaced(path: Path) -> None:
    path.write_bytes(b"no database " * 1_000)
    assert leases(path) == []
