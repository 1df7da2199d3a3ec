"""Directories of files in memory, for the processes of a holder: what the storage agent hands over as descriptors.

A holder (a worker's supervisor) keeps the descriptors open for as long as it holds the lease, and shows them to its
replicas as a directory of links to `/proc/<its pid>/fd/<n>`, which any library opens as it opens files, if it runs as
the same user. So the pages stay where they are whatever becomes of the agent, and after an agent's restart the holder
hands the descriptors back.
"""

import asyncio
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from google.protobuf.message import DecodeError

from helios.api.storage.v1 import descriptor_message_pb2 as pb
from helios.mesh.errors import Corrupted, HeliosError, PreconditionFailed, Unavailable
from helios.mesh.sealed import MAX_PACKET_FILES, DescriptorSocket, check_sealed, close_all, connect

_TAKE_SECONDS: Final = 10.0
"""Descriptors come in a millisecond."""

_CHECK_SECONDS: Final = 600.0
"""The agent hashes what is handed back, at 1 to 2 GB/s a core."""


@dataclass(slots=True)
class _Held:
    path: Path
    files: list[tuple[pb.SealedFile, int]]
    holder_count: int = 1


class SealedViews:
    """Views of one process, by revision, below a directory of its own; used on one event loop."""

    def __init__(self, directory: Path) -> None:
        """Takes the directory and removes what an earlier process left there: links to descriptors that are gone."""
        self._directory = directory.absolute()
        self._held: dict[str, _Held] = {}
        # One conversation at a time: two holders of one revision make one view.
        self._taking = asyncio.Lock()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def take(self, socket_path: str, lease_id: str, revision: str) -> str:
        """Takes a lease's files from the agent; returns the directory that shows them, until `drop`.

        Raises:
            HeliosError: What the agent answered; Unavailable: it does not answer; Corrupted: NOT_SEALED.
        """
        async with self._taking:
            if (held := self._held.get(revision)) is not None:
                held.holder_count += 1
                return str(held.path)
            try:
                async with asyncio.timeout(_TAKE_SECONDS):
                    files = await _take(socket_path, lease_id)
            except TimeoutError as error:
                raise Unavailable("the storage agent does not hand its files over") from error
            try:
                path = self._show(revision, files)
            except OSError as error:
                close_all([descriptor for _, descriptor in files])
                raise Unavailable(f"files in memory can't be shown: {error.strerror}", reason="VIEW_FAILED") from error
            self._held[revision] = _Held(path, files)
            return str(path)

    async def give_back(self, socket_path: str, lease_id: str, revision: str) -> None:
        """Hands a revision's files back to an agent that was started anew; nothing happens where it has them.

        Raises:
            HeliosError: What the agent answered; Unavailable: it does not answer.
        """
        files = self._held[revision].files
        with connect(socket_path) as connected:
            for start in range(0, len(files), MAX_PACKET_FILES):
                batch = files[start : start + MAX_PACKET_FILES]
                message = pb.DescriptorMessage(
                    action=pb.DESCRIPTOR_ACTION_GIVE,
                    lease_id=lease_id,
                    files=[file for file, _ in batch],
                    is_last=start + len(batch) == len(files),
                )
                await connected.send(message.SerializeToString(), [descriptor for _, descriptor in batch])
            async with asyncio.timeout(_CHECK_SECONDS):
                await _receive(connected)

    def drop(self, revision: str) -> None:
        """Lets go of a revision, once for each `take`; the last closes its files. Processes that map them keep them."""
        held = self._held[revision]
        held.holder_count -= 1
        if not held.holder_count:
            del self._held[revision]
            shutil.rmtree(held.path, ignore_errors=True)
            close_all([descriptor for _, descriptor in held.files])

    def _show(self, revision: str, files: Sequence[tuple[pb.SealedFile, int]]) -> Path:
        path = self._directory / revision.replace(":", "-")
        try:
            self._link(path, files)
        except OSError:
            # What is left of it would be in the way of the next one.
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path

    @staticmethod
    def _link(path: Path, files: Sequence[tuple[pb.SealedFile, int]]) -> None:
        for file, descriptor in files:
            relative = PurePosixPath(file.path)
            # The agent checked its manifest; this process need not trust that a path stays inside.
            if relative.is_absolute() or ".." in relative.parts:
                raise OSError(None, f"the path {file.path!r} leads out of the revision")
            link = path / relative
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")


async def _take(socket_path: str, lease_id: str) -> list[tuple[pb.SealedFile, int]]:
    files: list[tuple[pb.SealedFile, int]] = []
    try:
        with connect(socket_path) as connected:
            request = pb.DescriptorMessage(action=pb.DESCRIPTOR_ACTION_TAKE, lease_id=lease_id, is_last=True)
            await connected.send(request.SerializeToString())
            is_last = False
            while not is_last:
                answer, descriptors = await _receive(connected)
                files += zip(answer.files, descriptors, strict=True)
                is_last = answer.is_last
        for file, descriptor in files:
            check_sealed(descriptor, file.size_bytes)
    except BaseException:
        close_all([descriptor for _, descriptor in files])
        raise
    return files


async def _receive(connected: DescriptorSocket) -> tuple[pb.DescriptorMessage, list[int]]:
    payload, descriptors = await connected.receive()
    try:
        answer = pb.DescriptorMessage.FromString(payload)
    except DecodeError as error:
        close_all(descriptors)
        raise Unavailable("the storage agent's answer can't be read") from error
    if answer.error_reason or len(answer.files) != len(descriptors):
        close_all(descriptors)
        raise _error(answer)
    return answer, descriptors


def _error(answer: pb.DescriptorMessage) -> HeliosError:
    if not answer.error_reason:
        return Corrupted("the storage agent handed over other files than it said", reason="NOT_SEALED")
    kinds = {"NOT_SEALED": Corrupted, "DIGEST_MISMATCH": Corrupted, Unavailable.default_reason: Unavailable}
    return kinds.get(answer.error_reason, PreconditionFailed)(answer.error_message, reason=answer.error_reason)
