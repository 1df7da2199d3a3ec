"""The descriptor socket: hands files in memory to the holders of leases, and takes them back after a restart.

Who may connect is decided by the user id that the kernel tells (SO_PEERCRED), what they get by the lease's id, which is
a capability. The contract (`descriptor_message.proto`) has the conversation.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from helios.api.storage.v1 import descriptor_message_pb2 as pb
from helios.mesh.errors import (
    DeadlineExceeded,
    HeliosError,
    InvalidRequest,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from helios.mesh.sealed import MAX_PACKET_FILES, DescriptorListener, DescriptorSocket, close_all
from helios.mesh.tasks import task_scope
from helios.storage.leases import Lease
from helios.storage.manifest import Digest, ManifestEntry
from helios.storage.memory.memory_tier import MemoryTier

log = structlog.get_logger()

_PACKET_SECONDS: Final = 10.0
"""A peer that is silent for so long is dropped: packets are a few kilobytes and never wait for a disk."""

_STRANGER_SECONDS: Final = 0.2
"""So long a packet of a user who is not allowed is awaited: it was sent as soon as the socket was connected."""

_PAUSE_SECONDS: Final = 0.5
"""Between two tries to begin a conversation where the kernel refuses: other conversations end in milliseconds."""

_MAX_CONVERSATIONS: Final = 32
"""At a time; others wait in the socket's backlog. Each holds a few descriptors for milliseconds."""

_MAX_FILES: Final = 4096
"""Of a lease; what is handed back is held open, and processes have a limit on that."""


