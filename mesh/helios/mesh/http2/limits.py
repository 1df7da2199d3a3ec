"""What one connection may hold, and how much of its peer's work may be for nothing.

Peers are authenticated before their first byte counts; the bounds keep one broken peer from taking the process along.
"""

from dataclasses import dataclass
from typing import Final

# A window for what a peer sends: one read of Envoy's largest buffer.
_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a connection."""

    max_message_bytes: int = 33 * _MEBIBYTE
    """Largest message in either direction; a larger one ends its call with RESOURCE_EXHAUSTED."""
    max_header_bytes: int = 128 << 10
    """Largest header list; a larger one ends the connection, for its state is lost with it."""
    header_table_bytes: int = 4096
    """How much the peer's compression may refer to. With 0 the same request always has the same bytes, and is read
    once: right where headers hardly differ, wrong where each request brings long ones of its own."""
    max_streams: int = 1024
    """Calls that run at once, those whose cancelled handlers have not ended yet included; more are refused unprocessed,
    which clients retry."""
    stream_window_bytes: int = _MEBIBYTE
    """How much of a stream may arrive before its handler reads."""
    connection_window_bytes: int = 16 * _MEBIBYTE
    """How much may be under way on all streams together; it is given back as bytes arrive."""
    max_held_bytes: int = 1024 * _MEBIBYTE
    """How much of all streams may wait for handlers or for the rest of its message: thirty bodies of the largest size.
    Beyond it the stream that sends more is refused."""
    max_unsent_bytes: int = 16 * _MEBIBYTE
    """How much may wait for a peer that does not read. Messages stop long before; only answers to its own frames
    (pings, resets) grow further, so that the connection is cut."""
    keepalive_seconds: float = 10.0
    """A peer that has been silent for so long is asked for a sign of life."""
    keepalive_timeout_seconds: float = 5.0
    """How long it may take to give one."""
    handshake_seconds: float = 10.0
    """How long a TLS handshake may take."""
    idle_frames_per_period: int = 100_000
    """Pings, resets, settings and frames without content that a peer may send in one keepalive period. An Envoy may
    reset each stream that it is done with, thousands a second; ten thousand a second, for ten seconds, is an attack."""


class IdleFrames:
    """Counts frames that cost work and carry nothing, by period."""

    __slots__ = ("_count", "_limit", "_period_ends", "_period_seconds")

    def __init__(self, limit: int, period_seconds: float) -> None:
        self._limit = limit
        self._period_seconds = period_seconds
        self._period_ends = 0.0
        self._count = 0

    def add(self, now: float) -> bool:
        """Counts one more; returns whether the peer is still within bounds."""
        if now >= self._period_ends:
            self._period_ends = now + self._period_seconds
            self._count = 0
        self._count += 1
        return self._count <= self._limit
