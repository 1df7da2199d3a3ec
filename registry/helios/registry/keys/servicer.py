"""KeyService over the registry's keys."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from helios.api.registry.v1 import key_service_pb2 as pb
from helios.api.registry.v1.key_service_pb2_grpc import KeyServiceServicer
from helios.registry import access
from helios.registry.keys.keys import Keys
from helios.registry.keys.wire import key_to_proto, spec_from_proto, stored_to_proto


class KeyServicer(KeyServiceServicer):
    """Answers the contract."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        """Makes a key."""
        access.check_may_manage_keys(context)
        key, secret = await self._keys.create(spec_from_proto(request), access.actor_of(context))
        return pb.CreateKeyResponse(key=key_to_proto(key), secret=secret)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        """Lists keys."""
        access.check_may_manage_keys(context)
        keys = await self._keys.list(show_ended=request.show_ended)
        return pb.ListKeysResponse(keys=[key_to_proto(key) for key in keys])

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        """Ends a key."""
        access.check_may_manage_keys(context)
        key = await self._keys.revoke(request.key, access.actor_of(context))
        return pb.RevokeKeyResponse(key=key_to_proto(key))

    async def WatchKeys(self, request: pb.WatchKeysRequest, context: Any) -> AsyncIterator[pb.WatchKeysResponse]:
        """Tells proxies of the keys."""
        access.check_may_watch_keys(context)
        async with aclosing(self._keys.watch()) as snapshots:
            async for keys in snapshots:
                yield pb.WatchKeysResponse(keys=[stored_to_proto(stored) for stored in keys])
