"""Prometheus metrics of the storage agent; their names live in `helios.mesh.names`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from helios.mesh import names
from helios.storage.statistics import TierStatistics

FETCHED_BYTES = Counter(names.FETCHED_BYTES_TOTAL, "Bytes of blobs that were fetched and verified.")
LEASE_COUNT = Gauge(names.LEASES, "Leases that are alive.")


@dataclass(frozen=True, slots=True)
class TierReading:
    """What a scrape reads of a tier; `statistics` are its own, which go on counting."""

    name: str
    used_bytes: int
    capacity_bytes: int
    statistics: TierStatistics


class TierCollector(Collector):
    """Reads the tiers' own counts when it is scraped: nothing is counted twice, and counting costs an addition."""

    def __init__(self) -> None:
        self._readings: Sequence[TierReading] = ()
        self._miss_count = 0

    def show(self, readings: Iterable[TierReading], *, miss_count: int) -> None:
        """Takes the tiers as they are now; `miss_count` are revisions that no tier had."""
        self._readings = tuple(readings)
        self._miss_count = miss_count

    def collect(self) -> Iterator[Metric]:
        """Yields one family for each name, with a sample for each tier."""
        yield CounterMetricFamily(names.TIER_MISSES_TOTAL, "Revisions that no tier had.", value=self._miss_count)
        yield self._gauge(names.TIER_USED_BYTES, "Bytes of blobs in a tier.", lambda r: r.used_bytes)
        yield self._gauge(names.TIER_CAPACITY_BYTES, "May hold; 0: its disk.", lambda r: r.capacity_bytes)
        yield self._gauge(
            names.TIER_READ_BYTES_PER_SECOND, "Measured reads.", lambda r: r.statistics.read.bytes_per_second
        )
        yield self._gauge(
            names.TIER_WRITE_BYTES_PER_SECOND, "Measured writes.", lambda r: r.statistics.write.bytes_per_second
        )
        yield self._counter(names.TIER_HITS_TOTAL, "Revisions lent from a tier.", lambda s: s.hit_count)
        yield self._counter(names.TIER_HIT_BYTES_TOTAL, "Their bytes.", lambda s: s.hit_bytes)
        yield self._counter(names.TIER_QUEUE_SECONDS_TOTAL, "Fetches' wait for a thread.", lambda s: s.queue_seconds)
        yield self._counter(names.TIER_PROMOTIONS_TOTAL, "Revisions copied up to a tier.", lambda s: s.promoted_count)
        yield self._counter(names.TIER_DEMOTIONS_TOTAL, "Revisions copied down to a tier.", lambda s: s.demoted_count)
        yield self._counter(names.TIER_SCRUBBED_BYTES_TOTAL, "Bytes read and compared.", lambda s: s.scrubbed_bytes)
        yield self._counter(names.TIER_SHARED_BYTES_TOTAL, "Bytes that share blocks.", lambda s: s.shared_bytes)
        yield self._counter(names.TIER_CORRUPT_BLOBS_TOTAL, "Blobs that were bad.", lambda s: s.corrupt_count)
        yield self._labelled(
            names.TIER_WRITTEN_BYTES_TOTAL, "Bytes committed, by source.", "source", lambda s: s.written_bytes
        )
        yield self._labelled(
            names.TIER_EVICTIONS_TOTAL, "Revisions that left a tier.", "reason", lambda s: s.evicted_count
        )

    def _gauge(self, name: str, text: str, read: Callable[[TierReading], float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["tier"])
        for reading in self._readings:
            family.add_metric([reading.name], read(reading))
        return family

    def _counter(self, name: str, text: str, read: Callable[[TierStatistics], float]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["tier"])
        for reading in self._readings:
            family.add_metric([reading.name], read(reading.statistics))
        return family

    def _labelled(
        self, name: str, text: str, label: str, read: Callable[[TierStatistics], Mapping[str, int]]
    ) -> Metric:
        family = CounterMetricFamily(name, text, labels=["tier", label])
        for reading in self._readings:
            for value, count in sorted(read(reading.statistics).items()):
                family.add_metric([reading.name, str(value)], count)
        return family


TIERS = TierCollector()
REGISTRY.register(TIERS)
