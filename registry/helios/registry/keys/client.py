"""Keys as other components and the command line see them: values in and out, HeliosError on failure."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from helios.api.registry.v1 import key_service_pb2 as pb
from helios.api.registry.v1.key_service_pb2_grpc import KeyServiceStub
from helios.mesh.calls import answer_of, messages_of
from helios.mesh.channel import StubSource
from helios.registry.keys.records import ApiKey, KeySpec, Priority, StoredKey, hash_secret
from helios.registry.keys.wire import key_from_proto, spec_to_proto, stored_from_proto

__all__ = ["ApiKey", "KeyClient", "KeySpec", "Priority", "StoredKey", "hash_secret"]

_TIMEOUT_SECONDS: Final = 10.0


class KeyClient:
    """Calls on one registry. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def create(self, spec: KeySpec) -> tuple[ApiKey, str]:
        """Makes a key; returns it with its secret, which is not to be had again. Not idempotent."""
        response = await answer_of(self._stub().CreateKey(spec_to_proto(spec), timeout=_TIMEOUT_SECONDS))
        return key_from_proto(response.key), response.secret

    async def list(self, *, show_ended: bool = False) -> list[ApiKey]:
        """Returns keys, the newest first."""
        request = pb.ListKeysRequest(show_ended=show_ended)
        response = await answer_of(self._stub().ListKeys(request, timeout=_TIMEOUT_SECONDS))
        return [key_from_proto(key) for key in response.keys]

    async def revoke(self, key: str) -> ApiKey:
        """Ends a key, by its id or its name. Raises NotFound (KEY_NOT_FOUND)."""
        response = await answer_of(self._stub().RevokeKey(pb.RevokeKeyRequest(key=key), timeout=_TIMEOUT_SECONDS))
        return key_from_proto(response.key)

    async def watch(self) -> AsyncGenerator[tuple[StoredKey, ...], None]:
        """Yields all keys that count, now and after each change. Raises HeliosError when the watch breaks."""
        # No timeout: the stream lasts as long as both sides live; keepalive notices a peer that is gone.
        call = self._stub().WatchKeys(pb.WatchKeysRequest())
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                yield tuple(stored_from_proto(stored) for stored in message.keys)

    def _stub(self) -> KeyServiceStub:
        return self._dialer.stub(KeyServiceStub)
