"""LoRA adapters that come and go while a replica runs: what is borrowed, told and given back, and when."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import NotFound
from helios.worker.replica.adapter_state import AdapterState, AdapterStatus
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings
from helios.worker.supervisor.adapter_book import AdapterBook
from helios.worker.supervisor.commands import Evict, SetAdapters
from helios.worker.supervisor.records import Failure, ReplicaState
from tests.worker.supervisor.fakes import REVISION, FakeLauncher, FakeWeights, Node, running_node, start_of

ONE, TWO, THREE = ("sha256:" + letter * 64 for letter in "abc")
LOADED, FAILED, UNLOADING = AdapterState.LOADED, AdapterState.FAILED, AdapterState.UNLOADING
WAIT_SECONDS = 10.0


def adapter(name: str, revision: str = ONE) -> LoraAdapter:
    return LoraAdapter(name, f"{name}-lora", revision)


def states(node: Node) -> dict[tuple[str, str], AdapterState]:
    view = node.replica("r1")
    assert view is not None
    return {(one.adapter.name, one.adapter.revision): one.state for one in view.adapters}


async def wait_until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not is_met():
            await asyncio.sleep(0.01)


async def running(node: Node, *adapters: LoraAdapter) -> None:
    settings = EngineSettings(lora=LoraSettings(adapters))
    assert node.supervisor.execute("start", start_of("r1", settings=settings)).is_accepted
    await node.wait_state("r1", ReplicaState.READY)


def have(node: Node, number: int, *adapters: LoraAdapter) -> None:
    assert node.supervisor.execute(f"set {number}", SetAdapters("r1", adapters)).is_accepted


async def test_adapters_come_change_and_go_and_their_leases_with_them(folder: Path) -> None:
    weights, launcher = FakeWeights(path="/files"), FakeLauncher()
    async with running_node(folder, launcher=launcher, weights=weights) as node:
        await running(node, adapter("pirate"))
        await wait_until(lambda: states(node) == {("pirate", ONE): LOADED})
        have(node, 1, adapter("pirate", TWO), adapter("poet", THREE))
        await wait_until(lambda: states(node) == {("pirate", TWO): LOADED, ("poet", THREE): LOADED})
        await wait_until(lambda: weights.released == [lease(weights, ONE)])
        have(node, 2, adapter("poet", THREE))
        await wait_until(lambda: states(node) == {("poet", THREE): LOADED})
        await wait_until(lambda: sorted(weights.released) == sorted([lease(weights, ONE), lease(weights, TWO)]))
        assert node.supervisor.execute("evict", Evict(THREE)).refused_reason == "REVISION_LEASED"
        view = node.replica("r1")
        assert view is not None
        assert view.state is ReplicaState.READY
        assert len(launcher.specs) == 1, "nothing was restarted"
        await node.supervisor.end_all(2)
    assert sorted(weights.released) == sorted(weights.borrowed)


def lease(weights: FakeWeights, revision: str) -> str:
    return weights.borrowed[weights.revisions.index(revision)]


async def test_files_of_an_adapter_stay_while_a_request_uses_it(folder: Path) -> None:
    weights = FakeWeights(path="/files")
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        await running(node, adapter("busy"))
        await wait_until(lambda: states(node) == {("busy", ONE): LOADED})
        have(node, 1)
        await wait_until(lambda: states(node) == {("busy", ONE): UNLOADING})
        assert node.supervisor.execute("evict", Evict(ONE)).refused_reason == "REVISION_LEASED"
        assert weights.released == []
        await node.supervisor.end_all(2)


async def test_an_adapter_that_can_t_be_had_holds_up_nothing(folder: Path) -> None:
    class Partly(FakeWeights):
        def materialize(self, revision: str, **more: Any) -> Any:
            self.error = NotFound("no such blob", reason="BLOB_NOT_FOUND") if revision == TWO else None
            return super().materialize(revision, **more)

    weights = Partly(path="/files")
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        await running(node, adapter("good"), adapter("gone", TWO), adapter("bad", THREE))
        expected = {("good", ONE): LOADED, ("gone", TWO): FAILED, ("bad", THREE): FAILED}
        await wait_until(lambda: states(node) == expected)
        view = node.replica("r1")
        assert view is not None
        reasons = {one.adapter.name: one.reason for one in view.adapters}
        assert reasons == {"good": "", "gone": "BLOB_NOT_FOUND", "bad": "BAD_ADAPTER"}
        await node.supervisor.end_all(2)


async def test_a_successor_goes_on_with_the_adapters_that_were_set_last(folder: Path) -> None:
    weights = FakeWeights(path="/files")
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        await running(node, adapter("pirate"))
        have(node, 1, adapter("poet", TWO))
        await wait_until(lambda: states(node) == {("poet", TWO): LOADED})
        node.supervisor.write_list()
    taken = len(weights.revisions)
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        assert states(node) == {("poet", TWO): LOADED}, "before the replica is back"
        assert await node.supervisor.wait_returned(5.0)
        await wait_until(lambda: sorted(weights.revisions[taken:]) == sorted([REVISION, TWO]))
        assert states(node) == {("poet", TWO): LOADED}
        await node.supervisor.end_all(2)


async def test_a_replica_that_is_taken_over_by_its_word_alone_keeps_its_adapters(folder: Path) -> None:
    weights = FakeWeights(path="/files")
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        await running(node, adapter("pirate"))
        await wait_until(lambda: states(node) == {("pirate", ONE): LOADED})
        node.supervisor.write_list()
    (folder / "replicas.json").unlink()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        await node.wait_state("r1", ReplicaState.READY)
        assert states(node) == {("pirate", ONE): LOADED}
        await wait_until(lambda: weights.revisions.count(ONE) == 2)
        have(node, 1)
        await wait_until(lambda: states(node) == {})
        await node.supervisor.end_all(2)


NAMES, REVISIONS = ("x", "y"), (ONE, TWO, THREE)
ADAPTERS = st.builds(adapter, st.sampled_from(NAMES), st.sampled_from(REVISIONS))
WANTED = st.lists(ADAPTERS, max_size=2, unique_by=lambda one: one.name).map(tuple)
TOLD = st.lists(
    st.builds(AdapterStatus, ADAPTERS, st.sampled_from(AdapterState)), max_size=3, unique_by=lambda one: one.adapter
)


@given(
    st.lists(st.one_of(WANTED.map(lambda one: ("want", one)), TOLD.map(lambda one: ("tell", tuple(one)))), min_size=1)
)
def test_every_revision_that_is_wanted_or_named_by_the_replica_stays_on_the_node(
    steps: list[tuple[str, tuple[Any, ...]]],
) -> None:
    book = AdapterBook(())
    wanted: tuple[LoraAdapter, ...] = ()
    told: tuple[AdapterStatus, ...] = ()
    is_known = False
    for kind, value in steps:
        if kind == "want":
            wanted, is_known = value, True
            book.want(value)
        else:
            told = value
            book.tell(value)
        assert {one.revision for one in wanted} | {one.adapter.revision for one in told} <= book.revisions
        if is_known:
            assert book.wanted == wanted
            shown = {one.adapter: one.state for one in book.statuses}
            assert {one for one, state in shown.items() if state is not UNLOADING} == set(wanted)
            assert all(shown[one.adapter] is UNLOADING for one in told if one.adapter not in wanted)


def test_what_can_t_be_borrowed_has_failed_only_as_long_as_the_engine_has_not_got_it() -> None:
    book = AdapterBook((adapter("x"),))
    book.refused(ONE, Failure("DISK_FULL", "no room"))
    assert [(one.state, one.reason) for one in book.statuses] == [(FAILED, "DISK_FULL")]
    book.tell([AdapterStatus(adapter("x"), LOADED)])
    assert [one.state for one in book.statuses] == [LOADED], "a lost lease takes nothing from the engine"
