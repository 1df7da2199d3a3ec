"""The residency index of a tier on its disk: blobs, revisions, leases, pins and measured facts, in SQLite.

SQLite rather than an atomically written JSON file: a renewal touches one row every few seconds where JSON would
rewrite everything, and a revision appears with all of its entries in one transaction. WAL with synchronous=NORMAL: a
commit survives the death of this process without an fsync. A power failure may lose the last commits, which costs
nothing that matters: blobs are the truth and are adopted again, and every holder died with the machine.

All methods block; call them from one thread at a time.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from helios.mesh.errors import DigestMismatch, DiskFull, HeliosError, InvalidRequest, Unavailable
from helios.storage.inventory import Resident
from helios.storage.leases import Lease
from helios.storage.manifest import Digest, ManifestEntry, make_manifest
from helios.storage.prefetch.state import Account

log = structlog.get_logger()

_SCHEMA_VERSION = 3
"""An older version is upgraded; a newer one is dropped and rebuilt from the blobs, which hashes all of them: the index
is a cache of the disk, leases and pins aside."""

CLOCK = "clock"
"""The fact that says where the tier's clock stands (`eviction`)."""

_BUSY_SECONDS = 5.0
"""A backup, or sqlite3 on the command line, may hold the lock for moments."""

_NO_ROOM = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE"})
"""A full disk is SQLITE_FULL; a limit on the size of a file comes as a failed write."""

_SCHEMA_1 = """
CREATE TABLE blobs (hash TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE revisions (revision TEXT PRIMARY KEY, last_used_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    revision TEXT NOT NULL REFERENCES revisions ON DELETE CASCADE,
    path TEXT NOT NULL, hash TEXT NOT NULL, size_bytes INTEGER NOT NULL, media_type TEXT NOT NULL,
    PRIMARY KEY (revision, path)
) WITHOUT ROWID;
CREATE TABLE leases (
    id TEXT PRIMARY KEY, revision TEXT NOT NULL, holder TEXT NOT NULL, ttl_seconds REAL NOT NULL, ends_at REAL NOT NULL
) WITHOUT ROWID;
"""

