"""Whose a blob store is: the one database that decides what in it is garbage.

Two databases on one prefix of a bucket, or on one directory, would each delete the other's blobs. So a store names its
database in ``owner.json``, made by a write that fails where there is one. A registry with another database does not
start; one whose store was taken over deletes nothing any more. Replicas on one database are one owner.

A database that was copied has its name twice: a registry on a copy is to take a prefix of its own before it starts.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from helios.mesh.errors import PreconditionFailed

OWNER_FILE: Final = "owner.json"


class OwnedStore(Protocol):
    """A blob store that can say whose it is. Blocking."""

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    def read_owner(self) -> bytes | None:
        """Returns what was written last, None where that is nothing. Raises Unavailable."""
        ...

    def create_owner(self, content: bytes) -> bool:
        """Writes it where there is none; of several at once one does. Returns False where there is one."""
        ...

    def replace_owner(self, content: bytes) -> None:
        """Writes it, whatever there is. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """A store as one database's.

    Attributes:
        store: The store.
        database_id: The name of the database.
    """

    store: OwnedStore
    database_id: str

    def require(self, now: datetime, *, take_over_from: str = "") -> None:
        """Makes a store that nobody has this database's, and finds that it is so. Blocks.

        Args:
            now: The time, for people to read.
            take_over_from: The name of a database whose store this is to become; of no other one it does.

        Raises:
            PreconditionFailed: BLOB_STORE_OWNED, it is another database's.
            Unavailable: The store can't be asked.
        """
        mine = json.dumps({"database": self.database_id, "since": now.isoformat(timespec="seconds")}).encode()
        found = self.store.read_owner()
        if found is None and self.store.create_owner(mine):
            return
        # Whoever was faster may be a replica with the same database.
        owner, since = _read(found if found is not None else self.store.read_owner())
        if owner == self.database_id:
            return
        if take_over_from and owner == take_over_from:
            self.store.replace_owner(mine)
            return
        raise PreconditionFailed(
            f"the blobs at {self.store.url} belong to the database {owner} since {since}, this registry has"
            f" {self.database_id}: give it a place of its own; or, if that database is in use no more, start it with"
            f" blob_store.take_over_from={owner}, and what this database does not name is collected",
            reason="BLOB_STORE_OWNED",
            metadata={"owner": owner, "database": self.database_id},
        )


def _read(content: bytes | None) -> tuple[str, str]:
    """Returns a database's name and since when; "unknown" where nobody can tell."""
    try:
        document = json.loads(content or b"")
        return str(document["database"]), str(document["since"])
    except (ValueError, KeyError, TypeError):
        return "unknown", "unknown"
