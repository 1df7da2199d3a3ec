"""Files in sealed memory: handed over as descriptors, taken back after a restart only when they are right."""

import asyncio
import fcntl
import mmap
import os
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from helios.api.storage.v1 import descriptor_message_pb2 as pb
from helios.mesh.errors import Corrupted, DigestMismatch, DiskFull, InvalidRequest, NotFound, PreconditionFailed
from helios.mesh.sealed import DescriptorListener, check_sealed, close_all, connect, make_memory_file, seal
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import FetchToken
from helios.storage.manifest import Digest
from helios.storage.materializer import Loan, Materializer, open_materializer
from helios.storage.memory.descriptor_server import DescriptorServer
from helios.storage.memory.memory_tier import MemoryTier
from helios.storage.scrub import ReadResult, read_memory
from helios.storage.sealed_views import SealedViews
from helios.storage.statistics import EvictionReason
from helios.storage.tiers import DiskRoom, TierKind, TierOptions
from tests.storage.harness import Shelf, digest_of, make_shelf
from tests.storage.local import SetClock, ShelfManifests, lend, tiers_of, use

MIB = 1 << 20
DISK = TierOptions("disk", TierKind.SSD, high_ratio=1, low_ratio=1)
MEMORY = TierOptions("memory", TierKind.MEMORY, 64 * MIB, high_ratio=1, low_ratio=1)
WAIT_SECONDS = 30.0


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk and a memory that nobody fills."""
    for name in ("blob_store.BlobStore", "memory.sealed_store.SealedStore"):
        monkeypatch.setattr(f"helios.storage.{name}.disk_room", lambda _: DiskRoom(1 << 40, 1 << 39))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return make_shelf(tmp_path / "shelf")


@dataclass(frozen=True)
class Node:
    """A materializer with a disk and sealed memory, its descriptor socket, and a holder's views."""

    materializer: Materializer
    memory: MemoryTier
    socket: str

    async def promoted(self, revision: str) -> Loan:
        """Uses a revision until it is in memory, and lends it from there."""
        await use(self.materializer, revision, times=3)
        await self.materializer.mover.look()
        assert tiers_of(self.materializer, revision) == ("memory", "disk")
        return await lend(self.materializer, revision)


@asynccontextmanager
async def node(
    directory: Path, shelf: Shelf, *, users: frozenset[int] | None = None, clock: SetClock | None = None
) -> AsyncIterator[Node]:
    disk = DiskTier(directory / "disk", fetch_thread_count=1, is_link_allowed=False, options=DISK)
    memory = MemoryTier(directory / "memory", options=MEMORY)
    async with AsyncExitStack() as stack:
        materializer = await stack.enter_async_context(
            open_materializer([disk, memory], ShelfManifests(shelf), clock=clock or SetClock())
        )
        listener = stack.enter_context(DescriptorListener(directory / "d.sock"))
        server = DescriptorServer(
            listener,
            {"memory": memory},
            find_lease=materializer.find_lease,
            renew=materializer.renew,
            users=frozenset({os.geteuid()}) if users is None else users,
        )
        async with asyncio.TaskGroup() as group:
            task = group.create_task(server.run(), name="descriptors")
            yield Node(materializer, memory, str(listener.path))
            task.cancel()


def weights(count: int = MIB) -> bytes:
    return save({"w": np.arange(count, dtype=np.float32)})


