"""What the relay counts."""

from prometheus_client import Counter, Gauge

from helios.mesh import names

REQUESTS = Counter(names.RELAY_REQUESTS_TOTAL, "Durable requests that came")
STREAMS = Gauge(names.RELAY_STREAMS, "Durable requests under way")
MOVES = Counter(
    names.RELAY_MOVES_TOTAL,
    "Answers whose replica broke off or drains, by that, and by what became of them: moved, stayed (its replica "
    "ended it), lost",
    ("cause", "outcome"),
)
