"""``helios models tag|rollback|history|pin|rm`` against a real registry: what they change and what they print."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helios.cli import model_versions
from helios.cli.models_add import Addition, reached
from helios.cli.state import StateDirectory
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest, ModelNotFound, PreconditionFailed
from helios.registry.client import IngestDone
from helios.registry.names import Reference
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_store import A, B, new

STATE = StateDirectory(Path("/nowhere"))


class Printed:
    """A console that can be read."""

    def __init__(self) -> None:
        self._out = io.StringIO()
        self.console = Console(file=self._out, width=120)

    def text(self) -> str:
        text = self._out.getvalue()
        self._out.seek(0)
        self._out.truncate()
        return text

    def json(self) -> Any:
        return json.loads(self.text())


@pytest.fixture
async def parts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Parts]:
    """A registry with two revisions of a model, which the commands find as they find the one of a mesh that runs."""
    mesh = Mesh(tmp_path_factory.mktemp("pki"))
    async with open_parts(tmp_path / "registry") as opened, serve(opened, mesh) as address:

        @asynccontextmanager
        async def open_admin(_: StateDirectory) -> AsyncIterator[Dialer]:
            async with mesh.dialer(address, "admin-edge") as dialer:
                yield dialer

        monkeypatch.setattr(model_versions, "open_admin", open_admin)
        for seed in "ab":
            await opened.catalog.put_model("m", ("x",), new(seed))
        yield opened


@pytest.fixture
def out() -> Printed:
    return Printed()


async def tag(out: Printed, reference: str, name: str, *, is_deleted: bool = False, is_json: bool = False) -> None:
    await model_versions.tag(STATE, out.console, reference, name, is_deleted=is_deleted, is_json=is_json)


async def test_tags(parts: Parts, out: Printed) -> None:
    await tag(out, f"x@{A}", "prod")
    assert out.text() == f"m@prod is {A[:19]}\n"
    await tag(out, "m@prod", "", is_json=True)
    printed = out.json()
    assert (printed["model"], printed["served"], printed["tags"]) == ("m", A, {"prod": A})
    assert printed["version"] == (await parts.store.get_model("m")).version
    await tag(out, "m", "prod", is_deleted=True)
    assert out.text() == "m@prod is gone\n"
    with pytest.raises(ModelNotFound):
        await tag(out, "nothing", "prod")


async def test_going_back_and_what_was(parts: Parts, out: Printed) -> None:
    await model_versions.rollback(STATE, out.console, "m", to="", is_json=False)
    assert out.text() == f"m is {A[:19]} again\n"
    with pytest.raises(PreconditionFailed):
        await model_versions.rollback(STATE, out.console, "m", to="", is_json=False)
    await parts.versions.put_tag(Reference("m", digest=B), "prod")
    await model_versions.history(STATE, out.console, "m", count=20, is_json=True)
    assert [(move["tag"], move["revision"], move["cause"], move["actor"]) for move in out.json()] == [
        ("prod", B, "tag", ""),
        ("", A, "rollback", "admin-edge"),
        ("", B, "ingest", ""),
        ("", A, "ingest", ""),
    ]
    await model_versions.history(STATE, out.console, "m@prod", count=20, is_json=False)
    printed = out.text()
    assert "m@prod" in printed
    assert B[:19] in printed
    assert A[:19] not in printed
    with pytest.raises(InvalidRequest):
        await model_versions.history(STATE, out.console, "m@", count=20, is_json=False)


async def test_pins_and_removing(parts: Parts, out: Printed) -> None:
    await model_versions.pin(STATE, out.console, f"m@{A}", reason="audit", is_removed=False, is_json=False)
    assert out.text() == f"m keeps {A[:19]}\n"
    for reference in ("m", f"m@{A}"):
        with pytest.raises(PreconditionFailed):
            await model_versions.remove(STATE, out.console, reference, is_forced=False, is_json=False)
    await model_versions.pin(STATE, out.console, f"m@{A}", reason="", is_removed=True, is_json=True)
    assert out.json()["pins"] == {}
    await model_versions.remove(STATE, out.console, f"m@{A}", is_forced=False, is_json=False)
    assert out.text().startswith(f"m@{A} removed")
    await model_versions.remove(STATE, out.console, "m", is_forced=False, is_json=True)
    assert out.json()["removed"] == "m"
    assert await parts.store.list_models() == []


async def test_what_reaches_a_revision_that_is_not_served(parts: Parts) -> None:
    model = await parts.catalog.put_model("m", (), replace(new("d"), tags=("canary",), is_served=False))
    name, done = reached(Addition("m", "/d", tags=("canary",), keep_served=True), "m", IngestDone(model, 1))
    assert (name, done.model.revision) == ("m@canary", new_revision := model.tags[0].revision)
    assert new_revision != model.revision
    assert reached(Addition("m", "/d", tags=("canary",)), "m", IngestDone(model, 1)) == ("m", IngestDone(model, 1))


async def test_dry_runs_say_what_would_be_and_leave_everything(parts: Parts, out: Printed) -> None:
    before = await parts.catalog.store.get_model("m")
    await model_versions.tag(STATE, out.console, f"m@{A}", "prod", is_deleted=False, is_json=False, is_dry_run=True)
    assert out.text().startswith("nothing was done; it would be: m@prod is sha256:")
    await model_versions.pin(STATE, out.console, f"m@{A}", reason="", is_removed=False, is_json=False, is_dry_run=True)
    assert "m keeps sha256:" in out.text()
    await model_versions.remove(STATE, out.console, "m", is_forced=False, is_json=True, is_dry_run=True)
    assert out.json() == {"would_remove": "m", "freed_bytes": 100 + 100 + 7}
    with pytest.raises(PreconditionFailed):
        await model_versions.remove(STATE, out.console, f"m@{B}", is_forced=False, is_json=False, is_dry_run=True)
    assert await parts.catalog.store.get_model("m") == before
