"""A collector of traces: receives what every process of the mesh sends over OTLP, and keeps it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


class Collector(pb_grpc.TraceServiceServicer):
    """Open it with ``with``; ``address`` is where processes send spans."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, trace_pb2.Span]] = []
        self._server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="collector"))
        add: Any = pb_grpc.add_TraceServiceServicer_to_server
        add(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(1).wait(5)

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """Takes spans in."""
        with self._lock:
            for resource in request.resource_spans:
                attributes = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [(attributes.get("service.name", ""), span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> dict[str, set[str]]:
        """Returns the names of a trace's spans by service."""
        with self._lock:
            found: dict[str, set[str]] = {}
            for service, span in self._spans:
                if span.trace_id.hex() == trace_id:
                    found.setdefault(service, set()).add(span.name)
            return found

    def names(self, service: str) -> set[str]:
        """Returns the names of all spans of a service."""
        with self._lock:
            return {span.name for of, span in self._spans if of == service}
