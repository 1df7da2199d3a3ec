"""Peers of a server whose `address` the test's module says."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.mesh.http2.peer import Peer


@pytest.fixture
async def raw(address: str) -> AsyncIterator[Peer]:
    """A connection on which nothing was said."""
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    yield Peer(reader, writer)
    writer.transport.abort()
    await asyncio.sleep(0)


@pytest.fixture
async def peer(raw: Peer) -> Peer:
    """One that has said hello."""
    await raw.hello()
    return raw
