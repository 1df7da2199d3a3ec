"""Pushes as the command line sees them: values out, HeliosError on failure."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from helios.api.registry.v1 import push_service_pb2 as pb
from helios.api.registry.v1.push_service_pb2_grpc import PushServiceStub
from helios.mesh.calls import messages_of
from helios.mesh.channel import StubSource
from helios.registry.push.records import PushEvent
from helios.registry.push.wire import push_event_from_proto

# A large model over a slow line; who waits may leave at any time.
PUSH_TIMEOUT_SECONDS: Final = 12 * 3600.0


class PushClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def push(
        self, model: str, target: str, *, timeout_seconds: float = PUSH_TIMEOUT_SECONDS
    ) -> AsyncGenerator[PushEvent, None]:
        """Pushes a revision; yields progress, and PushDone last. Leaving the iteration early ends the push.

        Raises:
            HeliosError: As PushModel in the contract.
        """
        request = pb.PushModelRequest(model=model, target=target)
        call = self._dialer.stub(PushServiceStub).PushModel(request, timeout=timeout_seconds)
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                event = push_event_from_proto(message)
                if event is not None:
                    yield event
