"""Which blobs go: what nothing refers to and what is old enough. Pure.

The grace period is for what this registry can't know: another registry that ingests into the same store, a reader that
was told of a revision a moment before it was deleted. Of a store that several registries have, a blob must also have
been without a reference for that long, as far as the collector has seen: another one's ingest may have found it. What
this registry itself is ingesting is protected by claims (``claims``), whatever its age.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob as a store lists it; ``modified_at`` is when it was stored last."""

    hash: str
    size_bytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What a collection finds.

    Attributes:
        doomed: Nothing refers to them and they are old enough.
        young: Nothing refers to them either, not yet perhaps.
        reachable_count: Blobs that something refers to and that are there whole.
        reachable_bytes: Their bytes.
        missing: Hashes that something refers to and that are not there with their size.
    """

    doomed: tuple[StoredBlob, ...]
    young: tuple[StoredBlob, ...]
    reachable_count: int
    reachable_bytes: int
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What a collection did, or would do; the fields are the contract's."""

    removed_count: int
    removed_bytes: int
    spared_count: int
    spared_bytes: int
    reachable_count: int
    reachable_bytes: int
    unfinished_count: int
    missing: tuple[str, ...]


def plan_collection(
    stored: Iterable[StoredBlob],
    reachable: Mapping[str, int],
    *,
    now: datetime,
    grace: timedelta,
    free_since: Mapping[str, datetime] | None = None,
) -> CollectionPlan:
    """Sorts blobs into those that go and those that stay.

    Args:
        stored: All that the store has.
        reachable: Hash and size of what something refers to, read *after* ``stored`` was: a blob whose rows went
            meanwhile only stays until the next time.
        now: The time by the store's clock, as far as it is known.
        grace: What is younger stays; nothing that is exactly as old.
        free_since: Where given, what nothing refers to must have been so for as long: since then, by its hash, and only
            from now on if it is not named.
    """
    doomed: list[StoredBlob] = []
    young: list[StoredBlob] = []
    whole: dict[str, int] = {}
    for blob in stored:
        if blob.hash not in reachable:
            since = blob.modified_at if free_since is None else max(blob.modified_at, free_since.get(blob.hash, now))
            (doomed if now - since >= grace else young).append(blob)
        elif reachable[blob.hash] == blob.size_bytes:
            whole[blob.hash] = blob.size_bytes
    missing = tuple(sorted(reachable.keys() - whole.keys()))
    return CollectionPlan(tuple(doomed), tuple(young), len(whole), sum(whole.values()), missing)
