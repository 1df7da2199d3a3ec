"""What the registry counts; names stand in ``helios.mesh.names`` where other code shares them."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from helios.mesh import names

MODELS: Final = Gauge(names.MODELS, "Models in the registry.")
INGESTS: Final = Counter(
    names.INGESTS_TOTAL, "Ingests that ended, by outcome: 'done' or the error's reason.", ["outcome"]
)
INGESTS_RUNNING: Final = Gauge("helios_registry_ingests_running", "Ingests that run now.")
# From a small directory to a large model off a slow disk.
INGEST_SECONDS: Final = Histogram(
    "helios_registry_ingest_seconds",
    "Time of ingests that succeeded.",
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)
NEW_BYTES: Final = Counter("helios_registry_new_bytes_total", "Bytes that ingests brought to the blob store.")
WATCHERS: Final = Gauge("helios_registry_watchers", "Components that watch the models.")
ARTIFACT_BYTES: Final = Gauge("helios_registry_artifact_bytes", "What start-up artifacts take of the blob store.")
COLLECTED_BYTES: Final = Counter(
    "helios_registry_collected_bytes_total", "Bytes of blobs that nothing referred to any more and that were removed."
)
