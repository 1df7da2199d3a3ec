"""Prometheus metrics of a replica, with OpenTelemetry's names for generative AI servers."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from helios.mesh import names
from helios.worker.replica.ledger import Finished

# Of the replica alone: vLLM registers its own collectors in the default registry.
REGISTRY: Final = CollectorRegistry()

# Source: buckets of the semantic conventions (see helios.mesh.names).
_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_LABELS: Final = ("gen_ai_request_model", "gen_ai_operation_name")
_DURATION = Histogram(
    names.REQUEST_DURATION_SECONDS, "Arrival to end", (*_LABELS, "status"), buckets=_SECONDS, registry=REGISTRY
)
_FIRST_TOKEN = Histogram(
    names.TIME_TO_FIRST_TOKEN_SECONDS, "Arrival to first token", _LABELS, buckets=_SECONDS, registry=REGISTRY
)
_PER_TOKEN = Histogram(
    names.TIME_PER_OUTPUT_TOKEN_SECONDS,
    "Mean gap after the first token",
    _LABELS,
    buckets=_TOKEN_SECONDS,
    registry=REGISTRY,
)
_TOKENS = Counter(names.TOKEN_USAGE, "Tokens", (*_LABELS, "gen_ai_token_type"), registry=REGISTRY)


def observe(model: str, operation: str, status: str, finished: Finished) -> None:
    """Counts one finished request."""
    labels = (model, operation)
    _DURATION.labels(*labels, status).observe(finished.duration)
    if finished.prompt_tokens:
        _TOKENS.labels(*labels, "input").inc(finished.prompt_tokens)
    if finished.cached_prompt_tokens:
        # Of those of the input: what affinity and the prefix cache spared.
        _TOKENS.labels(*labels, "cached_input").inc(finished.cached_prompt_tokens)
    if finished.completion_tokens:
        _TOKENS.labels(*labels, "output").inc(finished.completion_tokens)
    if finished.time_to_first_token is not None:
        _FIRST_TOKEN.labels(*labels).observe(finished.time_to_first_token)
        if finished.completion_tokens > 1:
            rest = finished.duration - finished.time_to_first_token
            _PER_TOKEN.labels(*labels).observe(rest / (finished.completion_tokens - 1))
