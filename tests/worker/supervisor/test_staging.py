"""Staged models: one host copy of each file, little beyond it, and memory that is given back."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from helios.worker.supervisor.commands import Evict, Stage, Unstage
from helios.worker.supervisor.records import StagedState
from helios.worker.supervisor.resident_files import ResidentFiles
from helios.worker.supervisor.staging import next_look_seconds
from tests.worker.supervisor.fakes import WAIT_SECONDS, FakeLauncher, FakeWeights, Node, running_node, start_of

MIB = 1 << 20
SIZE = 8 * MIB


def revision(number: int) -> str:
    return f"sha256:{number:064x}"


def make_models(folder: Path, count: int) -> None:
    """Writes models of 8 MiB weights and a small file each, and drops them from the page cache."""
    for number in range(count):
        directory = folder / revision(number)
        directory.mkdir(parents=True)
        for name, data in (("model.safetensors", os.urandom(SIZE)), ("config.json", b"{}")):
            with (directory / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def page_tables() -> int:
    """Returns the bytes of this process's page tables, which mapping costs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPTE:"))


async def wait_staged(node: Node, count: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while sum(view.state is StagedState.STAGED for view in node.supervisor.view().staged) < count:
            await asyncio.sleep(0.01)


async def wait_released(node: Node) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while node.supervisor.view().staged:
            await asyncio.sleep(0.01)


async def test_ten_staged_models_cost_one_copy_of_each_file_and_little_beyond_it(folder: Path) -> None:
    make_models(folder / "weights", 10)
    process = psutil.Process()
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=100 * MIB) as node:
        before, tables_before = process.memory_info(), page_tables()
        for number in range(10):
            assert node.supervisor.execute(f"stage-{number}", Stage(revision(number), f"m{number}", SIZE)).is_accepted
        await wait_staged(node, 10)
        after = process.memory_info()
        # A second mapping of the same files, as a replica has: no page is read or copied for it.
        shared = [ResidentFiles.of_directory(folder / "weights" / revision(number)) for number in range(10)]
        assert sum(files.resident_bytes() for files in shared) >= 10 * SIZE
        for files in shared:
            files.close()
        beyond = (after.rss - after.shared) - (before.rss - before.shared) + page_tables() - tables_before
        assert beyond <= 10 * 5 * MIB
        assert 10 * SIZE <= after.shared - before.shared <= 10 * (SIZE + MIB)
        host = node.supervisor.view().host
        assert host.booked_bytes == 10 * (SIZE + 2)
        for view in node.supervisor.view().staged:
            assert view.resident_bytes == view.memory_bytes == SIZE + 2
        await node.supervisor.end_all(1)
        assert node.supervisor.view().host.booked_bytes == 0
    assert sorted(weights.released) == sorted(weights.borrowed)


async def test_a_model_beyond_the_host_memory_is_refused_and_fits_after_another_went(folder: Path) -> None:
    make_models(folder / "weights", 2)
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE + MIB) as node:
        assert node.supervisor.execute("one", Stage(revision(0), "a", SIZE)).is_accepted
        assert node.supervisor.execute("again", Stage(revision(0), "a", SIZE)).is_accepted
        assert node.supervisor.execute("two", Stage(revision(1), "b", SIZE)).refused_reason == "NO_CAPACITY"
        await wait_staged(node, 1)
        assert node.supervisor.execute("out", Unstage(revision(0))).is_accepted
        await wait_released(node)
        assert node.supervisor.execute("three", Stage(revision(1), "b", SIZE)).is_accepted
        await wait_staged(node, 1)
        # Evicting a revision takes it out of memory first.
        assert node.supervisor.execute("evict", Evict(revision(1))).is_accepted
        await wait_released(node)
        async with asyncio.timeout(WAIT_SECONDS):
            while not weights.evicted:
                await asyncio.sleep(0.01)
        assert weights.released == weights.borrowed
        await node.supervisor.end_all(1)


