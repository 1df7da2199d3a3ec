"""Traces and metrics, the same in every process.

Spans go to an OTLP collector where one is set, else nowhere: making them costs little and the code is the same. Metrics
are Prometheus counters in the process, read over the ops address. gRPC calls get spans from
opentelemetry-instrumentation-grpc, session streams apart (their spans would last for days) and hot paths that leave
interceptors out.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.instrumentation import grpc as instrumentation
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

# Calls that get no span of the interceptors: sessions last as long as two processes know each other, probes say nothing
# of a request, and the interceptor loses its context where a client leaves a response stream early. What streams makes
# its spans itself, where they mean something.
UNTRACED_METHODS: Final = (
    "Attach",
    "Chat",
    "Check",
    "Complete",
    "CreateChatCompletion",
    "CreateCompletion",
    "CreateEmbedding",
    "IngestModel",
    "Materialize",
    "ServerReflectionInfo",
    "Session",
    "Watch",
    "WatchModels",
)


def setup_telemetry(*, process: str, otlp_endpoint: str = "") -> Callable[[], None]:
    """Sets the tracer of this process; returns a function that sends what is left and stops."""
    provider = TracerProvider(resource=Resource.create({"service.name": f"helios-{process}"}))
    if otlp_endpoint:
        # Imported only where it is used: it costs a quarter of a second, and xds-protos ships an older copy of the
        # modules of opentelemetry-proto, so that only an installation in the right order (make setup) has the newer
        # ones.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True, timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=2048))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def server_interceptors() -> list[grpc.aio.ServerInterceptor]:
    """Returns the interceptors that make a span for each unary call."""
    make: Any = instrumentation.aio_server_interceptor
    return [_UnaryOnly(make(filter_=_is_request))]


def client_interceptors() -> list[grpc.aio.ClientInterceptor]:
    """Returns the interceptors that carry the trace context to the server with each unary call."""
    make: Any = instrumentation.aio_client_interceptors
    return list(make(filter_=_is_request))


class _UnaryOnly(grpc.aio.ServerInterceptor):
    """Keeps streams from an interceptor: it expects handlers that are generators, and here they are coroutines."""

    def __init__(self, interceptor: grpc.aio.ServerInterceptor) -> None:
        self._interceptor = interceptor

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handlers of unary calls."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler

        async def found(_: grpc.HandlerCallDetails) -> Any:
            return handler

        return await self._interceptor.intercept_service(found, handler_call_details)


def _is_request(details: Any) -> bool:
    """Whether a call gets a span; ``details`` is a server's or a client's, with a method in str or in bytes."""
    method = details.method.decode() if isinstance(details.method, bytes) else details.method
    return method.rpartition("/")[2] not in UNTRACED_METHODS
