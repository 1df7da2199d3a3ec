"""Cordons of several proxies: written to the registry, heard of by all, and kept for when it is away."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest

from helios.mesh.errors import InvalidRequest, Unavailable
from helios.mesh.tasks import keep_running, task_scope
from helios.proxy.core import Core
from helios.proxy.fleet.cordons import Cordons
from helios.proxy.store import Store, load_cordons
from tests.proxy.support import core, hello

WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Told:
    worker_id: str


@dataclass
class Registry:
    """The registry's cordons, in memory; it may be away."""

    cordons: set[str] = field(default_factory=set)
    is_away: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def set(self, worker_id: str, *, is_cordoned: bool) -> list[Told]:
        self._check()
        if not worker_id.strip():
            raise InvalidRequest("no such id", reason="INVALID_CORDON")
        change = self.cordons.add if is_cordoned else self.cordons.discard
        change(worker_id)
        self._announce()
        return self._told()

    async def watch(self) -> AsyncIterator[list[Told]]:
        while True:
            self._check()
            changed = self.changed
            yield self._told()
            await changed.wait()

    def goes(self, *, is_away: bool) -> None:
        self.is_away = is_away
        self._announce()

    def _told(self) -> list[Told]:
        return [Told(worker_id) for worker_id in sorted(self.cordons)]

    def _check(self) -> None:
        if self.is_away:
            raise Unavailable("away")

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def proxy(directory: Path, registry: Registry | None) -> tuple[Core, Cordons]:
    """A proxy as it starts on a directory, with two workers."""
    subject = core()
    for worker_id in ("v", "w"):
        subject.worker_hello(hello(worker_id), 0.0)
    cordons = Cordons(subject, lambda _: None, Store(directory, subject.catalogue))
    cordons.restore(*load_cordons(directory))
    if registry is not None:
        cordons.use(registry)
    return subject, cordons


@asynccontextmanager
async def watching(*watchers: Cordons) -> AsyncIterator[None]:
    async with task_scope() as group:
        for cordons in watchers:
            group.create_task(keep_running("watch cordons", cordons.watch, base_seconds=0.005, cap_seconds=0.01))
        yield


async def until(subject: Core, cordoned: Iterable[str]) -> None:
    """Waits until just these are cordoned."""
    async with asyncio.timeout(WAIT_SECONDS):
        while subject.fleet.cordoned != set(cordoned):
            await asyncio.sleep(0.002)


async def kept(directory: Path, *, shared: list[str]) -> None:
    """Waits until just this is on disk, all of it the registry's."""
    async with asyncio.timeout(WAIT_SECONDS):
        while load_cordons(directory) != ([], shared):
            await asyncio.sleep(0.002)


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path, core().catalogue)
    assert load_cordons(tmp_path) == ([], [])
    asyncio.run(store.save_cordons({"w", "v"}, {"x"}))
    assert load_cordons(tmp_path) == (["v", "w"], ["x"])
    (tmp_path / "cordons.json").write_bytes(orjson.dumps(["v", "w"]))
    assert load_cordons(tmp_path) == (["v", "w"], [])
    (tmp_path / "cordons.json").write_text("{")
    assert load_cordons(tmp_path) == ([], [])


@dataclass
class SlowRegistry(Registry):
    """One whose answers wait."""

    answers: asyncio.Event = field(default_factory=asyncio.Event)

    async def set(self, worker_id: str, *, is_cordoned: bool) -> list[Told]:
        told = await super().set(worker_id, is_cordoned=is_cordoned)
        await self.answers.wait()
        return told


@pytest.mark.parametrize("is_undone", [False, True], ids=["another changed", "undone"])
async def test_an_answer_that_is_older_than_the_watch_changes_nothing(tmp_path: Path, is_undone: bool) -> None:
    registry = SlowRegistry()
    here, cordons = proxy(tmp_path, registry)
    async with watching(cordons), asyncio.TaskGroup() as group:
        changing = group.create_task(cordons.change("w", is_cordoned=True))
        await until(here, {"w"})
        await Registry.set(registry, "w" if is_undone else "v", is_cordoned=not is_undone)
        await until(here, set() if is_undone else {"v", "w"})
        registry.answers.set()
        await changing
        assert here.fleet.cordoned == registry.cordons


