"""``helios models usage``: what models are asked for, what is expected of them, and how right that was."""

import json
from datetime import UTC, datetime
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.registry.client import Counts, Expectation, ModelUsage, Score, Target, UsageClient, hour_of, start_of

# An hour in the table is as wide as its share of the busiest one.
_BAR_CHARS: Final = 24


async def usage(state: StateDirectory, console: Console, name: str, *, hour_count: int, is_json: bool) -> None:
    """Shows the usage of a model hour for hour, or of all models in a line each where ``name`` is empty."""
    async with open_admin(state) as dialer:
        client = UsageClient(dialer)
        found = [await client.get(name, hour_count=hour_count)] if name else await client.list(hour_count=hour_count)
    if is_json:
        plain = [usage_as_json(one) for one in found]
        console.print_json(json.dumps(plain[0] if name else plain))
    elif name:
        _show_one(console, found[0], hour_count)
    else:
        console.print(_all_table(found, hour_count))


def usage_as_json(usage: ModelUsage) -> dict[str, Any]:
    """Returns a model's usage for JSON; times in UTC."""
    forecast, score, target = usage.forecast, usage.score, usage.target
    return {
        "model": usage.model,
        "counts": _counts(usage.counts),
        "hours": [
            {
                "begins_at": start_of(hour.hour).isoformat(),
                **_counts(hour.counts),
                "expected": _expectation(hour.expectation) if hour.expectation is not None else None,
            }
            for hour in usage.hours
        ],
        "forecast": None
        if forecast is None
        else {
            "method": forecast.method,
            "history_hours": forecast.history_hours,
            "made_at": forecast.made_at.isoformat(timespec="seconds"),
            "begins_at": start_of(forecast.first_hour).isoformat(),
            "hours": [_expectation(hour) for hour in forecast.hours],
        },
        "score": None
        if score is None
        else {
            "hour_count": score.hour_count,
            "wmape": score.wmape,
            "mase": score.mase,
            "covered_ratio": score.covered_ratio,
        },
        "target": target_as_json(target) if target is not None else None,
    }


def target_as_json(target: Target) -> dict[str, Any]:
    """Returns a target for JSON."""
    return {
        "rung": target.rung.name,
        "replica_count": target.replica_count,
        "reason": target.reason,
        "expires_at": target.expires_at.isoformat(),
    }


def _counts(counts: Counts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in Counts.__dataclass_fields__}


def _expectation(expected: Expectation) -> dict[str, float]:
    values = {"requests": expected.requests, "low": expected.low, "high": expected.high}
    return {name: round(value, 3) for name, value in values.items()}


def _all_table(found: list[ModelUsage], hour_count: int) -> Table:
    table = Table("MODEL", "REQUESTS", "TOKENS IN", "OUT", "COLD", "EXPECTED", "FORECAST", "KEPT BEST", box=box.SIMPLE)
    table.title = f"the last {hour_count} hours"
    hour = hour_of(datetime.now(UTC))
    for one in sorted(found, key=lambda usage: (-usage.counts.requests, usage.model)):
        expected = one.forecast.at(hour) if one.forecast is not None else None
        table.add_row(
            Text(one.model),
            f"{one.counts.requests:,}",
            f"{one.counts.prompt_tokens:,}",
            f"{one.counts.completion_tokens:,}",
            f"{one.counts.cold_starts:,}",
            f"{expected.requests:.1f} in this hour" if expected is not None else "",
            _score(one.score) if one.forecast is not None else "none yet",
            _target(one.target),
        )
    return table


def _show_one(console: Console, one: ModelUsage, hour_count: int) -> None:
    table = Table("HOUR", "REQUESTS", "EXPECTED", "TOKENS IN", "OUT", "COLD", "", box=box.SIMPLE)
    now = hour_of(datetime.now(UTC))
    known = {hour.hour: hour for hour in one.hours}
    most = max((hour.counts.requests for hour in one.hours), default=0) or 1
    for number in range(now - min(hour_count, 48) + 1, now + 1):
        hour = known.get(number)
        counts = hour.counts if hour is not None else Counts()
        expectation = hour.expectation if hour is not None else None
        table.add_row(
            f"{start_of(number).astimezone():%a %H:%M}",
            f"{counts.requests:,}",
            _bounds(expectation) if expectation is not None else "",
            f"{counts.prompt_tokens:,}",
            f"{counts.completion_tokens:,}",
            f"{counts.cold_starts:,}",
            "█" * round(_BAR_CHARS * counts.requests / most),
        )
    console.print(table)
    if one.forecast is None:
        console.print("no forecast yet: the first one is made once an hour of use is over")
        return
    ahead = (expected for index in range(3) if (expected := one.forecast.at(now + index)) is not None)
    told = "; ".join(_bounds(expected) for expected in ahead) or "nothing (the forecast is old)"
    console.print(f"expected in this hour and the next two: {told}")
    console.print(f"made from {one.forecast.history_hours} hours, by '{one.forecast.method}'; {_score(one.score)}")
    console.print(f"kept best: {_target(one.target)}", markup=False)


def _bounds(expected: Expectation) -> str:
    return f"{expected.requests:.1f} ({expected.low:.0f} to {expected.high:.0f})"


def _score(score: Score | None) -> str:
    if score is None:
        return "not scored yet"
    error = f"{score.wmape:.0%} off" if score.wmape is not None else "nothing came"
    naive = f", {score.mase:.2f} x the last hour's error" if score.mase is not None else ""
    return f"{error}{naive}, {score.covered_ratio:.0%} within bounds ({score.hour_count} h)"


def _target(target: Target | None) -> str:
    if target is None:
        return "cold"
    replicas = f" {target.replica_count}" if target.replica_count else ""
    return f"{target.rung.name.lower()}{replicas}"
