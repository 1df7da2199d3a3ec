"""Two registries as processes on one PostgreSQL: each tells what the other changes, and both outlive it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from pathlib import Path

import pytest

from helios.mesh.errors import Conflict, HeliosError
from helios.registry.client import (
    IngestDone,
    Model,
    ModelPolicy,
    ModelSnapshot,
    ModelUpserted,
    RegistryClient,
    VersionClient,
    WatchEvent,
)
from tests.registry.postgresql import postgresql
from tests.registry.support import Mesh
from tests.registry.test_process import running

pytestmark = pytest.mark.slow


async def next_of(events: AsyncGenerator[WatchEvent, None]) -> WatchEvent:
    async with asyncio.timeout(30):
        return await anext(events)


async def soon(registry: RegistryClient, policy: ModelPolicy) -> Model:
    """Sets a policy once the registry's database is back."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await registry.update_policy("m", policy)
            except HeliosError:
                await asyncio.sleep(0.2)


async def test_replicas_on_one_database(tmp_path: Path, mesh: Mesh, model_directory: Path) -> None:
    with postgresql() as server, ExitStack() as stack:
        serving = stack.enter_context(ExitStack())
        serving.enter_context(server.running())
        url = f"--database-url={server.make_database('registry')}"
        # Both find an empty database, and take the steps together.
        async with (
            running(tmp_path / "one", mesh, url) as (_, one),
            running(tmp_path / "two", mesh, url) as (_, two),
            mesh.client(one) as first,
            mesh.client(two) as second,
            mesh.versions(one) as versions,
            mesh.versions(two) as others,
            aclosing(second.watch_models()) as events,
        ):
            assert await next_of(events) == ModelSnapshot(())
            *_, done = [event async for event in first.ingest("m", str(model_directory))]
            assert isinstance(done, IngestDone)
            assert await next_of(events) == ModelUpserted(done.model)
            await check_tags(versions, others, events)
            serving.close()
            with pytest.raises(HeliosError):
                await first.update_policy("m", ModelPolicy(1, 1))
            serving.enter_context(server.running())
            changed = await soon(first, ModelPolicy(2, 2))
            # The watch of the other one stood all the while.
            event = await next_of(events)
            while event != ModelUpserted(changed):
                event = await next_of(events)
            assert await second.get_model("m") == changed


async def check_tags(versions: VersionClient, others: VersionClient, events: AsyncGenerator[WatchEvent, None]) -> None:
    """Who moves a tag of a version that another registry has left behind is told so."""
    seen = (await others.resolve("m")).model.version
    tagged = await versions.put_tag("m", "prod", expected_version=seen)
    with pytest.raises(Conflict) as caught:
        await others.put_tag("m", "prod", expected_version=seen)
    assert caught.value.reason == "STALE_VERSION"
    assert await next_of(events) == ModelUpserted(tagged)
