"""Streams that last as long as an Envoy, on the picker's server: endpoints that it reads, and what they share.

The server has no interceptors: callers are checked here.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.endpoint.v3 import eds_pb2_grpc

from helios.mesh import status
from helios.mesh.errors import HeliosError
from helios.mesh.identity import SpiffeId
from helios.mesh.server import check_peer
from helios.mesh.xds.server import ADS_SERVICE, XdsServer, add_xds

_EDGE: Final = frozenset({"edge"})


class EdgeStreams:
    """Lets only the edge's Envoys in, and ends their streams when the proxy stops."""

    def __init__(self, *, own: SpiffeId | None) -> None:
        """``own`` is who the proxy is; None lets everybody in (no TLS)."""
        self._own = own
        self._streams: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Ends every stream: they last for as long as Envoy, and a server that drains would wait for them."""
        for stream in tuple(self._streams):
            stream.cancel()

    async def run(self, service: str, context: Any, serving: Coroutine[Any, Any, None]) -> None:
        """Serves one Envoy until it leaves, or until `close`."""
        try:
            if self._own is not None:
                check_peer(context, _EDGE, service, self._own)
        except HeliosError as error:
            serving.close()
            await status.abort(context, error)
        # A task of its own: a handler that is cancelled itself would leave the call open.
        async with asyncio.TaskGroup() as group:
            stream = group.create_task(serving, name=service)
            self._streams.add(stream)
            stream.add_done_callback(self._streams.discard)


class GuardedXds(ads_pb2_grpc.AggregatedDiscoveryServiceServicer, eds_pb2_grpc.EndpointDiscoveryServiceServicer):
    """Lets only the edge's Envoys read endpoints."""

    def __init__(self, xds: XdsServer, streams: EdgeStreams) -> None:
        self._xds = xds
        self._streams = streams

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the services."""
        add_xds(self, server)

    async def DeltaEndpoints(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Serves one Envoy that reads endpoints alone."""
        await self.DeltaAggregatedResources(requests, context)

    async def DeltaAggregatedResources(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Serves one Envoy until it leaves, or the proxy does."""
        await self._streams.run(ADS_SERVICE, context, self._xds.DeltaAggregatedResources(requests, context))
