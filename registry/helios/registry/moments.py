"""Moments as the tables keep them: microseconds since 1970, the same in every database, and exact."""

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(moment: datetime) -> int:
    """Returns a moment in microseconds since 1970."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_us(value: int) -> datetime:
    """Returns the moment of ``to_us``."""
    return _EPOCH + timedelta(microseconds=value)
