"""The spans of a replica: its start, part of the trace of the activation that asked for it, and each request."""

import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from helios.worker.replica.condition import Condition
from helios.worker.replica.spec import ReplicaSpec

_NANOSECONDS = 1_000_000_000
_PROPAGATOR = TraceContextTextMapPropagator()
# Forwards to the tracer of the process once that is set.
_TRACER = trace.get_tracer("helios.worker.replica")


def start_request(metadata: Mapping[str, str], operation: str, model: str, request_id: str) -> trace.Span:
    """Begins the span of a request, in the trace that its metadata names; ``end_request`` ends it."""
    attributes = {"gen_ai.operation.name": operation, "gen_ai.request.model": model, "helios.request.id": request_id}
    parent = _PROPAGATOR.extract(metadata)
    return _TRACER.start_span(operation, context=parent, kind=trace.SpanKind.SERVER, attributes=attributes)


def end_request(span: trace.Span, *, status: str, prompt_tokens: int, completion_tokens: int) -> None:
    """Ends the span of a request with what it used."""
    span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", completion_tokens)
    span.set_attribute("rpc.grpc.status", status)
    if status not in ("OK", "CANCELLED"):
        span.set_status(trace.Status(trace.StatusCode.ERROR, status))
    span.end()


def record_start(spec: ReplicaSpec, condition: Condition) -> None:
    """Records the start that just ended, one event for the end of each phase."""
    total = sum(seconds for _, seconds in condition.phases)
    ended_ns = time.time_ns()
    began_ns = ended_ns - round(total * _NANOSECONDS)
    parent = _PROPAGATOR.extract({"traceparent": spec.traceparent}) if spec.traceparent else None
    attributes = {"helios.replica.id": spec.replica_id, "gen_ai.request.model": spec.model}
    span = _TRACER.start_span("replica start", context=parent, start_time=began_ns, attributes=attributes)
    elapsed = 0.0
    for name, seconds in condition.phases:
        elapsed += seconds
        timestamp = began_ns + round(elapsed * _NANOSECONDS)
        span.add_event(f"{name} ended", {"helios.phase.seconds": seconds}, timestamp=timestamp)
    span.end(ended_ns)