async def test_a_change_counts_though_the_watch_broke_while_it_was_made(tmp_path: Path) -> None:
    registry = SlowRegistry()
    here, cordons = proxy(tmp_path, registry)
    async with asyncio.TaskGroup() as group:
        changing = group.create_task(cordons.change("w", is_cordoned=True))
        while not registry.cordons:
            await asyncio.sleep(0)
        # The last thing that the watch said is of before.
        await cordons._take(["v"])
        registry.answers.set()
        await changing
    assert here.fleet.cordoned == {"v", "w"}


async def test_a_cordon_made_at_one_proxy_counts_at_all_of_them(tmp_path: Path) -> None:
    registry = Registry()
    here, cordons = proxy(tmp_path / "a", registry)
    there, others = proxy(tmp_path / "b", registry)
    async with watching(cordons, others):
        await cordons.change("w", is_cordoned=True)
        assert here.fleet.cordoned == {"w"}, "whoever asked finds it done"
        await until(there, {"w"})
        await others.change("w", is_cordoned=False)
        await until(here, ())


async def test_a_cordon_waits_for_a_registry_that_starts_again(tmp_path: Path) -> None:
    registry = Registry(is_away=True)
    here, cordons = proxy(tmp_path, registry)
    async with asyncio.TaskGroup() as group:
        changing = group.create_task(cordons.change("w", is_cordoned=True))
        # Until it was refused.
        await asyncio.sleep(0.01)
        assert not changing.done()
        registry.goes(is_away=False)
    assert here.fleet.cordoned == registry.cordons == {"w"}


async def test_the_registrys_cordons_hold_while_it_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.proxy.fleet.cordons.RESTART_SECONDS", 0.2)
    registry = Registry({"w"})
    first, cordons = proxy(tmp_path, registry)
    async with watching(cordons):
        await until(first, {"w"})
        await kept(tmp_path, shared=["w"])
    registry.goes(is_away=True)
    again, cordons = proxy(tmp_path, registry)
    assert again.fleet.cordoned == {"w"}
    with pytest.raises(Unavailable) as refused:
        await cordons.change("w", is_cordoned=False)
    assert refused.value.reason == "REGISTRY_UNAVAILABLE"
    assert again.fleet.cordoned == {"w"}
    registry.cordons.clear()
    async with watching(cordons):
        registry.goes(is_away=False)
        await until(again, ())
        await kept(tmp_path, shared=[])


async def test_what_the_registry_refuses_is_said_as_it_says_it(tmp_path: Path) -> None:
    _, cordons = proxy(tmp_path, Registry())
    with pytest.raises(InvalidRequest):
        await cordons.change(" ", is_cordoned=True)


async def test_cordons_from_before_they_were_shared_are_handed_over_once(tmp_path: Path) -> None:
    (tmp_path / "cordons.json").write_bytes(orjson.dumps(["w"]))
    registry = Registry({"v"}, is_away=True)
    subject, cordons = proxy(tmp_path, registry)
    assert subject.fleet.cordoned == {"w"}, "before the registry was reached"
    async with watching(cordons):
        registry.goes(is_away=False)
        await until(subject, {"v", "w"})
        await kept(tmp_path, shared=["v", "w"])
    assert registry.cordons == {"v", "w"}
    # Lifted elsewhere meanwhile: the copy on disk does not bring it back.
    registry.cordons.discard("w")
    subject, cordons = proxy(tmp_path, registry)
    async with watching(cordons):
        await until(subject, {"v"})
    assert registry.cordons == {"v"}


async def test_without_a_registry_the_proxys_own_disk_keeps_them(tmp_path: Path) -> None:
    _, cordons = proxy(tmp_path, None)
    await cordons.change("w", is_cordoned=True)
    await cordons.change("v", is_cordoned=True)
    await cordons.change("w", is_cordoned=False)
    again, _ = proxy(tmp_path, None)
    assert again.fleet.cordoned == {"v"}
