"""Delta xDS for any number of Envoys, by ADS or by a stream of endpoints alone (which Envoy opens to each of several
proxies), and the proxy's two verbs, ``publish`` and ``wait_acked``.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import structlog
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc

from helios.mesh.errors import Unavailable, Unsupported
from helios.mesh.names import EXPRESS_FILTER
from helios.mesh.xds.express import express_filter
from helios.mesh.xds.state import CLUSTER, Answer, Endpoint, ExpressRoute, Push, Statistics, XdsState

log = structlog.get_logger()

ADS_SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
EDS_SERVICE: Final = "envoy.service.endpoint.v3.EndpointDiscoveryService"
EXTENSIONS_TYPE: Final = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
ENDPOINTS_TYPE: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class XdsServer(ads_pb2_grpc.AggregatedDiscoveryServiceServicer, eds_pb2_grpc.EndpointDiscoveryServiceServicer):
    """Serves endpoints of the cluster ``replicas``, and the express lane. One event loop owns it; no call of it blocks.

    Usage: ``add_xds(xds, server.grpc)``; the policy lets component ``edge`` call ``ADS_SERVICE`` and ``EDS_SERVICE``.
    Then ``publish`` at will, ``open`` once the workers have resynchronised.
    """

    def __init__(self) -> None:
        self._state = XdsState[Endpoint]()
        self._express = XdsState[ExpressRoute]()
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        """The newest version."""
        return self._state.version

    def publish(self, endpoints: Iterable[Endpoint | str]) -> int:
        """Sets all endpoints (addresses as "ip:port" are parsed) and returns the version to wait for.

        The same endpoints again are the same version. Before ``open`` nothing is sent.
        """
        parsed = {entry if isinstance(entry, Endpoint) else Endpoint.parse(entry) for entry in endpoints}
        version = self._state.publish(parsed)
        self._notify()
        return version

    def open(self) -> None:
        """Starts to send; a proxy calls it when it knows the endpoints as well as the one before it did. Idempotent."""
        self._state.open()
        self._express.open()
        self._notify()

    def publish_express(self, routes: Iterable[ExpressRoute]) -> int:
        """Sets what takes the express lane; as ``publish``."""
        version = self._express.publish(routes)
        self._notify()
        return version

    async def wait_acked(self, version: int, deadline: float, *, node: str | None = None) -> None:
        """Returns when every connected Envoy, and at least one, routes by a version or a newer one. Cancel-safe.

        Args:
            version: From ``publish``.
            deadline: Absolute, ``time.monotonic()`` seconds.
            node: Wait for this Envoy alone (the picker reads its name from the metadata ``x-helios-envoy``): one that
                hangs then holds up only its own requests.

        Raises:
            Unavailable: The deadline passed; the metadata name the Envoys that lag.
        """
        await self._wait_acked(self._state, version, deadline, node)

    async def wait_express_acked(self, version: int, deadline: float) -> None:
        """The same of a version from ``publish_express``. Cancel-safe. Raises Unavailable."""
        await self._wait_acked(self._express, version, deadline, None)

    async def _wait_acked(self, state: XdsState[Any], version: int, deadline: float, node: str | None) -> None:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while not state.is_acked(version, node):
                    await self._changed.wait()
        except TimeoutError as error:
            lagging = ", ".join(sorted(state.lagging(version))) or "none connected"
            raise Unavailable(
                "the gateway did not take up its new endpoint in time; try again",
                reason="XDS_NOT_ACKED",
                metadata={"version": str(version), "lagging": lagging},
                retry_after_seconds=1,
            ) from error

    def is_acked(self, version: int, *, node: str | None = None) -> bool:
        """Returns what ``wait_acked`` would wait for."""
        return self._state.is_acked(version, node)

    def statistics(self) -> Statistics:
        """Returns counts for metrics."""
        return self._state.statistics()

    async def DeltaAggregatedResources(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Serves one Envoy until it leaves."""
        # A coroutine that writes, not a generator: a generator that is closed while it is suspended would leave its
        # task group.
        first = await anext(aiter(requests), None)
        if first is None:
            return
        stream = self._connect(first.node.id)
        log.info("envoy connected", node=first.node.id, version=self._state.version)
        try:
            self._take(stream, first)
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(stream, requests), name=f"xds read {first.node.id}")
                reader.add_done_callback(lambda _: self._notify())
                await self._write(stream, context, reader)
        finally:
            for state in (self._state, self._express):
                state.disconnect(stream)
            self._notify()
            log.info("envoy disconnected", node=first.node.id)

    async def DeltaEndpoints(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Serves one Envoy that has this stream for endpoints alone; the messages are the same."""
        await self.DeltaAggregatedResources(requests, context)

    async def StreamAggregatedResources(self, requests: AsyncIterator[Any], context: Any) -> None:
        """Refuses the state-of-the-world protocol: acknowledgements would need a second bookkeeping."""
        raise Unsupported("only the delta protocol is served: set api_type DELTA_GRPC")

    async def _read(self, stream: int, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            self._take(stream, request)

    async def _write(self, stream: int, context: Any, reader: "asyncio.Task[None]") -> None:
        while not reader.done():
            changed = self._changed
            endpoints, express = self._state.next_push(stream), self._express.next_push(stream)
            if endpoints is not None:
                await context.write(_response(endpoints))
            if express is not None:
                await context.write(_express_response(express))
            if endpoints is None and express is None:
                await changed.wait()

    def _connect(self, node: str) -> int:
        # Both count streams alike: a stream has one id.
        stream = self._state.connect(node)
        express = self._express.connect(node)
        assert stream == express
        return stream

    def _take(self, stream: int, request: Any) -> None:
        served: dict[str, tuple[XdsState[Any], str]] = {
            ENDPOINTS_TYPE: (self._state, CLUSTER),
            EXTENSIONS_TYPE: (self._express, EXPRESS_FILTER),
        }
        if request.type_url not in served:
            # Nothing else is served; without an answer Envoy keeps its static configuration.
            return
        state, name = served[request.type_url]
        answer = Answer(
            subscribe=name in request.resource_names_subscribe,
            unsubscribe=name in request.resource_names_unsubscribe,
            nonce=request.response_nonce,
            error=request.error_detail.message if request.HasField("error_detail") else "",
        )
        refusal = state.handle(stream, answer)
        if refusal:
            log.error("envoy refused", resource=name, stream=stream, error=refusal)
        self._notify()

    def _notify(self) -> None:
        # Everybody who waits wakes and looks again; those who come later wait for the next change.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def add_xds(servicer: Any, server: Any) -> None:
    """Registers both services; ``servicer`` has the methods of ``XdsServer``."""
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(servicer, server)
    eds_pb2_grpc.add_EndpointDiscoveryServiceServicer_to_server(servicer, server)


def _response(push: Push[Endpoint]) -> Any:
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=CLUSTER)
    locality = assignment.endpoints.add()
    for entry in sorted(push.entries):
        address = locality.lb_endpoints.add().endpoint.address.socket_address
        address.address, address.port_value = entry.ip, entry.port
    return _delta(ENDPOINTS_TYPE, CLUSTER, push, assignment)


def _express_response(push: Push[ExpressRoute]) -> Any:
    return _delta(EXTENSIONS_TYPE, EXPRESS_FILTER, push, express_filter(push.entries))


def _delta(type_url: str, name: str, push: Push[Any], resource: Any) -> Any:
    version = str(push.version)
    response = discovery_pb2.DeltaDiscoveryResponse(type_url=type_url, nonce=push.nonce, system_version_info=version)
    response.resources.add(name=name, version=version).resource.Pack(resource)
    return response