class DescriptorServer:
    """Serves one listener; used on one event loop."""

    def __init__(
        self,
        listener: DescriptorListener,
        tiers: Mapping[str, MemoryTier],
        *,
        find_lease: Callable[[str], Lease],
        renew: Callable[[str], Awaitable[Lease]],
        users: Collection[int],
    ) -> None:
        """Takes the tiers in memory by name, what finds and renews a lease that lives, and who may connect."""
        self._listener = listener
        self._tiers = tiers
        self._find_lease = find_lease
        self._renew = renew
        self._users = frozenset(users)
        self._slots = asyncio.Semaphore(_MAX_CONVERSATIONS)

    async def run(self) -> None:
        """Serves until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                try:
                    connected = await self._accept()
                except BaseException:
                    self._slots.release()
                    raise
                task = group.create_task(self._converse(connected), name="descriptor conversation")
                task.add_done_callback(lambda _: self._slots.release())

    async def _accept(self) -> DescriptorSocket:
        while True:
            try:
                return await self._listener.accept()
            except OSError as error:
                # Too many open files, say: whoever connected stays in the backlog meanwhile.
                log.warning("no conversation about descriptors can begin", error=error.strerror)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _converse(self, connected: DescriptorSocket) -> None:
        with connected:
            try:
                await self._answer(connected)
            except (HeliosError, OSError) as error:
                # An OSError here is one of this process's descriptors: too many of them, or too little memory.
                refusal = error if isinstance(error, HeliosError) else Unavailable(f"no descriptors: {error.strerror}")
                log.warning("descriptors refused", reason=refusal.reason, error=refusal.message)
                await _refuse(connected, refusal)

    async def _answer(self, connected: DescriptorSocket) -> None:
        if (user := connected.peer_user()) not in self._users:
            await _drain(connected)
            raise PermissionDenied("this user may not take files in memory", metadata={"user": str(user)})
        message, descriptors = await _receive(connected)
        if message.action == pb.DESCRIPTOR_ACTION_TAKE and not descriptors:
            await self._lend(connected, self._find_lease(message.lease_id))
        elif message.action == pb.DESCRIPTOR_ACTION_GIVE:
            await self._take_back(connected, message, descriptors)
        else:
            close_all(descriptors)
            raise InvalidRequest("the packet asks for nothing that is known", reason="BAD_PACKET")

    async def _lend(self, connected: DescriptorSocket, lease: Lease) -> None:
        tier = self._tier(lease)
        resident = tier.inventory.find(lease.revision)
        if resident is None:
            raise PreconditionFailed("the files are not in memory", reason="NOT_IN_MEMORY")
        entries = resident.manifest.entries
        for start in range(0, len(entries), MAX_PACKET_FILES):
            batch = entries[start : start + MAX_PACKET_FILES]
            descriptors: list[int] = []
            try:
                for entry in batch:
                    descriptors.append(tier.duplicate(entry.digest))  # noqa: PERF401 - what came before a failure is closed
                answer = pb.DescriptorMessage(
                    files=map(file_to_proto, batch), is_last=start + len(batch) == len(entries)
                )
                async with asyncio.timeout(_PACKET_SECONDS):
                    await connected.send(answer.SerializeToString(), descriptors)
            except TimeoutError as error:
                raise DeadlineExceeded("the holder does not take its files") from error
            finally:
                close_all(descriptors)

    async def _take_back(
        self, connected: DescriptorSocket, message: pb.DescriptorMessage, descriptors: list[int]
    ) -> None:
        files: dict[Digest, int] = {}
        owned = list(descriptors)
        try:
            lease = self._find_lease(message.lease_id)
            while True:
                if len(descriptors) != len(message.files) or len(owned) > _MAX_FILES:
                    raise InvalidRequest("each file has one descriptor, and there is a bound", reason="BAD_PACKET")
                for file, descriptor in zip(message.files, descriptors, strict=True):
                    files[Digest(file.hash, file.size_bytes)] = descriptor
                if message.is_last:
                    break
                message, descriptors = await _receive(connected)
                owned += descriptors
            async with task_scope() as group:
                group.create_task(self._keep(lease), name="renew lease")
                await self._tier(lease).take_back(lease.revision, files)
        finally:
            close_all(owned)
        await connected.send(pb.DescriptorMessage(is_last=True).SerializeToString())

    async def _keep(self, lease: Lease) -> None:
        """Renews a lease while its files are hashed, after those of others: its holder only waits for the answer."""
        try:
            while True:
                await self._renew(lease.id)
                await asyncio.sleep(lease.ttl.total_seconds() / 3)
        except HeliosError as error:
            log.warning("lease ended while its files were handed back", reason=error.reason)

    def _tier(self, lease: Lease) -> MemoryTier:
        if (tier := self._tiers.get(lease.tier)) is None:
            raise PreconditionFailed("the lease is of files on a disk", reason="NOT_IN_MEMORY")
        return tier


def file_to_proto(entry: ManifestEntry) -> pb.SealedFile:
    """Writes a file of a revision."""
    return pb.SealedFile(path=entry.path, hash=entry.digest.hash, size_bytes=entry.digest.size_bytes)


async def _receive(connected: DescriptorSocket) -> tuple[pb.DescriptorMessage, list[int]]:
    try:
        async with asyncio.timeout(_PACKET_SECONDS):
            payload, descriptors = await connected.receive()
    except TimeoutError as error:
        raise DeadlineExceeded("the holder is silent") from error
    try:
        return pb.DescriptorMessage.FromString(payload), descriptors
    except DecodeError as error:
        close_all(descriptors)
        raise InvalidRequest("the packet can't be read", reason="BAD_PACKET") from error


async def _drain(connected: DescriptorSocket) -> None:
    """Takes one packet that is here or on its way: a socket that is closed with it unread takes the answer back."""
    try:
        async with asyncio.timeout(_STRANGER_SECONDS):
            _, descriptors = await connected.receive()
    except (HeliosError, TimeoutError):
        return
    close_all(descriptors)


async def _refuse(connected: DescriptorSocket, error: HeliosError) -> None:
    answer = pb.DescriptorMessage(is_last=True, error_reason=error.reason, error_message=error.message)
    try:
        async with asyncio.timeout(_PACKET_SECONDS):
            await connected.send(answer.SerializeToString())
    except (HeliosError, OSError):
        # Who does not listen needs no answer.
        return
