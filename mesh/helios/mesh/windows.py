"""Times with bounds of their own: "two replicas from 8 to 18 on weekdays". Pure.

The registry checks them, proxies live by them. A window begins when a cron expression says so, in a time zone of its
own, and lasts until the clock on the wall there shows that its time is over, so that a day of 23 hours has the same
hours of work. Expressions are cronsim's: it follows Debian's cron also where clocks are put forward or back, and goes
backwards, which tells whether a window is open without walking through the past. croniter, its rival, changed hands
twice and has an answer of its own for the hour that there is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

# Longer ones overlap with themselves, if anything begins them once a week.
_MOST_SECONDS: Final = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Window:
    """Times at which a model has other bounds.

    Attributes:
        begins: Cron expression of five fields: "0 8 * * MON-FRI".
        seconds: How long it lasts, from a minute to a week.
        time_zone: IANA name of the zone that this is meant in; empty: UTC.
        min_replicas: At least so many then; None: as at other times.
        max_replicas: At most so many then, 0: no bound; None: as at other times.
    """

    begins: str
    seconds: float
    time_zone: str = ""
    min_replicas: int | None = None
    max_replicas: int | None = None

    def problem(self) -> str:
        """Says, for people, what is wrong with it; empty: nothing."""
        try:
            CronSim(self.begins, datetime.now(_zone(self.time_zone)))
        except CronSimError as error:
            return f"{self.begins!r} is no cron expression: {error}"
        except (ZoneInfoNotFoundError, ValueError, OSError):
            return f"there is no time zone {self.time_zone!r}"
        if len(self.begins.split()) != 5:
            return f"{self.begins!r} is no cron expression of five fields"
        if not 60 <= self.seconds <= _MOST_SECONDS:
            return f"a window lasts a minute to a week, not {self.seconds:g} s"
        return ""


def bounds_at(
    minute: int, windows: Sequence[Window], *, min_replicas: int, max_replicas: int
) -> tuple[int, int, Window | None]:
    """Returns the bounds in a minute since 1970, and the window that they are of.

    Of several windows that are open the last one counts. A window that lifts only the lower bound above the upper one
    lifts that, too.
    """
    for window in reversed(windows):
        if is_open(window, minute):
            least = min_replicas if window.min_replicas is None else window.min_replicas
            most = max_replicas if window.max_replicas is None else window.max_replicas
            return least, max(most, least) if most else 0, window
    return min_replicas, max_replicas, None


@lru_cache(maxsize=4096)
def is_open(window: Window, minute: int) -> bool:
    """Whether a window without a `problem` is open in a minute since 1970."""
    now = datetime.fromtimestamp(minute * 60, UTC).astimezone(_zone(window.time_zone))
    if now.fold and not _is_by_the_hour(window.begins):
        # What was open when clocks were put back is open until they show again what they had shown.
        return is_open(window, minute - 1)
    # From the next minute, so that one that begins now is found.
    began = next(CronSim(window.begins, now + timedelta(minutes=1), reverse=True), None)
    # Between two moments of one zone, Python counts what the clock on the wall shows.
    return began is not None and (now - began).total_seconds() < window.seconds


def _is_by_the_hour(begins: str) -> bool:
    """Whether cron begins it in each hour that there is, and not by the clock on the wall."""
    minutes, hours = begins.split()[:2]
    return minutes.startswith("*") or hours.startswith("*")


def _zone(name: str) -> tzinfo:
    return ZoneInfo(name) if name else UTC
