"""Staged models: one host copy of each file, little beyond it, and memory that is given back."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from helios.worker.replica.artifact_directory import drop, drop_unused, mark_proven
from helios.worker.replica.packed_weights import WEIGHTS, PackedInputs, mark_unfit
from helios.worker.replica.packed_writer import ArtifactWriter
from helios.worker.supervisor.commands import Evict, Stage, Unstage
from helios.worker.supervisor.records import StagedState, StagedView
from helios.worker.supervisor.resident_files import ResidentFiles
from helios.worker.supervisor.staging import next_look_seconds
from helios.worker.supervisor.start_files import StartFiles
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


def pack(root: Path, number: int, size: int = SIZE + MIB, *, flags: str = "") -> Path:
    """Writes packed weights of a model, which a start has proved, and drops them from the page cache."""
    surroundings = {"engine_version": "", "torch_version": "", "driver": "", "architecture": ""}
    inputs = PackedInputs(revision=revision(number), flags={"dtype": flags}, **surroundings)
    with ArtifactWriter(str(root), inputs) as writer:
        writer.append(memoryview(os.urandom(size)))
        path = writer.publish("skeleton", (), (), ())
    mark_proven(path)
    forget(path / WEIGHTS)
    return path


def forget(path: Path) -> None:
    """Drops a file from the page cache, if nobody maps it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(path: Path) -> int:
    """Returns how many bytes of a file are in the page cache."""
    files = ResidentFiles([path])
    try:
        return files.resident_bytes()
    finally:
        files.close()


def page_tables() -> int:
    """Returns the bytes of this process's page tables, which mapping costs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPTE:"))


async def wait_staged(node: Node, count: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while sum(view.state is StagedState.STAGED for view in node.supervisor.view().staged) < count:
            await asyncio.sleep(0.01)


async def wait_held(node: Node, is_wanted: Callable[[StagedView], bool]) -> StagedView:
    """Waits until the one staged model is as wanted, and says how it is."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            (view,) = node.supervisor.view().staged
            if is_wanted(view):
                return view
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
        shared = [StartFiles(folder / "weights" / revision(number), revision(number), None) for number in range(10)]
        assert sum(held.files.resident_bytes() for held in shared) >= 10 * SIZE
        for held in shared:
            held.close()
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


async def test_ten_models_that_starts_map_packed_cost_one_copy_of_that_and_none_of_the_checkpoint(folder: Path) -> None:
    make_models(folder / "weights", 10)
    paths = [pack(folder / "packed", number) for number in range(10)]
    weights, packed_bytes = FakeWeights(path=str(folder / "weights")), SIZE + MIB
    process = psutil.Process()
    places: dict[str, Any] = {"weights": weights, "packed": folder / "packed", "host_memory_bytes": 100 * MIB}
    async with running_node(folder, launcher=FakeLauncher(), **places) as node:
        before, tables_before = process.memory_info(), page_tables()
        for number in range(10):
            assert node.supervisor.execute(f"stage-{number}", Stage(revision(number), f"m{number}", SIZE)).is_accepted
        await wait_staged(node, 10)
        after = process.memory_info()
        beyond = (after.rss - after.shared) - (before.rss - before.shared) + page_tables() - tables_before
        assert beyond <= 10 * 5 * MIB
        assert 10 * packed_bytes <= after.shared - before.shared <= 10 * (packed_bytes + MIB)
        for number, path in enumerate(paths):
            assert in_memory(path / WEIGHTS) == packed_bytes
            assert in_memory(folder / "weights" / revision(number) / "model.safetensors") == 0
            assert in_memory(folder / "weights" / revision(number) / "config.json") == 2
        for view in node.supervisor.view().staged:
            assert packed_bytes < view.resident_bytes == view.memory_bytes < packed_bytes + MIB // 4
        assert drop_unused(folder / "packed", kept=0) == 0, "they are in use"
        await node.supervisor.end_all(1)
        assert node.supervisor.view().host.booked_bytes == 0
    assert drop_unused(folder / "packed", kept=0) == 10


async def test_what_is_held_follows_what_a_start_would_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.worker.supervisor.staging._LOOK_SECONDS", 0.05)
    make_models(folder / "weights", 1)
    checkpoint = folder / "weights" / revision(0) / "model.safetensors"
    weights, root = FakeWeights(path=str(folder / "weights")), folder / "packed"
    places: dict[str, Any] = {"weights": weights, "packed": root, "host_memory_bytes": 100 * MIB}
    async with running_node(folder, launcher=FakeLauncher(), **places) as node:
        assert node.supervisor.execute("one", Stage(revision(0), "a", SIZE)).is_accepted
        await wait_staged(node, 1)
        assert in_memory(checkpoint) == SIZE
        # A start packed it, and another one proved it.
        path = pack(root, 0)
        view = await wait_held(node, lambda view: view.memory_bytes > SIZE + MIB)
        assert node.supervisor.view().host.booked_bytes == view.memory_bytes
        await wait_held(node, lambda view: view.resident_bytes == view.memory_bytes > SIZE + MIB)
        forget(checkpoint)
        assert in_memory(checkpoint) == 0, "nobody holds it any more"
        assert in_memory(path / WEIGHTS) == SIZE + MIB
        # With other settings, starts map another one.
        pack(root, 0, SIZE + 2 * MIB, flags="float32")
        await wait_held(node, lambda view: view.resident_bytes == view.memory_bytes > SIZE + 2 * MIB)
        # It is damaged, and made anew; and then none is any good.
        drop(path)
        for left in root.iterdir():
            drop(left)
        await wait_held(node, lambda view: view.resident_bytes == view.memory_bytes == SIZE + 2)
        assert in_memory(checkpoint) == SIZE
        mark_unfit(pack(root, 0))
        await asyncio.sleep(0.2)
        assert node.supervisor.view().host.booked_bytes == SIZE + 2
        await node.supervisor.end_all(1)
    assert sorted(weights.released) == sorted(weights.borrowed)


async def test_where_packed_weights_have_no_room_the_checkpoint_is_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.worker.supervisor.staging._LOOK_SECONDS", 0.05)
    make_models(folder / "weights", 1)
    weights, root = FakeWeights(path=str(folder / "weights")), folder / "packed"
    places: dict[str, Any] = {"weights": weights, "packed": root, "host_memory_bytes": SIZE + MIB // 2}
    async with running_node(folder, launcher=FakeLauncher(), **places) as node:
        for number in range(2):
            if not number:
                pack(root, 0)
            assert node.supervisor.execute(f"in {number}", Stage(revision(0), "a", SIZE)).is_accepted
            await wait_held(node, lambda view: view.resident_bytes == view.memory_bytes == SIZE + 2)
            pack(root, 0)
            await asyncio.sleep(0.2)
            assert node.supervisor.view().host.booked_bytes == SIZE + 2
            assert node.supervisor.execute(f"out {number}", Unstage(revision(0))).is_accepted
            await wait_released(node)
            for left in root.iterdir():
                drop(left)
        await node.supervisor.end_all(1)


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


def test_pages_that_can_not_be_read_are_an_error_and_no_signal(tmp_path: Path) -> None:
    """What lies behind the end of a file that shrank fails as a bad sector does: EFAULT, or SIGBUS for who touches."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    files = ResidentFiles([path])
    os.truncate(path, 0)
    with pytest.raises(OSError, match="can't read"):
        files.bring_in()
    files.close()


def test_a_file_that_is_not_there_is_an_error_and_leaves_nothing_mapped(tmp_path: Path) -> None:
    present = tmp_path / "present"
    present.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        ResidentFiles([present, tmp_path / "absent"])