async def test_what_is_staged_right_after_another_was_given_up_waits_for_its_room(folder: Path) -> None:
    make_models(folder / "weights", 2)
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE + MIB) as node:
        assert node.supervisor.execute("one", Stage(revision(0), "a", SIZE)).is_accepted
        await wait_staged(node, 1)
        # As a proxy says it: one gives way to the other, and back, without a pause.
        for number, (out, into) in enumerate(((0, 1), (1, 0), (0, 0))):
            assert node.supervisor.execute(f"out {number}", Unstage(revision(out))).is_accepted
            assert node.supervisor.execute(f"in {number}", Stage(revision(into), "m", SIZE)).is_accepted
            assert node.supervisor.view().host.booked_bytes <= SIZE + MIB
        full = node.supervisor.execute("full", Stage(revision(1), "b", SIZE))
        assert full.refused_reason == "NO_CAPACITY"
        await wait_staged(node, 1)
        assert [view.revision for view in node.supervisor.view().staged] == [revision(0)]
        assert node.supervisor.view().host.booked_bytes == SIZE + 2
        await node.supervisor.end_all(1)
        assert node.supervisor.view().host.booked_bytes == 0
    assert sorted(weights.released) == sorted(weights.borrowed)


async def test_what_is_given_up_before_it_began_leaves_nothing_booked(folder: Path) -> None:
    make_models(folder / "weights", 1)
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE + MIB) as node:
        for number in range(3):
            assert node.supervisor.execute(f"in {number}", Stage(revision(0), "a", SIZE)).is_accepted
            assert node.supervisor.execute(f"out {number}", Unstage(revision(0))).is_accepted
        async with asyncio.timeout(WAIT_SECONDS):
            while node.supervisor.view().host.booked_bytes:
                await asyncio.sleep(0.01)
        assert node.supervisor.execute("again", Stage(revision(0), "a", SIZE)).is_accepted
        await wait_staged(node, 1)
        await node.supervisor.end_all(1)


async def test_a_refused_evict_leaves_what_is_staged(folder: Path) -> None:
    make_models(folder / "weights", 1)
    order = replace(start_of("r1"), revision=revision(0))
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE + MIB) as node:
        assert node.supervisor.execute("start", order).is_accepted
        assert node.supervisor.execute("stage", Stage(revision(0), "a", SIZE)).is_accepted
        await wait_staged(node, 1)
        assert node.supervisor.execute("evict", Evict(revision(0))).refused_reason == "REVISION_LEASED"
        assert [view.revision for view in node.supervisor.view().staged] == [revision(0)]
        await node.supervisor.end_all(1)


async def test_a_size_that_was_not_known_is_booked_when_it_is_or_refused(folder: Path) -> None:
    make_models(folder / "weights", 1)
    weights = FakeWeights(path=str(folder / "weights"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE // 2) as node:
        assert node.supervisor.execute("one", Stage(revision(0), "a")).is_accepted
        await wait_released(node)
        assert node.supervisor.view().host.booked_bytes == 0
        assert weights.released == weights.borrowed


async def test_a_revision_without_files_is_gone_with_a_reason(folder: Path) -> None:
    weights = FakeWeights(path=str(folder / "nowhere"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=SIZE) as node:
        assert node.supervisor.execute("one", Stage(revision(0), "a", MIB)).is_accepted
        await wait_released(node)
        assert node.supervisor.view().host.booked_bytes == 0


def test_dropped_pages_are_read_again_less_and_less_often_until_they_stay() -> None:
    waits = [10.0]
    for _ in range(8):
        waits.append(next_look_seconds(waits[-1], is_dropped=True))
    assert waits == [10, 20, 40, 80, 160, 320, 640, 640, 640]
    assert next_look_seconds(waits[-1], is_dropped=False) == 10


def test_closing_while_another_thread_reads_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    files = ResidentFiles([path])
    files.bring_in()
    assert files.resident_bytes() == files.size_bytes == MIB
    assert files.locked_bytes in (0, MIB)
    files.close()
    files.bring_in()
    files.close()
    assert (files.resident_bytes(), files.locked_bytes) == (0, 0)


def test_a_file_that_is_not_there_is_an_error_and_leaves_nothing_mapped(tmp_path: Path) -> None:
    present = tmp_path / "present"
    present.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        ResidentFiles([present, tmp_path / "absent"])
