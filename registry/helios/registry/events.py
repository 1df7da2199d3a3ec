"""What happens to models, as values, and how a change is asked for. Others get these through ``client``."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from helios.mesh.errors import Conflict, InvalidRequest

MAX_REQUEST_ID_CHARS: Final = 128


class EventKind(StrEnum):
    """What happened to a model."""

    MODEL_CREATED = "model_created"
    MODEL_DELETED = "model_deleted"
    REVISION_ADDED = "revision_added"
    REVISION_DELETED = "revision_deleted"
    SERVED_MOVED = "served_moved"
    TAG_MOVED = "tag_moved"
    TAG_DELETED = "tag_deleted"
    ALIAS_ADDED = "alias_added"
    ALIAS_REMOVED = "alias_removed"
    POLICY_CHANGED = "policy_changed"
    SETTINGS_CHANGED = "settings_changed"
    REVISION_PINNED = "revision_pinned"
    REVISION_UNPINNED = "revision_unpinned"
    ROLLOUT_MOVED = "rollout_moved"
    ROLLOUT_ENDED = "rollout_ended"
    SOURCE_FOLLOWED = "source_followed"
    SOURCE_UNFOLLOWED = "source_unfollowed"
    SOURCE_CHANGED = "source_changed"
    SOURCE_FAILED = "source_failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one model. ``detail`` says what the kind leaves open: revision, tag, alias, cause, reason."""

    version: int
    kind: EventKind
    model: str
    detail: Mapping[str, str]
    actor: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Mutation:
    """How a change is asked for.

    Attributes:
        actor: Who asks, for people; a component of the mesh.
        request_id: The same request sent again changes nothing; empty: it counts as another one.
        expected_version: The model's version that the caller has seen; 0: any.
        is_dry_run: It is carried out as if it were meant, and taken back: only what would be is asked.
    """

    actor: str = ""
    request_id: str = ""
    expected_version: int = 0
    is_dry_run: bool = False

    def check(self) -> "Mutation":
        """Returns itself. Raises InvalidRequest (INVALID_REQUEST_ID)."""
        if len(self.request_id) > MAX_REQUEST_ID_CHARS or not self.request_id.isprintable():
            raise InvalidRequest(
                f"request_id has at most {MAX_REQUEST_ID_CHARS} printable characters",
                reason="INVALID_REQUEST_ID",
                metadata={"param": "request_id"},
            )
        return self

    def check_version(self, model: str, found: int) -> None:
        """Raises Conflict (STALE_VERSION) where a model has another version than the caller has seen."""
        expected = self.expected_version
        if expected and found != expected:
            raise Conflict(
                f"{model!r} was changed meanwhile: it has version {found}, not {expected}; look at it again",
                reason="STALE_VERSION",
                metadata={"model": model, "version": str(found), "expected_version": str(expected)},
            )


PLAIN: Final = Mutation()


@dataclass(frozen=True, slots=True)
class EventsMissed:
    """Changes up to this version are not known any more: read the models anew. Those after it follow."""

    version: int
