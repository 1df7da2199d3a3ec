"""What the errors of the two database drivers mean to a caller, in two tables."""

import sqlite3
from typing import Final

from sqlalchemy.exc import DBAPIError

from helios.mesh.errors import Bug, Corrupted, DiskFull, HeliosError, PreconditionFailed, Unavailable

_Meaning = tuple[type[HeliosError], str]

_SQLITE: Final[dict[int, _Meaning]] = {
    sqlite3.SQLITE_FULL: (DiskFull, "the disk of the registry's database is full"),
    sqlite3.SQLITE_BUSY: (Unavailable, "the registry's database is locked by another program"),
    sqlite3.SQLITE_LOCKED: (Unavailable, "the registry's database is locked by another program"),
    sqlite3.SQLITE_CORRUPT: (Corrupted, "the registry's database is damaged"),
    sqlite3.SQLITE_NOTADB: (Corrupted, "the registry's database is not an SQLite file"),
    sqlite3.SQLITE_READONLY: (Unavailable, "the registry's database can't be written"),
    sqlite3.SQLITE_CANTOPEN: (Unavailable, "the registry's database can't be opened"),
    sqlite3.SQLITE_IOERR: (Unavailable, "the disk of the registry's database fails"),
}

# By SQLSTATE, and below by its class. Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRESQL: Final[dict[str, _Meaning]] = {
    "25006": (Unavailable, "the registry's database is read-only, as a standby is"),
    "53100": (DiskFull, "the disk of the registry's database is full"),
    "55P03": (Unavailable, "the registry's database is locked for longer than a call may wait"),
    "57014": (Unavailable, "the registry's database took longer than a call may"),
    "3D000": (PreconditionFailed, "the registry's database does not exist; create it"),
    "42501": (PreconditionFailed, "the registry's user may not do this in its database"),
}
_POSTGRESQL_CLASSES: Final[dict[str, _Meaning]] = {
    "08": (Unavailable, "the registry's database can't be reached"),
    "25": (Unavailable, "the registry's database ended the transaction"),
    "28": (PreconditionFailed, "the registry's database does not know its user"),
    "40": (Unavailable, "the registry's database undid the transaction; try again"),
    "53": (Unavailable, "the registry's database is short of a resource"),
    "57": (Unavailable, "the registry's database stops or starts"),
    "58": (Unavailable, "the system of the registry's database fails"),
    "XX": (Corrupted, "the registry's database is damaged"),
}


def error_of(error: DBAPIError) -> HeliosError:
    """Returns what a driver's error means; one that nothing is known of is a Bug."""
    meaning = _meaning(error)
    if meaning is None:
        return Bug(f"the registry's database refused a statement: {error.orig}")
    kind, message = meaning
    return kind(f"{message} ({str(error.orig).strip()})")


def _meaning(error: DBAPIError) -> _Meaning | None:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(code, int):
        return _SQLITE.get(code & 0xFF)
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(state, str):
        return _POSTGRESQL.get(state) or _POSTGRESQL_CLASSES.get(state[:2])
    # libpq has no code for a connection that can't be made or broke off.
    return _POSTGRESQL_CLASSES["08"] if error.connection_invalidated or _is_operational(error) else None


def _is_operational(error: DBAPIError) -> bool:
    return type(error).__name__ == "OperationalError" and hasattr(error.orig, "sqlstate")
