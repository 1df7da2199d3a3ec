"""Cordons as proxies see them: values in and out, HeliosError on failure."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from helios.api.registry.v1 import cordon_service_pb2 as pb
from helios.api.registry.v1.cordon_service_pb2_grpc import CordonServiceStub
from helios.mesh.calls import RESTART_SECONDS, answer_of, messages_of
from helios.mesh.channel import StubSource
from helios.registry.cordons.records import Cordon
from helios.registry.cordons.wire import cordon_from_proto

__all__ = ["Cordon", "CordonClient"]


class CordonClient:
    """Calls on one registry. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def set(self, worker_id: str, *, is_cordoned: bool) -> tuple[Cordon, ...]:
        """Cordons a worker, or lifts its cordon; returns all cordons."""
        request = pb.SetCordonRequest(worker_id=worker_id, cordoned=is_cordoned)
        # Idempotent, and an operator waits for it.
        stub = self._stub()
        response = await answer_of(stub.SetCordon(request, timeout=RESTART_SECONDS, wait_for_ready=True))
        return tuple(map(cordon_from_proto, response.cordons))

    async def watch(self) -> AsyncGenerator[tuple[Cordon, ...], None]:
        """Yields all cordons, now and after each change. Raises HeliosError when the watch breaks."""
        # No timeout: the stream lasts as long as both sides live; keepalive notices a peer that is gone.
        call = self._stub().WatchCordons(pb.WatchCordonsRequest())
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                yield tuple(map(cordon_from_proto, message.cordons))

    def _stub(self) -> CordonServiceStub:
        return self._dialer.stub(CordonServiceStub)
