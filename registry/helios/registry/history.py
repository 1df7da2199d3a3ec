"""Where a pointer goes back to. Pure.

A pointer is a model's served revision or one of its tags. Its history is a list of moves that only grows; read as a
stack, a move pushes a revision and a rollback pops down to one. So rolling back twice goes back two revisions, rather
than to where the first rollback came from, and what was rolled back from is not returned to.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Cause(StrEnum):
    """Why a pointer moved."""

    INGEST = "ingest"
    TAG = "tag"
    ROLLBACK = "rollback"
    DELETE = "delete"
    PROMOTION = "promotion"


@dataclass(frozen=True, slots=True)
class Move:
    """One move of a pointer.

    Attributes:
        version: Number of the change.
        tag: Which pointer: a tag, or empty for the served revision.
        revision: Where it points from then on; None: the tag was deleted.
    """

    version: int
    tag: str
    revision: str | None
    cause: Cause
    actor: str
    at: datetime


def stack_of(moves: Iterable[Move]) -> list[str]:
    """Returns where a pointer has been, the revision that it points at last; empty for a tag that is not there.

    Args:
        moves: All moves of one pointer, the oldest first. The oldest may be missing.
    """
    stack: list[str] = []
    for move in moves:
        if move.revision is None:
            stack.clear()
        elif move.cause is Cause.ROLLBACK:
            while stack and stack[-1] != move.revision:
                stack.pop()
        if move.revision is not None and stack[-1:] != [move.revision]:
            stack.append(move.revision)
    return stack


def rollback_target(moves: Iterable[Move], alive: Collection[str]) -> str | None:
    """Returns the revision before the one that a pointer points at, None where there is none.

    Args:
        moves: As ``stack_of`` takes them.
        alive: The model's revisions; those that were deleted are passed over.
    """
    stack = stack_of(moves)
    return next((revision for revision in reversed(stack[:-1]) if revision in alive and revision != stack[-1]), None)
