"""Between the contract of usage and the registry's own types: plain functions, both ways."""

from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.registry.v1 import usage_service_pb2 as pb
from helios.mesh.durations import seconds_from_proto, seconds_to_proto
from helios.mesh.errors import InvalidRequest
from helios.registry.usage.answers import ModelUsage
from helios.registry.usage.records import (
    BlobHeat,
    Counts,
    Delta,
    Expectation,
    Forecast,
    UsageHour,
    hour_of,
    start_of,
)
from helios.registry.usage.score import Score
from helios.registry.usage.targets import Rung, Target

_MAX_DELTAS = 10_000
_MAX_REPORTER_CHARS = 128
# SQL's integers are signed; no count of an hour comes near.
_MAX_COUNT = 1 << 53


def deltas_from_proto(request: pb.ReportUsageRequest) -> list[Delta]:
    """Returns a report's deltas. Raises InvalidRequest (INVALID_USAGE)."""
    if not 0 < len(request.reporter) <= _MAX_REPORTER_CHARS or not request.reporter.isprintable():
        raise _invalid("a reporter has 1 to 128 printable characters")
    if not 0 < request.sequence < _MAX_COUNT or len(request.deltas) > _MAX_DELTAS:
        raise _invalid(f"reports are numbered from 1 and have at most {_MAX_DELTAS} deltas")
    deltas = [Delta(delta.model, delta.hour, counts_from_proto(delta.counts)) for delta in request.deltas]
    if len({(delta.model, delta.hour) for delta in deltas}) < len(deltas):
        raise _invalid("a report has each model and hour once")
    if any(max(delta.hour, *_values(delta.counts)) >= _MAX_COUNT for delta in deltas):
        raise _invalid("a count is too large")
    return deltas


def deltas_to_proto(deltas: Sequence[Delta]) -> list[pb.UsageDelta]:
    """Returns deltas for a report."""
    return [pb.UsageDelta(model=one.model, hour=one.hour, counts=counts_to_proto(one.counts)) for one in deltas]


def counts_from_proto(message: pb.UsageCounts) -> Counts:
    """Returns counts."""
    return Counts(
        message.requests, message.prompt_tokens, message.completion_tokens, message.cold_starts, message.busy_ms
    )


def counts_to_proto(counts: Counts) -> pb.UsageCounts:
    """Returns counts for the wire."""
    return pb.UsageCounts(
        requests=counts.requests,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        cold_starts=counts.cold_starts,
        busy_ms=counts.busy_ms,
    )


def usage_to_proto(usage: ModelUsage) -> pb.ModelUsage:
    """Returns a model's usage for the wire, without its hours."""
    return pb.ModelUsage(
        model=usage.model,
        counts=counts_to_proto(usage.counts),
        forecast=_forecast_to_proto(usage.forecast) if usage.forecast is not None else None,
        score=_score_to_proto(usage.score) if usage.score is not None else None,
        target=target_to_proto(usage.target) if usage.target is not None else None,
    )


def usage_from_proto(message: pb.ModelUsage, hours: Sequence[pb.UsageHour] = ()) -> ModelUsage:
    """Returns a model's usage."""
    return ModelUsage(
        model=message.model,
        counts=counts_from_proto(message.counts),
        hours=tuple(_hour_from_proto(hour) for hour in hours),
        forecast=_forecast_from_proto(message.forecast) if message.HasField("forecast") else None,
        score=_score_from_proto(message.score) if message.HasField("score") else None,
        target=target_from_proto(message.target) if message.HasField("target") else None,
    )


def hour_to_proto(hour: UsageHour) -> pb.UsageHour:
    """Returns an hour for the wire."""
    expectation = _expectation_to_proto(hour.expectation) if hour.expectation is not None else None
    return pb.UsageHour(
        begins_at=_timestamp(start_of(hour.hour)), counts=counts_to_proto(hour.counts), expectation=expectation
    )


def heat_to_proto(heat: BlobHeat) -> pb.BlobHeat:
    """Returns a blob's heat for the wire."""
    return pb.BlobHeat(hash=heat.hash, size_bytes=heat.size_bytes, requests=heat.requests, model_count=heat.model_count)


def heat_from_proto(message: pb.BlobHeat) -> BlobHeat:
    """Returns a blob's heat."""
    return BlobHeat(message.hash, message.size_bytes, message.requests, message.model_count)


def target_to_proto(target: Target) -> pb.WarmTarget:
    """Returns a target for the wire."""
    return pb.WarmTarget(
        model=target.model,
        rung=pb.WarmRung.ValueType(target.rung),
        replica_count=target.replica_count,
        reason=target.reason,
        expires_at=_timestamp(target.expires_at),
        idle_timeout=seconds_to_proto(target.idle_seconds) if target.idle_seconds else None,
    )


def target_from_proto(message: pb.WarmTarget) -> Target | None:
    """Returns a target; None where this software, older than the registry, does not know its rung."""
    try:
        rung = Rung(message.rung)
    except ValueError:
        return None
    expires_at = _moment(message.expires_at)
    idle_seconds = seconds_from_proto(message.idle_timeout)
    return Target(message.model, rung, message.replica_count, message.reason, expires_at, idle_seconds)


def _values(counts: Counts) -> tuple[int, ...]:
    return tuple(getattr(counts, name) for name in Counts.__dataclass_fields__)


def _forecast_to_proto(forecast: Forecast) -> pb.UsageForecast:
    return pb.UsageForecast(
        made_at=_timestamp(forecast.made_at),
        method=forecast.method,
        history_hours=forecast.history_hours,
        begins_at=_timestamp(start_of(forecast.first_hour)),
        hours=map(_expectation_to_proto, forecast.hours),
    )


def _forecast_from_proto(message: pb.UsageForecast) -> Forecast:
    return Forecast(
        method=message.method,
        history_hours=message.history_hours,
        first_hour=hour_of(_moment(message.begins_at)),
        hours=tuple(map(_expectation_from_proto, message.hours)),
        made_at=_moment(message.made_at),
    )


def _hour_from_proto(message: pb.UsageHour) -> UsageHour:
    expectation = _expectation_from_proto(message.expectation) if message.HasField("expectation") else None
    return UsageHour(hour_of(_moment(message.begins_at)), counts_from_proto(message.counts), expectation)


def _score_to_proto(score: Score) -> pb.ForecastScore:
    return pb.ForecastScore(
        hour_count=score.hour_count, wmape=score.wmape, mase=score.mase, covered_ratio=score.covered_ratio
    )


def _score_from_proto(message: pb.ForecastScore) -> Score:
    return Score(
        hour_count=message.hour_count,
        wmape=message.wmape if message.HasField("wmape") else None,
        mase=message.mase if message.HasField("mase") else None,
        covered_ratio=message.covered_ratio,
    )


def _expectation_to_proto(expectation: Expectation) -> pb.Expectation:
    return pb.Expectation(requests=expectation.requests, low=expectation.low, high=expectation.high)


def _expectation_from_proto(message: pb.Expectation) -> Expectation:
    return Expectation(message.requests, message.low, message.high)


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def _moment(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(why, reason="INVALID_USAGE", metadata={"param": "deltas"})
