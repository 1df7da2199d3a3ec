"""Counts what this proxy sent to replicas, by model and hour, and lines reports up for the registry. Pure.

Each request is counted by the proxy that picked its replica, because a worker tells every proxy that it knows of how a
request ended: "started" and "finished" count where this proxy's ledger has, or lately had, the request's place, unless
another proxy picked it first, and this one only said where it goes on. A request that Envoy sends to a second replica
is one request, with the tokens and the time of both.

A report that was tried once is never changed, since nobody knows whether it arrived; sent again under its number it
counts once. What is counted meanwhile is gathered in one report behind it, so that an outage of the registry takes as
much memory as there are models and hours.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

# Requests that run, and those that failed a moment ago and may be tried elsewhere: a hundred bytes each.
_REQUEST_COUNT: Final = 65_536
# The registry takes no more in a report.
_REPORT_COUNT: Final = 10_000
# A day of 2,000 models in use every hour, 10 MB; beyond, the oldest is lost.
_TOTAL_COUNT: Final = 50_000
# UNKNOWN, INTERNAL, UNAVAILABLE: Envoy may try another replica.
_RETRIED: Final = frozenset({2, 13, 14})


class Tally(NamedTuple):
    """What was counted of a model in an hour; ``busy_ms`` is what requests took at replicas, in all.

    A NamedTuple because each request makes three.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cold_starts: int = 0
    busy_ms: int = 0

    def plus(self, other: Tally) -> Tally:
        """Returns the sums."""
        return Tally(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cold_starts + other.cold_starts,
            self.busy_ms + other.busy_ms,
        )


_NOTHING: Final = Tally()
_REQUEST: Final = Tally(requests=1)
Key = tuple[str, int]
"""A model and an hour."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is sent in one call; the registry counts it once, by its reporter and sequence."""

    reporter: str
    sequence: int
    tallies: dict[Key, Tally]


class Meter:
    """Counts. Hours are whole hours since 1970, UTC."""

    def __init__(self) -> None:
        self._ours: OrderedDict[str, None] = OrderedDict()
        self._others: OrderedDict[str, None] = OrderedDict()
        self._tallies: dict[Key, Tally] = {}

    def started(self, request_id: str, model: str, hour: int, *, is_ours: bool) -> None:
        """A replica says that a request reached it; `is_ours`: this proxy's ledger knows it."""
        if is_ours and request_id not in self._ours and request_id not in self._others:
            _note(self._ours, request_id)
            self._add(model, hour, _REQUEST)

    def finished(
        self, request_id: str, model: str, hour: int, *, taken: Tally, status_code: int, is_ours: bool
    ) -> None:
        """A replica says how a request ended, and what it took."""
        self.started(request_id, model, hour, is_ours=is_ours)
        if request_id in self._ours:
            self._add(model, hour, taken)
            if status_code not in _RETRIED:
                del self._ours[request_id]
        elif status_code not in _RETRIED:
            self._others.pop(request_id, None)

    def picked_again(self, request_id: str, *, is_ours: bool) -> None:
        """A request that is under way is picked another replica here. Where this proxy did not pick it first
        (`is_ours`: its ledger knows it), another one counts it, to its end.
        """
        if not is_ours and request_id not in self._ours:
            _note(self._others, request_id)

    def cold_start(self, model: str, hour: int) -> None:
        """A replica that was started or woken is ready."""
        self._add(model, hour, Tally(cold_starts=1))

    def adopt(self, request_ids: Iterable[str]) -> None:
        """Counts on with requests that ran when an earlier run of this proxy ended; they are counted as requests."""
        for request_id in request_ids:
            _note(self._ours, request_id)

    def running(self) -> list[str]:
        """Returns requests that are counted and have not ended."""
        return list(self._ours)

    def take(self) -> dict[Key, Tally]:
        """Returns what was counted since the last call."""
        taken, self._tallies = self._tallies, {}
        return taken

    def _add(self, name: str, hour: int, more: Tally) -> None:
        # Requests for a tag or a revision are the model's.
        key = name.partition("@")[0], hour
        self._tallies[key] = self._tallies.get(key, _NOTHING).plus(more)
        if len(self._tallies) > _TOTAL_COUNT:
            # Without a registry nobody takes them.
            del self._tallies[next(iter(self._tallies))]


def _note(requests: OrderedDict[str, None], request_id: str) -> None:
    requests[request_id] = None
    if len(requests) > _REQUEST_COUNT:
        requests.popitem(last=False)


class Outgoing:
    """Reports on their way, the oldest first.

    Invariants: a report that was tried is never changed; numbers of a reporter grow by one; never more than
    ``_TOTAL_COUNT`` tallies.
    """

    def __init__(self, reporter: str, inherited: Sequence[Report] = ()) -> None:
        """Begins with what an earlier run left, which may have been tried."""
        self._reporter = reporter
        self._sequence = 0
        self._reports = deque(inherited)
        self._tried = len(inherited)
        self.lost_count = 0

    def add(self, tallies: dict[Key, Tally]) -> None:
        """Lines up what was counted: in the last report where that was not tried, else in a new one."""
        items = deque(tallies.items())
        while items:
            if len(self._reports) <= self._tried or len(self._reports[-1].tallies) >= _REPORT_COUNT:
                self._sequence += 1
                self._reports.append(Report(self._reporter, self._sequence, {}))
            last = self._reports[-1].tallies
            while items and (items[0][0] in last or len(last) < _REPORT_COUNT):
                key, tally = items.popleft()
                last[key] = last.get(key, _NOTHING).plus(tally)
        while sum(len(report.tallies) for report in self._reports) > _TOTAL_COUNT:
            self.lost_count += len(self._reports.popleft().tallies)
            self._tried = max(0, self._tried - 1)

    def next(self) -> Report | None:
        """Returns the report to send now, which counts as tried; None: there is none."""
        if not self._reports:
            return None
        self._tried = max(1, self._tried)
        return self._reports[0]

    def delivered(self, report: Report) -> None:
        """The registry has it."""
        if self._reports and self._reports[0] is report:
            self._reports.popleft()
            self._tried -= 1

    def all(self) -> list[Report]:
        """Returns every report, the oldest first."""
        return list(self._reports)