async def test_the_stock_library_opens_what_is_handed_over_and_nobody_can_write_it(
    tmp_path: Path, shelf: Shelf
) -> None:
    revision = shelf.add({"model.safetensors": weights(), "sub/config.json": b"{}"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
        assert loan.is_sealed
        views = SealedViews(tmp_path / "views")
        path = Path(await views.take(it.socket, loan.lease.id, revision))
        with safe_open(path / "model.safetensors", framework="numpy") as opened:
            assert opened.get_tensor("w")[-1] == MIB - 1
        assert (path / "sub" / "config.json").read_bytes() == b"{}"
        descriptor = os.open(path / "model.safetensors", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 4096, access=mmap.ACCESS_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1)
        os.close(descriptor)
        views.drop(revision)
        assert not path.exists()


async def test_readers_that_take_no_descriptors_find_the_files_by_path(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
        assert (loan.path / "w").read_bytes() == b"some bytes"


async def test_what_is_in_memory_is_given_up_and_its_holder_keeps_it(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
        views = SealedViews(tmp_path / "views")
        path = Path(await views.take(it.socket, loan.lease.id, revision))
        await it.materializer.release(loan.lease.id)
        assert await it.materializer.evict(revision) == 2 * len(b"some bytes")
        assert it.memory.inventory.used_bytes == 0
        assert (path / "w").read_bytes() == b"some bytes"
        with pytest.raises(PreconditionFailed, match="ended"):
            await views.take(it.socket, loan.lease.id, "sha256:" + "0" * 64)
        views.drop(revision)


async def test_only_the_users_that_are_allowed_and_only_by_a_lease_that_lives(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    clock = SetClock()
    async with node(tmp_path, shelf, clock=clock) as it:
        loan = await it.promoted(revision)
        with pytest.raises(PreconditionFailed) as refused:
            await SealedViews(tmp_path / "v").take(it.socket, "guessed", revision)
        assert refused.value.reason == "LEASE_NOT_FOUND"
        clock.advance(3600)
        with pytest.raises(PreconditionFailed) as refused:
            await SealedViews(tmp_path / "v").take(it.socket, loan.lease.id, revision)
        assert refused.value.reason == "LEASE_NOT_FOUND"
    other = tmp_path / "other"
    other.mkdir()
    async with node(other, shelf, users=frozenset({os.geteuid() + 1})) as it:
        loan = await it.promoted(revision)
        with pytest.raises(PreconditionFailed) as refused:
            await SealedViews(tmp_path / "v").take(it.socket, loan.lease.id, revision)
        assert refused.value.reason == "PERMISSION_DENIED"


async def test_after_a_restart_files_count_once_they_are_back_and_nothing_moves_before(
    tmp_path: Path, shelf: Shelf
) -> None:
    lent, other = shelf.add({"w": os.urandom(MIB), "v": b"v"}), shelf.add({"w": os.urandom(MIB)})
    views = SealedViews(tmp_path / "views")
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(lent)
        path = Path(await views.take(it.socket, loan.lease.id, lent))
        inode = (path / "w").stat().st_ino
        await use(it.materializer, other, times=9)
    async with node(tmp_path, shelf) as it:
        assert not it.memory.is_settled
        assert tiers_of(it.materializer, lent) == ("disk",)
        # Hot as it is, it is not promoted; and who wants what is expected back waits for it.
        await it.materializer.mover.look()
        assert tiers_of(it.materializer, other) == ("disk",)
        async with asyncio.TaskGroup() as group:
            second = group.create_task(lend(it.materializer, lent), name="second holder")
            resumed = group.create_task(
                it.materializer.materialize(lent, holder="test", ttl=None, lease_id=loan.lease.id), name="resume"
            )
            await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_SECONDS):
                await views.give_back(it.socket, loan.lease.id, lent)
                await asyncio.wait({second, resumed})
        assert second.result().is_sealed
        assert resumed.result().lease.id == loan.lease.id
        assert it.memory.is_settled
        assert tiers_of(it.materializer, lent) == ("memory", "disk")
        assert (second.result().path / "w").stat().st_ino == inode
        await it.materializer.mover.look()
        assert tiers_of(it.materializer, other) == ("memory", "disk")
        # Twice is as good as once.
        await views.give_back(it.socket, loan.lease.id, lent)
        views.drop(lent)


async def test_what_several_holders_hand_back_is_checked_side_by_side_and_once(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = os.urandom(MIB)
    revisions = [shelf.add({"w": os.urandom(MIB), "shared": shared}) for _ in range(2)]
    holders = [SealedViews(tmp_path / f"views-{number}") for number in range(2)]
    # Two threads, whatever machine this is.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    async with node(tmp_path, shelf) as it:
        loans = [await it.promoted(revision) for revision in revisions]
        for views, loan in zip(holders, loans, strict=True):
            await views.take(it.socket, loan.lease.id, loan.lease.revision)
    meeting, checked = threading.Barrier(2, timeout=WAIT_SECONDS), list[int]()

    def read(descriptor: int, token: FetchToken) -> ReadResult:
        # The first two files meet here, or nobody ever comes through.
        checked.append(descriptor)
        if len(checked) <= 2:
            meeting.wait()
        return read_memory(descriptor, token)

    monkeypatch.setattr("helios.storage.memory.memory_tier.read_memory", read)
    async with node(tmp_path, shelf) as it, asyncio.timeout(2 * WAIT_SECONDS):
        async with asyncio.TaskGroup() as group:
            for views, loan in zip(holders, loans, strict=True):
                group.create_task(views.give_back(it.socket, loan.lease.id, loan.lease.revision))
        assert it.memory.is_settled
        assert len(checked) == 3, "the file of both was read once"
        for revision in revisions:
            assert tiers_of(it.materializer, revision) == ("memory", "disk")
    for views, loan in zip(holders, loans, strict=True):
        views.drop(loan.lease.revision)


async def test_what_nobody_hands_back_is_lost_with_its_leases_when_the_grace_is_over(
    tmp_path: Path, shelf: Shelf
) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
    async with node(tmp_path, shelf) as it:
        await it.materializer.settle(0.0)
        assert it.memory.is_settled
        with pytest.raises(NotFound):
            await it.materializer.materialize(revision, holder="test", ttl=None, lease_id=loan.lease.id)
        assert not (await lend(it.materializer, revision)).is_sealed
    async with node(tmp_path, shelf) as it:
        assert it.memory.is_settled


async def test_a_full_disk_keeps_nobody_waiting_for_what_is_lost(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
    async with node(tmp_path, shelf) as it:

        def refuse(*_: object, **__: object) -> None:
            raise DiskFull("no room for rows")

        with monkeypatch.context() as full:
            full.setattr("helios.storage.index.Index.delete", refuse)
            full.setattr("helios.storage.index.Index.delete_leases", refuse)
            await it.materializer.settle(0.0)
        assert it.memory.is_settled
        with pytest.raises(NotFound):
            await it.materializer.materialize(revision, holder="test", ttl=None, lease_id=loan.lease.id)
        assert not (await lend(it.materializer, revision)).is_sealed


async def test_what_was_not_lent_is_gone_with_the_agent(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        await it.materializer.release((await it.promoted(revision)).lease.id)
    async with node(tmp_path, shelf) as it:
        assert it.memory.is_settled
        assert tiers_of(it.materializer, revision) == ("disk",)


def memory_file(content: bytes, *, is_sealed: bool = True) -> int:
    descriptor = make_memory_file("test")
    os.write(descriptor, content)
    if is_sealed:
        seal(descriptor)
    return descriptor


async def test_files_that_are_not_sealed_or_not_right_are_refused(tmp_path: Path, shelf: Shelf) -> None:
    content = os.urandom(MIB)
    revision, digest = shelf.add({"w": content}), digest_of(content)
    async with node(tmp_path, shelf) as it:
        await it.promoted(revision)
    async with node(tmp_path, shelf) as it:
        on_disk = os.open(shelf.blob_path(digest), os.O_RDONLY)
        shorter = memory_file(content[:-1])
        writable = memory_file(content, is_sealed=False)
        flipped = memory_file(content[:-1] + bytes([content[-1] ^ 1]))
        right = memory_file(content)
        for descriptor in (on_disk, shorter, writable):
            with pytest.raises(Corrupted) as refused:
                await it.memory.take_back(revision, {digest: descriptor})
            assert refused.value.reason == "NOT_SEALED"
        with pytest.raises(DigestMismatch):
            await it.memory.take_back(revision, {digest: flipped})
        with pytest.raises(InvalidRequest):
            await it.memory.take_back(revision, {Digest("0" * 64, MIB): right})
        assert it.memory.inventory.used_bytes == 0
        assert not it.memory.is_settled
        await it.memory.take_back(revision, {digest: right})
        assert it.memory.inventory.used_bytes == MIB
        close_all([on_disk, shorter, writable, flipped, right])


def open_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_packets_that_say_nothing_end_the_conversation_and_leak_nothing(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        loan = await it.promoted(revision)
        before = open_count()
        stray = memory_file(b"x")
        action = pb.DESCRIPTOR_ACTION_GIVE
        for message in (
            pb.DescriptorMessage(is_last=True),
            pb.DescriptorMessage(action=action, lease_id=loan.lease.id, is_last=True),
            pb.DescriptorMessage(action=action, lease_id="guessed", files=[pb.SealedFile(hash="0")], is_last=True),
        ):
            with connect(it.socket) as connected:
                await connected.send(message.SerializeToString(), [stray])
                async with asyncio.timeout(WAIT_SECONDS):
                    answer, _ = await connected.receive()
            assert pb.DescriptorMessage.FromString(answer).error_reason
        os.close(stray)
        async with asyncio.timeout(WAIT_SECONDS):
            while open_count() > before:
                await asyncio.sleep(0.01)


async def test_a_damaged_copy_is_found_by_scrubbing_and_dropped(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(MIB)
    revision = shelf.add({"w": content})
    async with node(tmp_path, shelf) as it:
        await it.materializer.release((await it.promoted(revision)).lease.id)
        room = next(room for room in it.materializer.rooms if room.tier is it.memory)
        assert await it.materializer.scrubber.scrub_one(room, digest_of(content)) is None
        # Sealed bytes can't be changed from here; memory that fails is stood in for by another file.
        it.memory.store.keep(digest_of(content), memory_file(content[:-1] + b"?"))  # type: ignore[attr-defined]
        found = await it.materializer.scrubber.scrub_one(room, digest_of(content))
        assert found is not None
        assert it.memory.statistics.evicted_count == {EvictionReason.CORRUPT: 1}
        assert tiers_of(it.materializer, revision) == ("disk",)


async def test_a_scrub_goes_on_when_what_it_is_about_to_read_is_given_up(tmp_path: Path, shelf: Shelf) -> None:
    revision = shelf.add({"w": b"some bytes"})
    async with node(tmp_path, shelf) as it:
        await it.materializer.release((await it.promoted(revision)).lease.id)
        steps = it.materializer.scrubber.scrub_all(bytes_per_second=0)
        total_bytes = (await anext(steps)).total_bytes
        assert total_bytes == 2 * len(b"some bytes"), "in memory and on the disk"
        await it.materializer.evict(revision)
        last = [step async for step in steps][-1]
        assert (last.done_bytes, last.found) == (total_bytes, ())


def test_a_file_is_sealed_for_good() -> None:
    descriptor = memory_file(b"some bytes")
    check_sealed(descriptor, 10)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)
    os.close(descriptor)
