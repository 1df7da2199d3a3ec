"""Bytes on their way to the registry: files that a crash, or a caller who left, does not cost.

    <state>/downloads/<key>             a file as far as it came, written in ranges
    <state>/downloads/<key>.journal     which ranges are there, and their hashes

The key is the content's identity (its sha256 where the source says it), so the next ingest of the same content goes on
where this one stopped, whoever asks for it and from wherever. Ranges, retries, resuming, checking and fairness are the
mesh's transfer engine's. What is not asked for again goes after a while, and at once where its room is needed.
"""

import asyncio
import errno
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import structlog

from helios.mesh.errors import (
    BlobNotFound,
    DiskFull,
    HeliosError,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate, Priority
from helios.mesh.transfer.journal import discard
from helios.mesh.transfer.order import Transfer, TransferOptions, Transferred, Wanted
from helios.mesh.transfer.progress import TransferProgress
from helios.registry import offload
from helios.registry.blobs import Hold
from helios.registry.manifest import Digest
from helios.registry.sources.remote import RemoteFile, Repository, git_blob_sha1, mismatch
from helios.registry.sources.settings import DownloadSettings

log = structlog.get_logger()

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# For sources that don't speak HTTP.
_STATUS: Final[dict[type[HeliosError], int]] = {Unauthenticated: 401, PermissionDenied: 403, BlobNotFound: 404}
# An hour beside the day for which unfinished downloads are kept.
_TIDY_SECONDS: Final = 3600.0
# st_blocks counts in these, whatever the file system's own size is.
_BLOCK_BYTES: Final = 512


class Room(Protocol):
    """The disk that downloads take room of."""

    def require_space(self, needed_bytes: int) -> None:
        """Raises DiskFull unless the disk can take this much."""
        ...


class Downloads:
    """The downloads of one registry. Belongs to the event loop."""

    def __init__(
        self, directory: Path, downloader: Downloader, room: Room, *, keep_seconds: float, at_once: int
    ) -> None:
        """Takes a directory of its own, on the disk of the registry's state.

        Args:
            directory: Where downloads are.
            downloader: Fetches one; its gate is what all share.
            room: That disk.
            keep_seconds: For how long an unfinished one stays.
            at_once: How many files an ingest should fetch at a time.
        """
        self.at_once = at_once
        self._directory = directory
        self._downloader = downloader
        self._room = room
        self._keep_seconds = keep_seconds
        self._users: dict[str, DownloadSession] = {}

    @contextmanager
    def session(self, hold: Hold) -> Iterator["DownloadSession"]:
        """Yields what one ingest fetches with; a file that it has begun is its own until the block ends."""
        self._directory.mkdir(exist_ok=True)
        self.tidy(self._keep_seconds)
        session = DownloadSession(self, hold)
        try:
            yield session
        finally:
            self._users = {key: user for key, user in self._users.items() if user is not session}
            session.ended.set()

    async def keep_tidy(self) -> None:
        """Removes downloads that nobody has gone on with, for ever: a registry may have no next ingest."""
        while True:
            if self._directory.is_dir():
                self.tidy(self._keep_seconds)
            await asyncio.sleep(_TIDY_SECONDS)

    def tidy(self, age_seconds: float) -> None:
        """Removes downloads that nobody has gone on with for this long."""
        now = datetime.now(UTC).timestamp()
        for path in self._directory.iterdir():
            key = path.name.partition(".")[0]
            # An ingest that ends at this moment moves its own away; a disk that fails is for who needs it to say.
            with suppress(OSError):
                if key not in self._users and path.stat().st_mtime <= now - age_seconds:
                    path.unlink()
                    log.info("unfinished download removed", file=path.name)

    def path(self, file: RemoteFile) -> Path:
        """Returns where a file is downloaded to."""
        return self._directory / _key(file)

    async def reserve(self, files: Collection[RemoteFile], session: "DownloadSession") -> bool:
        """Makes files a session's; returns whether another one had any of them before, and so may have finished it.

        In one order for all sessions, so that no two wait for each other.
        """
        has_waited = False
        for key in sorted(map(_key, files)):
            while (user := self._users.get(key, session)) is not session:
                has_waited = True
                await user.ended.wait()
            self._users[key] = session
        return has_waited

    def require_space(self, files: Collection[RemoteFile], more_bytes: int = 0) -> None:
        """Raises DiskFull unless the files fit, what is there of them counted; old downloads make room first."""
        needed_bytes = more_bytes + sum(max(0, file.size_bytes - _allocated_bytes(self.path(file))) for file in files)
        try:
            self._room.require_space(needed_bytes)
        except DiskFull:
            wanted = {_key(file) for file in files}
            for path in self._directory.iterdir():
                key = path.name.partition(".")[0]
                if key not in wanted and key not in self._users:
                    path.unlink(missing_ok=True)
            self._room.require_space(needed_bytes)

    def transfer(self, order: Transfer) -> Transferred:
        """Fetches a file. Blocks."""
        return self._downloader.fetch(order)


def open_downloads(directory: Path, room: Room, settings: DownloadSettings) -> Downloads:
    """Returns the downloads of a directory, set as the settings say."""
    options = TransferOptions(
        chunk_bytes=settings.chunk_bytes, in_flight=settings.in_flight, sync_bytes=settings.sync_bytes
    )
    # All ingests together get as many slots as one may have: beyond that more requests bring no more bytes.
    gate = DownloadGate(slot_count=settings.in_flight, bytes_per_second=settings.bytes_per_second)
    downloader = Downloader(options, gate)
    return Downloads(directory, downloader, room, keep_seconds=settings.keep_seconds, at_once=settings.files)


class DownloadSession:
    """What one ingest fetches with; a ``pulled.Fetcher``."""

    def __init__(self, downloads: Downloads, hold: Hold) -> None:
        self._downloads = downloads
        self._hold = hold
        self._targets: list[Path] = []
        self._has_waited = False
        self.ended = asyncio.Event()

    @property
    def at_once(self) -> int:
        """How many files should be fetched at a time."""
        return self._downloads.at_once

    async def have(self, digest: Digest) -> bool:
        """Returns whether the registry has this blob, which then stays at least until the ingest's end."""
        return await self._hold.take([digest])

    def require_space(self, needed_bytes: int) -> None:
        """Raises DiskFull unless the disk can take this much, beside what is downloaded."""
        self._downloads.require_space((), needed_bytes)

    async def begin(self, files: Iterable[RemoteFile]) -> None:
        """Makes these files this ingest's to fetch; waits for another one that fetches any of them.

        Raises:
            DiskFull: There is no room for what is missing of them.
        """
        wanted = tuple(files)
        self._has_waited |= await self._downloads.reserve(wanted, self)
        self._downloads.require_space(wanted)

    async def fetch(
        self, file: RemoteFile, repository: Repository, on_bytes: Callable[[int], None]
    ) -> tuple[Path | None, str]:
        """Fetches a file, or what is missing of it. Cancel-safe: what came is kept.

        Returns:
            The file, complete, on the disk and checked, which the caller may move; None if it has become a blob
            meanwhile. And its sha256.

        Raises:
            HeliosError: The source refuses it, is not to be reached, or has other bytes than it promised.
            DiskFull: There is no room.
        """
        # Of an archive the files in it are wanted, whoever has it as a blob.
        is_blob = bool(file.sha256) and not file.packing
        if self._has_waited and is_blob and await self.have(Digest(file.sha256, file.size_bytes)):
            on_bytes(file.size_bytes)
            return None, file.sha256
        target = self._downloads.path(file)
        self._targets.append(target)
        try:
            done = await offload.run(partial(self._transfer, file, repository, target, on_bytes))
        except (BlobNotFound, InvalidRequest, PermissionDenied, Unauthenticated) as error:
            status = int(error.metadata.get("status", _STATUS.get(type(error), 400)))
            raise repository.explain(status, error.message) from error
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFull("the registry's disk is full; remove a model or free some space") from error
            raise
        return target, done.sha256

    def remove(self) -> None:
        """Removes what was fetched and has not been moved. Blocks."""
        for target in self._targets:
            discard(target)

    def _transfer(
        self,
        file: RemoteFile,
        repository: Repository,
        target: Path,
        on_bytes: Callable[[int], None],
        stop: offload.Stop,
    ) -> Transferred:
        told_bytes = 0

        def tell(progress: TransferProgress) -> None:
            nonlocal told_bytes
            on_bytes(progress.done_bytes - told_bytes)
            told_bytes = progress.done_bytes

        order = Transfer(
            repository.open(file),
            target,
            Wanted(file.size_bytes, file.sha256),
            priority=Priority.INGEST,
            check=stop.check,
            on_progress=tell,
        )
        done = self._downloads.transfer(order)
        on_bytes(done.size_bytes - told_bytes)
        if file.git_sha1:
            # Git keeps no large files as they are, or hubs don't let it: this is read into memory.
            found = git_blob_sha1(target.read_bytes())
            if found != file.git_sha1:
                discard(target)
                raise mismatch(file.path, file.git_sha1, found)
        return done


def _key(file: RemoteFile) -> str:
    # Archives are a kind of their own: they are reserved first by everybody, so that no two wait for each other.
    packed = f" {file.packing}" if file.packing else ""
    return hashlib.sha256(f"{file.identity or file.place} {file.size_bytes}{packed}".encode()).hexdigest()


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0
