"""Sealed memory files (memfd), and the sockets on which processes hand them to each other.

A memory file has no name and lives as long as somebody has it open. Once it is sealed nobody can write, grow or shrink
it, neither by a descriptor nor by a mapping, and no seal comes off: who holds one that was verified holds verified
bytes. Any library opens it by path, as `/proc/<pid>/fd/<n>` of a process of the same user.
"""

import array
import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from helios.mesh.errors import Corrupted, InvalidRequest, Unavailable

MAX_PACKET_FILES: Final = 64
"""Descriptors in one packet; the kernel takes 253 (SCM_MAX_FD)."""

SOCKET_PATH_LIMIT: Final = 107
"""Bytes of a unix socket's path (sockaddr_un, without its final zero)."""

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_PACKET_BYTES: Final = 64 << 10
"""64 files with paths of a few hundred bytes take a third of it; the kernel's bound is its socket buffer, 208 KiB."""


def make_memory_file(name: str) -> int:
    """Makes an empty memory file that can be sealed; returns its descriptor, which the caller owns. Raises OSError."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(descriptor: int) -> None:
    """Ends all changes to a memory file. Raises OSError: somebody has it mapped for writing."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def check_sealed(descriptor: int, size_bytes: int) -> None:
    """Checks that a descriptor is a memory file of this size that can't change any more.

    Raises:
        Corrupted: NOT_SEALED.
    """
    try:
        is_sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        # EINVAL: no file of memory at all.
        is_sealed = False
    actual_bytes = os.fstat(descriptor).st_size
    if not is_sealed or actual_bytes != size_bytes:
        raise Corrupted(
            "a file that was handed over is not sealed, or has another size",
            reason="NOT_SEALED",
            metadata={"size_bytes": str(size_bytes), "actual_bytes": str(actual_bytes)},
        )


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


class DescriptorSocket:
    """One end of a conversation in packets with descriptors. A context manager; used on one event loop."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes a connected unix socket of type SOCK_SEQPACKET, and closes it in the end."""
        connected.setblocking(False)
        self._socket = connected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def peer_user(self) -> int:
        """The user id of the process that connected, as the kernel says."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", credentials)
        return int(user)

    async def send(self, payload: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends one packet; the descriptors stay the caller's, and may be closed afterwards.

        Raises:
            Unavailable: The peer is gone.
        """
        # Not socket.send_fds, which sends an empty array where there is none, and which the kernel refuses.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while True:
            try:
                self._socket.sendmsg([payload], rights)
                return
            except BlockingIOError:
                await _ready(self._socket, is_writing=True)
            except OSError as error:
                raise Unavailable(f"files can't be handed over: {error.strerror}") from error

    async def receive(self) -> tuple[bytes, list[int]]:
        """Waits for a packet; the caller owns its descriptors.

        Raises:
            Unavailable: The peer is gone.
            InvalidRequest: The packet is too large, or has too many descriptors.
        """
        while (received := self._receive_nowait()) is None:
            await _ready(self._socket, is_writing=False)
        payload, descriptors, flags = received
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(descriptors)
            raise InvalidRequest("a packet is too large, or the limit of open files is reached", reason="BAD_PACKET")
        if not payload:
            close_all(descriptors)
            raise Unavailable("the other side ended the conversation")
        return payload, descriptors

    def _receive_nowait(self) -> tuple[bytes, list[int], int] | None:
        try:
            payload, descriptors, flags, _ = socket.recv_fds(
                self._socket, _MAX_PACKET_BYTES, MAX_PACKET_FILES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise Unavailable(f"files can't be taken: {error.strerror}") from error
        return payload, list(descriptors), flags


class DescriptorListener:
    """A listening unix socket in the file system, for this user and group root alone (mode 0600). A context manager."""

    def __init__(self, path: Path) -> None:
        """Binds; a socket that an earlier process left is replaced.

        Raises:
            InvalidRequest: The path is too long for a socket.
            OSError: It can't be bound.
        """
        check_socket_path(path)
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(64)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def allow_everyone(self) -> None:
        """Lets other users connect; who they are is asked of each."""
        self.path.chmod(0o666)

    async def accept(self) -> DescriptorSocket:
        """Waits for a connection. Raises OSError: no descriptors are left, say."""
        while True:
            try:
                connected, _ = self._socket.accept()
                return DescriptorSocket(connected)
            except BlockingIOError:
                await _ready(self._socket, is_writing=False)


def connect(path: str) -> DescriptorSocket:
    """Connects to a listener; never waits.

    Raises:
        Unavailable: Nobody listens, or too many connect at once.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.setblocking(False)
    try:
        connected.connect(path)
    except OSError as error:
        connected.close()
        raise Unavailable(f"the socket for files in memory can't be reached: {error.strerror}") from error
    return DescriptorSocket(connected)


def check_socket_path(path: Path) -> None:
    """Raises InvalidRequest where a path is too long for a unix socket."""
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidRequest(
            f"a unix socket's path has at most {SOCKET_PATH_LIMIT} bytes", metadata={"path": str(path)}
        )


async def _ready(waiting: socket.socket, *, is_writing: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if is_writing else (loop.add_reader, loop.remove_reader)
    add(waiting.fileno(), wake)
    try:
        await future
    finally:
        remove(waiting.fileno())
