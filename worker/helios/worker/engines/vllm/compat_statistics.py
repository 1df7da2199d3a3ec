"""The part of `compat` that takes vLLM's statistics: of each scheduler step, and none of Prometheus."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

from helios.worker.replica.engine import EngineLoad


class LoadSink(StatLoggerBase):
    """Receives the scheduler's statistics after each step and keeps the last."""

    def __init__(self, on_load: Callable[[], None]) -> None:
        self._on_load = on_load
        self.load = EngineLoad()

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Takes the statistics of one step."""
        del iteration_stats
        if scheduler_stats is None:
            return
        load = EngineLoad(
            scheduler_stats.num_running_reqs,
            scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
            scheduler_stats.kv_cache_usage,
        )
        if load != self.load:
            self.load = load
            self._on_load()

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Unpublished(PrometheusStatLogger):
    """Stands where AsyncLLM puts its own Prometheus metrics unless it is given another logger of the kind.

    Nobody reads its registry here: a replica publishes metrics of its own. Keeping some forty series up to date would
    be a sixth of what the front spends on a token.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        """Registers nothing."""

    def record(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def record_admission_rejection(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def log_engine_initialized(self) -> None:
        """Does nothing."""

    def log(self) -> None:
        """Does nothing."""
