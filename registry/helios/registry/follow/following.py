"""What a model follows, and when it is looked at next. Pure: time and chance are passed in."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.registry.rollout.steps import check_weight
from helios.registry.sources.patterns import Selection
from helios.registry.sources.reference import invalid_source, parse_reference

DEFAULT_INTERVAL: Final = timedelta(hours=1)
# Below ten seconds a place would be asked more often than its metadata is cached; a quarter is as good as never.
MIN_INTERVAL: Final = timedelta(seconds=10)
MAX_INTERVAL: Final = timedelta(days=90)
# Names what was pulled last, where that is not served at once.
NEXT_TAG: Final = "next"
# Share of an interval that a pause may be shorter or longer.
_JITTER: Final = 0.1
# The first pause after a failure; a place that is away is not asked more often than one that is there.
_BACK_OFF: Final = timedelta(minutes=1)
_MAX_BACK_OFF: Final = timedelta(hours=6)
# For people; messages name files and URLs.
MAX_ERROR_CHARS: Final = 500


class Policy(StrEnum):
    """What a new revision does to requests."""

    KEEP = "keep"
    MOVE = "move"
    ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be followed, and how.

    Attributes:
        source: As an ingest takes it; one that is reached by a network.
        weight_percent: Of the policy ``rollout``: the share that a new revision begins with.
    """

    source: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    interval: timedelta = DEFAULT_INTERVAL
    policy: Policy = Policy.KEEP
    weight_percent: int = 0

    def check(self) -> "Wish":
        """Returns itself. Raises InvalidRequest (INVALID_SOURCE, INVALID_INTERVAL, INVALID_WEIGHT, INVALID_PATTERN)."""
        if parse_reference(self.source) is None:
            raise invalid_source(
                f"{self.source[:200]!r} can't be followed: it is not reached by a network (hf:, ms:, https://, s3://,"
                " gs://, az:// or oci://)"
            )
        Selection(self.include, self.exclude).check()
        if not MIN_INTERVAL <= self.interval <= MAX_INTERVAL:
            raise InvalidRequest(
                f"an interval is {MIN_INTERVAL.total_seconds():.0f} seconds to {MAX_INTERVAL.days} days",
                reason="INVALID_INTERVAL",
                metadata={"param": "interval"},
            )
        check_weight(self.weight_percent)
        return self


@dataclass(frozen=True, slots=True)
class Following:
    """What a model follows, and how that went.

    Attributes:
        fingerprint: Stands for what the place had when it was last ingested; empty: not looked at yet.
        checked_at: When it was looked at last; None: not yet.
        changed_at: When a new revision came of it last; None: not yet.
        error: Why the last look, or the ingest after it, failed; empty: it did not.
        error_reason: That error's stable name.
        failure_count: How often in a row.
    """

    model: str
    wish: Wish
    next_at: datetime
    fingerprint: str = ""
    checked_at: datetime | None = None
    changed_at: datetime | None = None
    error: str = ""
    error_reason: str = ""
    failure_count: int = 0


def next_pause(
    interval: timedelta, *, failure_count: int, retry_after_seconds: float | None, chance: float
) -> timedelta:
    """Returns how long to wait before the next look.

    Args:
        interval: Between looks that succeed.
        failure_count: Failures in a row, this one included; 0: it succeeded.
        retry_after_seconds: What the place asked for; not to be undercut.
        chance: A random number in [0, 1), which keeps those that fail together from coming back together.
    """
    if not failure_count:
        return interval * (1 - _JITTER + 2 * _JITTER * chance)
    # Beyond 2 ** 20 minutes every bound is passed.
    grown = min(_BACK_OFF * 2.0 ** min(failure_count - 1, 20), max(interval, _MAX_BACK_OFF))
    pause = grown * (0.5 + 0.5 * chance)
    asked = timedelta(seconds=min(retry_after_seconds or 0.0, MAX_INTERVAL.total_seconds()))
    return max(pause, asked)
