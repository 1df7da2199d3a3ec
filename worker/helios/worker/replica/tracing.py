"""The span of a replica's start: part of the trace of the request that asked for it."""

import time

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from helios.worker.replica.condition import Condition
from helios.worker.replica.spec import ReplicaSpec

_NANOSECONDS = 1_000_000_000


def record_start(spec: ReplicaSpec, condition: Condition) -> None:
    """Records the start that just ended, one event for the end of each phase."""
    total = sum(seconds for _, seconds in condition.phases)
    ended_ns = time.time_ns()
    began_ns = ended_ns - round(total * _NANOSECONDS)
    parent = TraceContextTextMapPropagator().extract({"traceparent": spec.traceparent}) if spec.traceparent else None
    attributes = {"helios.replica.id": spec.replica_id, "gen_ai.request.model": spec.model}
    tracer = trace.get_tracer("helios.worker.replica")
    span = tracer.start_span("replica start", context=parent, start_time=began_ns, attributes=attributes)
    elapsed = 0.0
    for name, seconds in condition.phases:
        elapsed += seconds
        timestamp = began_ns + round(elapsed * _NANOSECONDS)
        span.add_event(f"{name} ended", {"helios.phase.seconds": seconds}, timestamp=timestamp)
    span.end(ended_ns)