_SCHEMA_2 = """
ALTER TABLE blobs ADD COLUMN scrubbed_at REAL NOT NULL DEFAULT 0;
ALTER TABLE revisions ADD COLUMN use_count INTEGER NOT NULL DEFAULT 1;
ALTER TABLE revisions ADD COLUMN clock REAL NOT NULL DEFAULT 0;
CREATE TABLE pins (revision TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""

_SCHEMA_3 = """
CREATE TABLE ahead (revision TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
"""

_ACCOUNT = {
    "hour": "ahead_hour",
    "spent_bytes": "ahead_spent_bytes",
    "fetched_bytes": "ahead_fetched_bytes",
    "used_bytes": "ahead_used_bytes",
    "wasted_bytes": "ahead_wasted_bytes",
}
"""The facts that are the counts of fetching ahead; SQLite's REAL holds bytes exactly up to 9 PB."""

_UPGRADES = (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3)
"""What makes each version of the one before; the first makes one of nothing."""


class Index:
    """Rows on disk; it decides nothing."""

    def __init__(self, path: Path) -> None:
        """Opens the index. One that is damaged, or of another version, is replaced by an empty one.

        Raises:
            DiskFull: No room to open it.
            Unavailable: TIER_FAILED, when the disk fails otherwise, or another program has it locked.
        """
        self._path = path
        try:
            self._connection = self._open()
        except sqlite3.OperationalError as error:
            # The file is as good as it was: leases must not be lost to a full disk or a backup that runs.
            raise _write_error(error) from error
        except sqlite3.DatabaseError as error:
            log.warning("residency index replaced", path=str(path), error=str(error))
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = self._open()

    def close(self) -> None:
        self._connection.close()

    def load_blobs(self) -> list[Digest]:
        """All blobs that the index knows."""
        return [Digest(hash_, size) for hash_, size in self._rows("SELECT hash, size_bytes FROM blobs")]

    def load_revisions(self) -> list[Resident]:
        """The revisions; a row that is no valid manifest is left out."""
        entries: dict[str, list[ManifestEntry]] = {}
        for revision, path, hash_, size, media_type in self._rows("SELECT * FROM entries"):
            entries.setdefault(revision, []).append(ManifestEntry(path, Digest(hash_, size), media_type))
        found: list[Resident] = []
        columns = "SELECT revision, last_used_at, use_count, clock FROM revisions"
        for revision, last_used_at, use_count, clock in self._rows(columns):
            try:
                manifest = make_manifest(revision, entries.get(revision, []))
            except (InvalidRequest, DigestMismatch) as error:
                log.warning("revision in the index is invalid", revision=revision, error=error.message)
                continue
            found.append(Resident(manifest, datetime.fromtimestamp(last_used_at, UTC), use_count, clock))
        return found

    def load_pins(self) -> list[str]:
        """Revisions that are pinned, by digest."""
        return [revision for (revision,) in self._rows("SELECT revision FROM pins ORDER BY revision")]

    def load_facts(self) -> dict[str, float]:
        """What was measured of the tier, and where its clock stands."""
        return dict(self._rows("SELECT name, value FROM facts"))

    def load_account(self) -> Account:
        """What fetching ahead has cost and brought."""
        facts = self.load_facts()
        counts = {field: int(facts.get(name, 0.0)) for field, name in _ACCOUNT.items()}
        return Account(unused=dict(self._rows("SELECT revision, size_bytes FROM ahead")), **counts)

    def load_scrub_times(self) -> dict[str, float]:
        """When each blob was verified last, in seconds of the epoch, by hash; 0: not known."""
        return dict(self._rows("SELECT hash, scrubbed_at FROM blobs"))

    def load_leases(self) -> list[Lease]:
        """All leases that were kept."""
        rows = self._rows("SELECT id, revision, holder, ttl_seconds, ends_at FROM leases")
        return [
            Lease(id_, revision, holder, timedelta(seconds=ttl), datetime.fromtimestamp(ends_at, UTC))
            for id_, revision, holder, ttl, ends_at in rows
        ]

    def put_blob(self, digest: Digest, verified_at_seconds: float) -> None:
        """Writes a blob, and when it was verified, in seconds of the epoch."""
        with self._transaction() as transaction:
            row = (digest.hash, digest.size_bytes, verified_at_seconds)
            transaction.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", row)

    def put_scrub_time(self, hash_: str, at_seconds: float) -> None:
        """Notes when a blob was read and found good."""
        with self._transaction() as transaction:
            transaction.execute("UPDATE blobs SET scrubbed_at = ? WHERE hash = ?", (at_seconds, hash_))

    def put_facts(self, facts: dict[str, float]) -> None:
        """Writes what was measured."""
        with self._transaction() as transaction:
            transaction.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def put_account(self, account: Account) -> None:
        """Writes what fetching ahead has cost and brought."""
        with self._transaction() as transaction:
            rows = [(name, getattr(account, field)) for field, name in _ACCOUNT.items()]
            transaction.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)
            transaction.execute("DELETE FROM ahead")
            transaction.executemany("INSERT INTO ahead VALUES (?, ?)", account.unused.items())

    def put_pin(self, revision: str) -> None:
        """Writes a pin. Idempotent."""
        with self._transaction() as transaction:
            transaction.execute("INSERT OR REPLACE INTO pins VALUES (?)", (revision,))

    def delete_pin(self, revision: str) -> None:
        """Deletes a pin. Idempotent."""
        with self._transaction() as transaction:
            transaction.execute("DELETE FROM pins WHERE revision = ?", (revision,))

    def put_revision(self, resident: Resident) -> None:
        """Notes a revision with all its entries, in one transaction."""
        revision = resident.revision
        rows = [(revision, e.path, e.digest.hash, e.digest.size_bytes, e.media_type) for e in resident.manifest.entries]
        with self._transaction() as transaction:
            transaction.execute("DELETE FROM entries WHERE revision = ?", (revision,))
            transaction.execute(
                "INSERT OR REPLACE INTO revisions VALUES (?, ?, ?, ?)",
                (revision, resident.last_used_at.timestamp(), resident.use_count, resident.clock),
            )
            transaction.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows)

    def put_lease(self, lease: Lease, used: Resident | None = None) -> None:
        """Writes a lease, and with it when its revision was used."""
        row = (lease.id, lease.revision, lease.holder, lease.ttl.total_seconds(), lease.ends_at.timestamp())
        with self._transaction() as transaction:
            transaction.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", row)
            self._touch(transaction, [used] if used else [])

    def delete_leases(self, leases: Iterable[Lease], used: Iterable[Resident] = ()) -> None:
        """Deletes ended leases, and notes when their revisions were used."""
        with self._transaction() as transaction:
            transaction.executemany("DELETE FROM leases WHERE id = ?", [(lease.id,) for lease in leases])
            self._touch(transaction, used)

    def delete(
        self, *, revisions: Iterable[str] = (), blobs: Iterable[Digest] = (), clock: float | None = None
    ) -> None:
        """Deletes revisions with their entries, and blobs, in one transaction, and moves the clock."""
        with self._transaction() as transaction:
            if clock is not None:
                transaction.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (CLOCK, clock))
            transaction.executemany("DELETE FROM revisions WHERE revision = ?", [(name,) for name in revisions])
            transaction.executemany("DELETE FROM blobs WHERE hash = ?", [(blob.hash,) for blob in blobs])

    @staticmethod
    def _touch(transaction: sqlite3.Connection, used: Iterable[Resident]) -> None:
        rows = [(r.last_used_at.timestamp(), r.use_count, r.clock, r.revision) for r in used]
        transaction.executemany(
            "UPDATE revisions SET last_used_at = ?, use_count = ?, clock = ? WHERE revision = ?", rows
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits all or nothing.

        Raises:
            DiskFull: No room for the rows.
            Unavailable: TIER_FAILED, when the disk fails otherwise.
        """
        try:
            with self._connection as transaction:
                yield transaction
        except sqlite3.OperationalError as error:
            raise _write_error(error) from error

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(self._connection.execute(query)) as cursor:
            return cursor.fetchall()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            _prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def _write_error(error: sqlite3.OperationalError) -> HeliosError:
    name = error.sqlite_errorname
    if name in _NO_ROOM:
        return DiskFull("the storage agent's disk is full; evict a model or give it more room")
    return Unavailable(f"the residency index can't be written: {error}", reason="TIER_FAILED", metadata={"error": name})


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"schema version {version}, expected {_SCHEMA_VERSION}")
    if version < _SCHEMA_VERSION:
        upgrades = "".join(_UPGRADES[version:])
        connection.executescript(f"BEGIN; {upgrades} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
    if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
        raise sqlite3.DatabaseError("the integrity check failed")
