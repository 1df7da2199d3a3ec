"""``helios models watch`` against a real registry: what it prints, of which models, from where on."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.console import Console

from helios.cli import models_watch
from helios.cli.models_watch import WatchOptions
from helios.cli.state import StateDirectory
from helios.mesh.channel import Dialer
from helios.mesh.errors import Unavailable
from helios.registry.events import Mutation
from helios.registry.names import Reference
from helios.registry.policy import ModelPolicy
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_store import A, new

STATE = StateDirectory(Path("/nowhere"))


@pytest.fixture
async def parts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Parts]:
    """A registry, which the command finds as it finds the one of a mesh that runs."""
    mesh = Mesh(tmp_path_factory.mktemp("pki"))
    async with open_parts(tmp_path / "registry") as opened, serve(opened, mesh) as address:

        @asynccontextmanager
        async def open_admin(_: StateDirectory) -> AsyncIterator[Dialer]:
            async with mesh.dialer(address, "admin-edge") as dialer:
                yield dialer

        monkeypatch.setattr(models_watch, "open_admin", open_admin)
        for name in ("m", "n"):
            await opened.catalog.put_model(name, ("x",) if name == "m" else (), new("a"))
        yield opened


async def watched(model: str = "", after: int | None = 0, count: int = 1, *, is_json: bool = True) -> list[str]:
    out = io.StringIO()
    async with asyncio.timeout(30):
        await models_watch.models_watch(STATE, Console(file=out, width=40), WatchOptions(model, after, count, is_json))
    return out.getvalue().splitlines()


async def test_prints_what_happened_since(parts: Parts) -> None:
    await parts.versions.put_tag(Reference("m", digest=A), "prod", Mutation("somebody"))
    lines = await watched(count=8)
    found = [json.loads(line) for line in lines]
    assert [(each["kind"], each["model"]) for each in found] == [
        ("model_created", "m"),
        ("revision_added", "m"),
        ("served_moved", "m"),
        ("alias_added", "m"),
        ("model_created", "n"),
        ("revision_added", "n"),
        ("served_moved", "n"),
        ("tag_moved", "m"),
    ]
    assert [each["version"] for each in found] == list(range(1, 9))
    assert (found[-1]["actor"], found[-1]["detail"]["tag"]) == ("somebody", "prod")
    # For people, on one line however narrow the terminal is.
    (line,) = await watched(after=7, is_json=False)
    assert line.split()[1:] == ["8", "tag_moved", "m", "cause=tag", f"revision={A[:19]}", "tag=prod", "by", "somebody"]


async def test_prints_one_model_and_what_comes(parts: Parts) -> None:
    before = await parts.store.changes.version()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watched("n", before, 1), name="watch")
        await parts.catalog.update_policy("m", ModelPolicy(1, 1))
        await parts.catalog.update_policy("n", ModelPolicy(1, 1))
    (line,) = watching.result()
    assert json.loads(line)["model"] == "n"


async def test_a_version_that_is_not_known_is_said(parts: Parts) -> None:
    version = await parts.store.changes.version()
    assert [json.loads(line) for line in await watched(after=999)] == [{"missed_to": version}]


async def test_without_a_registry_it_ends(parts: Parts) -> None:
    parts.hub.close()
    with pytest.raises(Unavailable):
        await watched(after=None)
