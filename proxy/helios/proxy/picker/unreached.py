"""What Envoy tells of requests that reached no replica: the only one who knows.

A pick reserves a place until the replica tells of the request. One that nobody takes (no connection, the endpoint is
gone) would hold its place and its tokens until they expire, and a replica that can't be reached, whose worker is well,
would be picked for ever. Envoy's access log, filtered to these, says so at once.
"""

import time
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
from envoy.service.accesslog.v3 import als_pb2_grpc

from helios.mesh.names import ENDPOINT_HEADER
from helios.proxy.picker.ads import EdgeStreams
from helios.proxy.runtime import Runtime

ACCESS_LOG_SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"


class UnreachedServicer(als_pb2_grpc.AccessLogServiceServicer):
    """Takes the log of each of the edge's Envoys."""

    def __init__(self, runtime: Runtime, streams: EdgeStreams, *, cluster: str) -> None:
        """``cluster`` is Envoy's that this proxy's endpoints are in: what a relay can't be reached for is no replica's
        fault.
        """
        self._runtime = runtime
        self._streams = streams
        self._cluster = cluster

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(self, server)

    async def StreamAccessLogs(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Reads one Envoy's log until it leaves, or the proxy does."""
        await self._streams.run(ACCESS_LOG_SERVICE, context, self._read(requests))

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for message in requests:
            now = time.monotonic()
            for entry in message.http_logs.log_entry:
                common = entry.common_properties
                is_failure = common.response_flags.upstream_connection_failure
                is_failure &= common.upstream_cluster == self._cluster
                address = entry.request.request_headers.get(ENDPOINT_HEADER, "")
                core, request_id = self._runtime.core, entry.request.request_id
                self._runtime.apply(core.unreached(request_id, now, address=address, is_failure=is_failure))
