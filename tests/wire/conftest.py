"""One gateway a module: Envoy starts once, tests tell the fakes what to do."""

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.wire.gateway import TOKEN, Gateway, running_gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path_factory.mktemp("gw")) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(shared_gateway: Gateway) -> Gateway:
    """Returns the module's gateway with fakes that remember nothing."""
    shared_gateway.replica.refusal = None
    shared_gateway.picker.pick = shared_gateway.picker.hold = None
    shared_gateway.picker.endpoints = [shared_gateway.replica_address]
    shared_gateway.control.failures.clear()
    shared_gateway.registry.failures.clear()
    calls = (shared_gateway.replica.calls, shared_gateway.control.calls, shared_gateway.registry.calls)
    for recorded in (*calls, shared_gateway.picker.requests, shared_gateway.picker.bodies):
        recorded.clear()
    await shared_gateway.publish(shared_gateway.replica_address)
    await shared_gateway.publish_express()
    return shared_gateway


@pytest_asyncio.fixture(loop_scope="module")
async def rest(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Returns an HTTP/1.1 client of the public listener."""
    async with httpx.AsyncClient(base_url=f"http://{gateway.edge}", timeout=20, trust_env=False) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def admin(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Returns an HTTP/1.1 client of the admin listener that has the token."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    base = f"http://{gateway.admin}"
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=20, trust_env=False) as client:
        yield client
