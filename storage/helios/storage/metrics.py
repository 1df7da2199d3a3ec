"""Prometheus metrics of the storage agent; their names live in `helios.mesh.names`."""

from prometheus_client import Counter, Gauge

from helios.mesh import names

FETCHED_BYTES = Counter(names.FETCHED_BYTES_TOTAL, "Bytes of blobs that were fetched and verified.")
LEASE_COUNT = Gauge(names.LEASES, "Leases that are alive.")
TIER_USED_BYTES = Gauge(names.TIER_USED_BYTES, "Bytes of blobs in a tier.", ["tier"])
