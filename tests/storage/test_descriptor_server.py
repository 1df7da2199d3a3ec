"""The descriptor socket when descriptors are short, and to those who may not have any."""

import asyncio
import errno
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from helios.api.storage.v1 import descriptor_message_pb2 as pb
from helios.api.storage.v1 import storage_service_pb2 as storage
from helios.mesh.channel import Dialer
from helios.mesh.errors import Unavailable
from helios.mesh.sealed import DescriptorListener, connect, make_memory_file, seal
from helios.mesh.tasks import task_scope
from helios.storage.__main__ import raise_file_limit
from helios.storage.client import Lent, _Holding
from helios.storage.leases import Lease
from helios.storage.manifest import Digest
from helios.storage.memory.descriptor_server import DescriptorServer
from helios.storage.memory.memory_tier import MemoryTier
from helios.storage.sealed_views import SealedViews

REVISION = "sha256:" + "1" * 64
WAIT_SECONDS = 20.0
LEFT_SECONDS = 0.5
"""Of a lease; nothing is awaited before its first look."""


class Memory:
    """A tier with a revision of two files; descriptors run out after `left` of them."""

    def __init__(self) -> None:
        self.file = make_memory_file("test")
        os.write(self.file, b"x")
        seal(self.file)
        self.left = 100
        self.renewal_count = 0
        self.is_renewed = asyncio.Event()
        digest = Digest("2" * 64, 1)
        entries = [SimpleNamespace(path=path, digest=digest) for path in ("a", "b")]
        self.inventory = SimpleNamespace(find=lambda _: SimpleNamespace(manifest=SimpleNamespace(entries=entries)))

    def duplicate(self, _: Digest) -> int:
        if not self.left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.left -= 1
        return os.dup(self.file)

    async def take_back(self, revision: str, files: object) -> None:
        """Takes as long as it takes to renew the lease twice."""
        assert (revision, files) == (REVISION, {})
        await self.is_renewed.wait()

    async def renew(self, lease_id: str) -> Lease:
        self.renewal_count += 1
        if self.renewal_count == 2:
            self.is_renewed.set()
        return make_lease(lease_id)


def make_lease(lease_id: str) -> Lease:
    return Lease(lease_id, REVISION, "test", timedelta(seconds=0.03), datetime.now(UTC), "memory")


@asynccontextmanager
async def serving(directory: Path, *, users: frozenset[int] | None = None) -> AsyncIterator[tuple[Memory, str]]:
    memory = Memory()
    with DescriptorListener(directory / "d.sock") as listener:
        server = DescriptorServer(
            listener,
            {"memory": cast(MemoryTier, memory)},
            find_lease=make_lease,
            renew=memory.renew,
            users=users or frozenset({os.geteuid()}),
        )
        async with asyncio.timeout(WAIT_SECONDS), task_scope() as group:
            group.create_task(server.run(), name="descriptors")
            yield memory, str(listener.path)
    os.close(memory.file)


def open_count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_process_without_descriptors_refuses_one_conversation_and_serves_the_next(tmp_path: Path) -> None:
    views = SealedViews(tmp_path / "views")
    async with serving(tmp_path) as (memory, socket):
        before = open_count()
        memory.left = 1
        with pytest.raises(Unavailable, match="Too many open files"):
            await views.take(socket, "lease", REVISION)
        while open_count() > before:
            await asyncio.sleep(0.005)
        memory.left = 100
        path = Path(await views.take(socket, "lease", REVISION))
        assert (path / "b").read_bytes() == b"x"
        views.drop(REVISION)


async def test_who_connects_while_there_are_no_descriptors_is_served_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.storage.memory.descriptor_server._PAUSE_SECONDS", 0.01)
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(3)]
    accept = DescriptorListener.accept

    async def refuse(self: DescriptorListener) -> Any:
        if failures:
            raise failures.pop()
        return await accept(self)

    monkeypatch.setattr(DescriptorListener, "accept", refuse)
    views = SealedViews(tmp_path / "views")
    async with serving(tmp_path) as (_, socket):
        await views.take(socket, "lease", REVISION)
        views.drop(REVISION)
    assert not failures


async def test_a_user_who_may_not_is_refused_without_being_listened_to(tmp_path: Path) -> None:
    async with serving(tmp_path, users=frozenset({os.geteuid() + 1})) as (_, socket):
        with connect(socket) as silent:
            payload, _ = await silent.receive()
    assert pb.DescriptorMessage.FromString(payload).error_reason == "PERMISSION_DENIED"


async def test_a_lease_is_renewed_while_its_files_are_checked(tmp_path: Path) -> None:
    async with serving(tmp_path) as (memory, socket):
        with connect(socket) as holder:
            request = pb.DescriptorMessage(action=pb.DESCRIPTOR_ACTION_GIVE, lease_id="lease", is_last=True)
            await holder.send(request.SerializeToString())
            payload, _ = await holder.receive()
        assert pb.DescriptorMessage.FromString(payload) == pb.DescriptorMessage(is_last=True)
        assert memory.renewal_count == 2


async def test_a_holder_waits_for_the_check_beyond_what_was_left_of_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holding = _Holding(
        cast(Dialer, None), REVISION, holder="test", ttl_seconds=60.0, on_progress=None, views=cast(SealedViews, None)
    )
    lent = Lent(storage.Ready(path="/v", lease_id="lease"), keep=True)
    lent.descriptor_socket = "/d.sock"

    class Views:
        async def give_back(self, *_: str) -> None:
            await asyncio.sleep(LEFT_SECONDS + 0.1)

    async def resume(_: str) -> storage.Ready:
        await asyncio.sleep(0)
        return storage.Ready(path="/v", lease_id="lease")

    monkeypatch.setattr(holding, "_views", Views())
    monkeypatch.setattr(holding, "_open", resume)
    holding._safe_until = time.monotonic() + LEFT_SECONDS
    assert await holding._resume(lent, cause=Unavailable("it was restarted"))


async def test_a_view_that_could_not_be_made_is_not_in_the_way_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = SealedViews(tmp_path / "views")
    link = Path.symlink_to

    def refuse(self: Path, target: str) -> None:
        if self.name == "b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(self, target)

    async with serving(tmp_path) as (_, socket):
        with monkeypatch.context() as full:
            full.setattr(Path, "symlink_to", refuse)
            with pytest.raises(Unavailable) as refused:
                await views.take(socket, "lease", REVISION)
        assert refused.value.reason == "VIEW_FAILED"
        assert list((tmp_path / "views").iterdir()) == []
        await views.take(socket, "lease", REVISION)
        views.drop(REVISION)


def test_the_agent_may_open_as_many_files_as_the_kernel_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
