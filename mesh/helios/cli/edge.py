"""Channels to the two addresses of a running mesh, as any client outside would open them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from helios.cli.state import MeshRecord, StateDirectory, find_running

S = TypeVar("S")

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 33 << 20),
    ("grpc.max_send_message_length", 33 << 20),
    ("grpc.enable_http_proxy", 0),
)


class EdgeDialer:
    """Gives stubs on a plain channel; with a token, every call carries it. Stands in for a ``Dialer`` in typed
    clients.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def stub(self, stub_class: Callable[[grpc.aio.Channel], S]) -> S:
        """Returns a stub."""
        return stub_class(self._channel)


@asynccontextmanager
async def open_admin(state: StateDirectory) -> AsyncIterator[EdgeDialer]:
    """Opens the admin address of the mesh that runs on a state directory."""
    record = find_running(state)
    interceptors = _token_interceptors(state.admin_token())
    async with grpc.aio.insecure_channel(record.admin, options=_OPTIONS, interceptors=interceptors) as channel:
        yield EdgeDialer(channel)


@asynccontextmanager
async def open_edge(record: MeshRecord, api_key: str = "") -> AsyncIterator[EdgeDialer]:
    """Opens the public address of a mesh; with an API key, every call carries it."""
    interceptors = _token_interceptors(api_key) if api_key else []
    async with grpc.aio.insecure_channel(record.edge, options=_OPTIONS, interceptors=interceptors) as channel:
        yield EdgeDialer(channel)


def _token_interceptors(token: str) -> list[grpc.aio.ClientInterceptor]:
    return [_UnaryToken(token), _StreamToken(token)]


def _with_token(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _UnaryToken(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


class _StreamToken(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)
