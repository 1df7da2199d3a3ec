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


def test_an_index_that_is_damaged_is_replaced(path: Path) -> None:
    path.write_bytes(b"no database " * 1_000)
    assert leases(path) == []
