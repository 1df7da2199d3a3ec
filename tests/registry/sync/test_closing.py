"""A registry that stops takes no agents any more."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.mesh.errors import Draining
from helios.registry.sync.servicer import SyncServicer


class Context:
    """A call without TLS that nothing is to be told to."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    async def write(self, message: pb.SessionResponse) -> None:
        raise AssertionError(f"the agent was told {message}")


async def test_an_agent_whose_hello_comes_while_the_registry_stops_is_sent_away() -> None:
    servicer = SyncServicer()

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        servicer.close()
        yield pb.SessionRequest(hello=pb.AgentHello(node="late"))

    async with asyncio.timeout(20):
        with pytest.raises(Draining):
            await servicer.Session(requests(), Context())
    assert servicer.agents() == []
