"""Calls as a client's wrapper makes them: what they answer, with HeliosError where they fail."""

from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Final, TypeVar

import grpc.aio

from helios.mesh.status import error_from_rpc

T = TypeVar("T")

# How long a call that may be made twice waits (`wait_for_ready`) for a component that restarts: it serves again within
# two or three seconds.
RESTART_SECONDS: Final = 6.0


async def answer_of(call: Awaitable[T]) -> T:
    """Returns what a unary call answers. Raises HeliosError where it fails."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def messages_of(call: "grpc.aio.UnaryStreamCall[Any, T]") -> AsyncGenerator[T, None]:
    """Yields what a streaming call says; leaving early (`aclosing`) ends it. Raises HeliosError where it fails."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        # A no-op for a call that has ended; else the server learns at once that nobody listens.
        call.cancel()
