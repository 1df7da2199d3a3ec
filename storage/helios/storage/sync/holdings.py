"""What a node holds, and what of that a registry has not been told yet. Pure."""

from dataclasses import dataclass
from itertools import islice
from typing import Final

MAX_ENTRIES: Final = 1_000
"""Of one message: some 70 KB. The contract's bound."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Blobs (sha256) and revisions (digests) that are here, whole."""

    blobs: frozenset[str] = frozenset()
    revisions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Change:
    """What is here more, and what no longer."""

    blobs: frozenset[str]
    gone_blobs: frozenset[str]
    revisions: frozenset[str]
    gone_revisions: frozenset[str]

    def __bool__(self) -> bool:
        return any((self.blobs, self.gone_blobs, self.revisions, self.gone_revisions))


def next_change(told: Holdings, here: Holdings) -> Change:
    """The next part of what was not told, at most MAX_ENTRIES of it; what is gone first, for others may wait for it."""
    left = MAX_ENTRIES
    parts: list[frozenset[str]] = []
    for more in (
        told.blobs - here.blobs,
        told.revisions - here.revisions,
        here.blobs - told.blobs,
        here.revisions - told.revisions,
    ):
        parts.append(frozenset(islice(more, left)))
        left -= len(parts[-1])
    return Change(parts[2], parts[0], parts[3], parts[1])


def apply(told: Holdings, change: Change) -> Holdings:
    """What was told once the change was."""
    return Holdings(
        (told.blobs - change.gone_blobs) | change.blobs, (told.revisions - change.gone_revisions) | change.revisions
    )
