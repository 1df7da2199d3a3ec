"""The supervisor's side of early loads with real files and a real socket; a fetch that the test plays."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import HeliosError, Unavailable
from helios.storage.early.watching import GrowingFile, Growth
from helios.worker.early.asking import Arrivals, BytesLost
from helios.worker.early.loads import EarlyLoads
from helios.worker.early.view import is_growing
from tests.worker.supervisor.fakes import REVISION

WEIGHTS = "model.safetensors"
HEADER = (2).to_bytes(8, "little") + b"{}"
CONTENT = HEADER + bytes(range(90))
CONFIG = b'{"dtype": "bfloat16", "tie_word_embeddings": false}'
SECONDS = 20.0


@dataclass
class Playing:
    """A storage agent: what it has on its disk, and what it tells."""

    directory: Path
    told: "asyncio.Queue[Growth | HeliosError]" = field(default_factory=asyncio.Queue)
    watch_count: int = 0

    def __post_init__(self) -> None:
        self.directory.mkdir()
        (self.directory / "config").write_bytes(CONFIG)
        (self.directory / "partial").write_bytes(CONTENT)

    async def watch_fetch(self, revision: str) -> AsyncGenerator[Growth, None]:
        assert revision == REVISION
        self.watch_count += 1
        while True:
            told = await self.told.get()
            if isinstance(told, HeliosError):
                raise told
            yield told

    def tell(self, *spans: tuple[int, int], generation: int = 1, place: str = "partial") -> None:
        config = GrowingFile("config.json", str(self.directory / "config"), len(CONFIG), ((0, len(CONFIG)),))
        weights = GrowingFile(WEIGHTS, str(self.directory / place), len(CONTENT), spans, generation)
        growth = Growth((config, weights)) if spans else Growth((config,), (WEIGHTS,))
        self.told.put_nowait(growth)

    def lend(self) -> str:
        """Gives the file its name, as a commit does, and shows it in a view."""
        view = self.directory / "views" / REVISION
        view.mkdir(parents=True)
        (self.directory / "partial").rename(self.directory / "blob")
        for name, blob in (("config.json", "config"), (WEIGHTS, "blob")):
            (view / name).hardlink_to(self.directory / blob)
        return str(view)


@dataclass
class Following:
    """One replica whose fetch is followed."""

    agent: Playing
    loads: EarlyLoads
    begun: list[str]
    task: "asyncio.Task[None]"

    async def until(self, is_met: Callable[[], Any]) -> None:
        async with asyncio.timeout(SECONDS):
            while not is_met():
                await asyncio.sleep(0.005)

    async def begin(self, *spans: tuple[int, int]) -> Arrivals:
        """Tells what is here, which is enough; returns what a load of the replica knows."""
        self.agent.tell(*spans)
        await self.until(lambda: self.begun)
        arrivals = Arrivals(str(self.loads.door), "r1", self.begun[0])
        await asyncio.to_thread(arrivals.wait_more)
        return arrivals


@asynccontextmanager
async def following(folder: Path) -> AsyncIterator[Following]:
    agent = Playing(folder / "agent")
    async with EarlyLoads(folder / "early", folder / "d", agent) as loads, asyncio.TaskGroup() as group:
        begun: list[str] = []
        task = group.create_task(loads.follow("r1", REVISION, on_enough=begun.append))
        yield Following(agent, loads, begun, task)
        task.cancel()
        loads.drop("r1")
        assert list((folder / "early").iterdir()) == []


async def test_a_load_sees_its_files_grow_and_then_what_is_lent_under_one_path(folder: Path) -> None:
    async with following(folder) as replica:
        arrivals = await replica.begin((0, 50))
        path = Path(replica.begun[0])
        assert (path / "config.json").read_bytes() == CONFIG
        assert is_growing(str(path))
        assert arrivals.weights == [WEIGHTS]
        assert arrivals.covers(WEIGHTS, 10, 50)
        assert not arrivals.covers(WEIGHTS, 10, 51)
        shown = os.stat(path / WEIGHTS).st_ino  # noqa: PTH116  through links
        replica.agent.tell((0, 70))
        await asyncio.to_thread(arrivals.wait_more)
        assert arrivals.covers(WEIGHTS, 10, 70)
        assert not arrivals.is_whole
        assert await asyncio.to_thread(arrivals.end)
        assert replica.loads.lend("r1", replica.agent.lend())
        await asyncio.to_thread(arrivals.wait_whole)
        assert not is_growing(str(path))
        assert (path / WEIGHTS).read_bytes() == CONTENT
        assert (path / WEIGHTS).stat().st_ino == shown
        assert len(replica.begun) == 1


async def test_a_start_waits_for_the_header_of_its_weights(folder: Path) -> None:
    async with following(folder) as replica:
        for spans in ((), ((0, 8),), ((0, 9),)):
            replica.agent.tell(*spans)
            await replica.until(replica.agent.told.empty)
        assert replica.begun == []
        replica.agent.tell((0, 10))
        await replica.until(lambda: replica.begun)


async def test_a_revision_that_is_lent_before_a_start_has_something_to_do_is_loaded_as_ever(folder: Path) -> None:
    async with following(folder) as replica:
        replica.agent.tell((0, 4))
        await replica.until(replica.agent.told.empty)
        assert replica.loads.lend("r1", replica.agent.lend())
        assert replica.begun == []
        with pytest.raises(Unavailable):
            await asyncio.to_thread(Arrivals(str(replica.loads.door), "r1", str(folder)).end)


@pytest.mark.parametrize("how", ["begun anew", "agent gone", "less than before"])
async def test_a_load_that_was_cut_off_waits_for_what_is_lent(folder: Path, how: str) -> None:
    async with following(folder) as replica:
        arrivals = await replica.begin((0, 50))
        if how == "agent gone":
            replica.agent.told.put_nowait(Unavailable("the storage agent went away"))
        elif how == "begun anew":
            replica.agent.tell((0, 60), generation=2)
        else:
            replica.agent.tell((0, 40))
        with pytest.raises(BytesLost):
            await asyncio.to_thread(arrivals.wait_more)
        assert not await asyncio.to_thread(arrivals.end)
        # It loads anew, so what it read before is nothing to anybody.
        assert replica.loads.lend("r1", replica.agent.lend())
        await asyncio.to_thread(arrivals.wait_whole)


@pytest.mark.parametrize("how", ["agent gone", "another file"])
async def test_a_load_that_had_ended_does_not_count_when_other_bytes_are_lent(folder: Path, how: str) -> None:
    async with following(folder) as replica:
        arrivals = await replica.begin((0, 50))
        assert await asyncio.to_thread(arrivals.end)
        if how == "agent gone":
            replica.agent.told.put_nowait(Unavailable("the storage agent went away"))
            await replica.until(replica.task.done)
        else:
            (replica.agent.directory / "partial").unlink()
            (replica.agent.directory / "partial").write_bytes(CONTENT)
        assert not replica.loads.lend("r1", replica.agent.lend())


async def test_an_agent_that_goes_away_before_the_start_began_costs_nothing(folder: Path) -> None:
    async with following(folder) as replica:
        replica.agent.tell((0, 4))
        replica.agent.told.put_nowait(Unavailable("the storage agent went away"))
        await replica.until(lambda: replica.agent.watch_count == 2)
        arrivals = await replica.begin((0, 20))
        assert arrivals.covers(WEIGHTS, 0, 20)


async def test_a_file_that_begins_anew_before_the_start_began_is_shown_as_it_is_then(folder: Path) -> None:
    async with following(folder) as replica:
        replica.agent.tell((0, 8))
        await replica.until(replica.agent.told.empty)
        other = HEADER + CONTENT[:9:-1]
        (replica.agent.directory / "other").write_bytes(other)
        replica.agent.tell((0, 40), generation=2, place="other")
        await replica.until(lambda: replica.begun)
        assert (Path(replica.begun[0]) / WEIGHTS).read_bytes() == other


async def test_loads_of_a_replica_that_ended_are_told_so(folder: Path) -> None:
    async with following(folder) as replica:
        arrivals = await replica.begin((0, 50))
        waiting = asyncio.get_running_loop().run_in_executor(None, arrivals.wait_whole)
        await asyncio.sleep(0)
        replica.loads.drop("r1")
        with pytest.raises(Unavailable, match="not wanted"):
            await waiting


async def test_a_load_that_asks_once_its_replica_has_ended_is_told_so(folder: Path) -> None:
    async with following(folder) as replica:
        arrivals = await replica.begin((0, 50))
        replica.loads.drop("r1")
        with pytest.raises(Unavailable, match="not wanted"):
            await asyncio.to_thread(arrivals.wait_whole)


async def test_what_earlier_processes_left_goes_but_for_replicas_that_live(folder: Path) -> None:
    agent = Playing(folder / "agent")
    root = folder / "early"
    (root / "old.growing").mkdir(parents=True)
    for name in ("old", "r1"):
        (root / name).symlink_to(folder / "view")
    async with EarlyLoads(root, folder / "d", agent) as loads:
        loads.sweep(["r1"])
        assert [path.name for path in root.iterdir()] == ["r1"]


async def test_without_a_supervisor_a_load_ends(folder: Path) -> None:
    (folder / ".helios-growing").touch()
    with pytest.raises(Unavailable, match="nobody says"):
        await asyncio.to_thread(Arrivals(str(folder / "none"), "r1", str(folder)).wait_whole)
