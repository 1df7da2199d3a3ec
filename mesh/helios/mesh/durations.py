"""Spans of time on the wire."""

from google.protobuf.duration_pb2 import Duration


def seconds_to_proto(seconds: float) -> Duration:
    """Returns a duration to the nanosecond."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def seconds_from_proto(duration: Duration) -> float:
    """Returns seconds."""
    return duration.seconds + duration.nanos / 1e9
