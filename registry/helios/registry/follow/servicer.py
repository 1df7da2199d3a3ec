"""FollowService over the store and the follower."""

from datetime import UTC, datetime
from typing import Any

from helios.api.registry.v1 import follow_service_pb2 as pb
from helios.api.registry.v1.follow_service_pb2_grpc import FollowServiceServicer
from helios.registry import access
from helios.registry.catalog import Catalog
from helios.registry.follow.follower import Follower
from helios.registry.follow.store import FollowStore
from helios.registry.follow.wire import following_to_proto, request_from_proto
from helios.registry.names import check_name


class FollowServicer(FollowServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, catalog: Catalog, store: FollowStore, follower: Follower) -> None:
        self._catalog = catalog
        self._store = store
        self._follower = follower

    async def PutFollowing(self, request: pb.PutFollowingRequest, context: Any) -> pb.PutFollowingResponse:
        """Makes a model follow a source."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        name, wish = check_name(request.model, param="model"), request_from_proto(request)
        found = await self._catalog.write(lambda: self._store.put(name, wish, datetime.now(UTC), mutation))
        if not mutation.is_dry_run:
            self._follower.wake()
        return pb.PutFollowingResponse(following=following_to_proto(found))

    async def DeleteFollowing(self, request: pb.DeleteFollowingRequest, context: Any) -> pb.DeleteFollowingResponse:
        """Ends it."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        name = check_name(request.model, param="model")
        await self._catalog.write(lambda: self._store.remove(name, datetime.now(UTC), mutation))
        return pb.DeleteFollowingResponse()

    async def GetFollowing(self, request: pb.GetFollowingRequest, context: Any) -> pb.GetFollowingResponse:
        """Says what a model follows, and how that went."""
        del context
        found = await self._store.get(check_name(request.model, param="model"))
        return pb.GetFollowingResponse(following=following_to_proto(found))

    async def CheckFollowing(self, request: pb.CheckFollowingRequest, context: Any) -> pb.CheckFollowingResponse:
        """Has the source looked at now."""
        access.check_may_write(context)
        found = await self._store.look_now(check_name(request.model, param="model"), datetime.now(UTC))
        self._follower.wake()
        return pb.CheckFollowingResponse(following=following_to_proto(found))
