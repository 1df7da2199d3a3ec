"""Which blobs go: what nothing refers to and what is old enough. Pure.

The grace period is for what this registry can't know: another registry that ingests into the same store, a reader that
was told of a revision a moment before it was deleted. Of a store that several registries have, a blob must also have
been without a reference for that long, as far as the collector has seen: another one's ingest may have found it. What
this registry itself is ingesting is protected by claims (``claims``), whatever its age.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product
from string import hexdigits
from typing import Final

# A megabyte of names and sizes.
_PORTION: Final = 4096
MAX_NAMED: Final = 100
"""Missing blobs that a report names: enough to know which models to ingest again."""


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
        whole: Hash and size of what something refers to and is there with its size.
    """

    doomed: tuple[StoredBlob, ...]
    young: tuple[StoredBlob, ...]
    whole: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What a collection did, or would do; the fields are the contract's. ``missing`` names the first of them only."""

    removed_count: int
    removed_bytes: int
    spared_count: int
    spared_bytes: int
    reachable_count: int
    reachable_bytes: int
    unfinished_count: int
    missing: tuple[str, ...]
    missing_count: int = 0


def prefixes(blob_count: int) -> list[str]:
    """Returns beginnings of hashes, each hash having one, that so many blobs are looked at by: some thousands a time.

    What is known of blobs is never in memory for all of them; small registries are read at once.
    """
    digits = 0 if blob_count <= _PORTION else 1 if blob_count <= 16 * _PORTION else 2
    return ["".join(each) for each in product(hexdigits[:16], repeat=digits)]


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
        stored: Blobs of the store.
        reachable: Hash and size of those of them, at least, that something refers to. What changed since it was read is
            looked at again before a blob goes (``claims``).
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
    return CollectionPlan(tuple(doomed), tuple(young), whole)
