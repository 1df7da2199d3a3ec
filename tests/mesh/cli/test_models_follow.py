"""What ``helios models follow`` makes of its options."""

import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helios.cli import models_follow
from helios.cli.models_follow import Manner, Order, document_of, read_span
from helios.cli.state import StateDirectory
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest, NotFound
from helios.registry.client import FollowPolicy, Wish
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_store import new

WISH = Wish("hf:org/m")
Follow = Callable[[Order, bool], Coroutine[Any, Any, str]]
"""Runs the command of the model `m`, for JSON or people; returns what it printed."""


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    """A registry with a model."""
    async with open_parts(tmp_path / "registry") as opened:
        await opened.catalog.put_model("m", (), new("a"))
        yield opened


@pytest.fixture
async def follow(
    parts: Parts, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Follow]:
    """The command, which finds that registry as it finds the one of a mesh that runs."""
    mesh = Mesh(tmp_path_factory.mktemp("pki"))
    async with serve(parts, mesh) as address:

        @asynccontextmanager
        async def open_admin(_: StateDirectory) -> AsyncIterator[Dialer]:
            async with mesh.dialer(address, "admin-edge") as dialer:
                yield dialer

        async def follow(order: Order, is_json: bool) -> str:
            out = io.StringIO()
            console = Console(file=out, width=120)
            await models_follow.follow(StateDirectory(Path("/nowhere")), console, "m", order, is_json=is_json)
            return out.getvalue()

        monkeypatch.setattr(models_follow, "open_admin", open_admin)
        yield follow


async def test_dry_runs_say_what_would_be_and_leave_everything(parts: Parts, follow: Follow) -> None:
    async def told(order: Order) -> Any:
        return json.loads(await follow(order, True))

    order = Order("hf:org/m", Manner("2h"), is_dry_run=True)
    assert (await follow(order, False)).startswith("nothing was done; it would be:\n")
    assert (await told(order))["interval_seconds"] == 7200
    with pytest.raises(NotFound):
        await parts.followed.get("m")
    await told(Order("hf:org/m"))
    before = await parts.followed.get("m")
    assert (await told(Order(manner=Manner("2h"), is_dry_run=True)))["interval_seconds"] == 7200
    assert await told(Order(is_stopped=True, is_dry_run=True)) == {}
    assert await told(Order(is_now=True, is_dry_run=True)) == document_of(before)
    assert await parts.followed.get("m") == before
    assert await told(Order(is_stopped=True)) == {}
    with pytest.raises(NotFound):
        await parts.followed.get("m")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604_800)])
def test_times_are_read(text: str, seconds: int) -> None:
    assert read_span(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "-1h", "1w", "1 h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_span(text)


def test_what_is_not_said_stays_as_it_is() -> None:
    before = Wish("hf:org/m", interval=timedelta(hours=3), policy=FollowPolicy.MOVE)
    assert Manner().apply(before) == before
    assert Manner("2h").apply(before) == Wish("hf:org/m", interval=timedelta(hours=2), policy=FollowPolicy.MOVE)
    rolled = Manner(policy="rollout", weight=5).apply(WISH)
    assert (rolled.policy, rolled.weight_percent) == (FollowPolicy.ROLLOUT, 5)


@pytest.mark.parametrize("manner", [Manner(policy="later"), Manner(policy="rollout"), Manner("soon")])
def test_what_can_not_be_meant_is_refused(manner: Manner) -> None:
    with pytest.raises(InvalidRequest):
        manner.apply(WISH)


def test_a_model_that_follows_nothing_shows_nothing() -> None:
    assert document_of(None) == {}
