"""What the supervisor counts. Labels are few and bounded: ids of replicas are in the logs."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from helios.mesh import names

# From the 0.1 s of a cached phase to the minutes of a large fetch.
_PHASE_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)

ARTIFACTS: Final = Counter(
    "helios_worker_artifacts_total", "Artifacts by what became of them: taken, not_taken, published", ("outcome",)
)
COLD_START_PHASE: Final = Histogram(
    names.COLD_START_PHASE_SECONDS, "How long a phase of a start took", ("phase",), buckets=_PHASE_BUCKETS
)
COMMANDS: Final = Counter(names.COMMANDS_TOTAL, "Commands by what became of them", ("command", "outcome"))
DEVICE_MEMORY: Final = Gauge(names.DEVICE_MEMORY_BYTES, "Memory that replicas may use", ("device",))
DEVICE_BOOKED: Final = Gauge(names.DEVICE_BOOKED_BYTES, "Memory booked for replicas", ("device",))
FLEET_SESSIONS: Final = Gauge(names.FLEET_SESSIONS, "Proxies that this worker is in session with")
OUTBOX_OVERFLOWS: Final = Counter(names.OUTBOX_OVERFLOWS_TOTAL, "Sessions given up because the proxy did not read")
REPLICAS: Final = Gauge(names.WORKER_REPLICAS, "Replicas of this worker", ("state",))
REPLICA_EXITS: Final = Counter(names.REPLICA_EXITS_TOTAL, "Replicas that ended", ("reason",))
