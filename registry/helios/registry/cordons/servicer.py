"""CordonService over the registry's cordons."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from helios.api.registry.v1 import cordon_service_pb2 as pb
from helios.api.registry.v1.cordon_service_pb2_grpc import CordonServiceServicer
from helios.registry import access
from helios.registry.cordons.cordons import Cordons
from helios.registry.cordons.wire import cordon_to_proto


class CordonServicer(CordonServiceServicer):
    """Answers the contract."""

    def __init__(self, cordons: Cordons) -> None:
        self._cordons = cordons

    async def SetCordon(self, request: pb.SetCordonRequest, context: Any) -> pb.SetCordonResponse:
        """Cordons a worker, or lifts its cordon."""
        access.check_may_lead(context)
        actor = access.actor_of(context)
        is_change, cordons = await self._cordons.set(request.worker_id, actor, is_cordoned=request.cordoned)
        return pb.SetCordonResponse(changed=is_change, cordons=map(cordon_to_proto, cordons))

    async def WatchCordons(
        self, request: pb.WatchCordonsRequest, context: Any
    ) -> AsyncIterator[pb.WatchCordonsResponse]:
        """Tells proxies of the cordons."""
        access.check_may_lead(context)
        async with aclosing(self._cordons.watch()) as snapshots:
            async for cordons in snapshots:
                yield pb.WatchCordonsResponse(cordons=map(cordon_to_proto, cordons))
