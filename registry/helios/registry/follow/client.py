"""Followed sources as the command line sees them: values in and out, HeliosError on failure."""

from typing import Final

from helios.api.registry.v1 import follow_service_pb2 as pb
from helios.api.registry.v1.follow_service_pb2_grpc import FollowServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource
from helios.registry.follow.following import Following, Wish
from helios.registry.follow.wire import following_from_proto, request_to_proto

_TIMEOUT_SECONDS: Final = 10.0


class FollowClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def put(self, model: str, wish: Wish, *, request_id: str = "", is_dry_run: bool = False) -> Following:
        """Makes a model follow a source."""
        request = request_to_proto(model, wish)
        request.request_id, request.dry_run = request_id, is_dry_run
        response = await answer_of(self._stub().PutFollowing(request, timeout=self._timeout_seconds))
        return following_from_proto(response.following)

    async def remove(self, model: str, *, request_id: str = "", is_dry_run: bool = False) -> None:
        """Ends it; a model that follows nothing is no error."""
        request = pb.DeleteFollowingRequest(model=model, request_id=request_id, dry_run=is_dry_run)
        await answer_of(self._stub().DeleteFollowing(request, timeout=self._timeout_seconds))

    async def get(self, model: str) -> Following:
        """Returns what a model follows. Raises NotFound (NOT_FOLLOWED)."""
        request = pb.GetFollowingRequest(model=model)
        response = await answer_of(self._stub().GetFollowing(request, timeout=self._timeout_seconds))
        return following_from_proto(response.following)

    async def look_now(self, model: str) -> Following:
        """Has the source looked at now, without waiting; returns what was before. Raises as ``get``."""
        request = pb.CheckFollowingRequest(model=model)
        response = await answer_of(self._stub().CheckFollowing(request, timeout=self._timeout_seconds))
        return following_from_proto(response.following)

    def _stub(self) -> FollowServiceStub:
        return self._dialer.stub(FollowServiceStub)
