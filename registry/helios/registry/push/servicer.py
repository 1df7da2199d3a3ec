"""PushService over the pusher: permissions, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from helios.api.registry.v1 import push_service_pb2 as pb
from helios.api.registry.v1.push_service_pb2_grpc import PushServiceServicer
from helios.mesh.errors import HeliosError
from helios.registry import access
from helios.registry.push.pusher import Pusher
from helios.registry.push.wire import push_error_to_proto, push_event_to_proto
from helios.registry.records import IngestProgress, PushPhase


class PushServicer(PushServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, pusher: Pusher) -> None:
        self._pusher = pusher

    async def PushModel(self, request: pb.PushModelRequest, context: Any) -> AsyncIterator[pb.PushModelResponse]:
        """Streams a push; a caller that goes away ends it."""
        access.check_may_write(context)
        has_begun = False
        async with aclosing(self._pusher.push(request.model, request.target)) as events:
            try:
                async for event in events:
                    # Over REST the first message is a 200: nothing is sent before the target was looked at, so that
                    # one that refuses is an error of the request.
                    if isinstance(event, IngestProgress) and event.phase is PushPhase.LOOK:
                        continue
                    has_begun = True
                    yield push_event_to_proto(event)
            except HeliosError as error:
                # After the 200 Envoy ends the answer as if nothing had happened: the error goes in band as well.
                if has_begun:
                    yield push_error_to_proto(error)
                raise
