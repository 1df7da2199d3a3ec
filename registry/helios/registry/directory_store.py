"""The blob store that is a directory, in which every file is complete, verified and named by its sha256.

    <root>/sha256/<first two>/<hash>     mode 0444, never changed after its rename
    <root>/tmp/<random>                  bytes on their way, swept at start
    <root>/owner.json                    which database's it is
    <root>/lock                          held while a registry uses a directory that is not in its state directory

A blob appears by one rename after its bytes are written, hashed and fsynced, so a reader never sees half a blob and a
crash leaves at most a file in ``tmp``, or a complete blob that nothing refers to: both go at the next start. Once a
``commit`` or an owner's ``create_owner`` has returned, its name outlives a power cut, with all names above it. Agents
on the same machine take blobs by hard link.

Sources are copied, never hard-linked: a directory belongs to its user, who may change a file in place, and the blob
would change with it. Files that the registry made itself (a conversion's output) are moved.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from helios.mesh.errors import BlobNotFound, Conflict, DiskFull, PreconditionFailed
from helios.mesh.file_system import FileSystem, LocalFileSystem, make_durable_directory
from helios.registry import offload
from helios.registry.blobs import Staged
from helios.registry.collection import StoredBlob
from helios.registry.hashing import OnBytes, changed, copy_file, identity, pump, size_of
from helios.registry.manifest import Digest
from helios.registry.ownership import OWNER_FILE

_BLOB_MODE: Final = 0o444
_HASH: Final = re.compile(r"[0-9a-f]{64}")
# The first two digits of a hash name its directory.
_FAN_DIGITS: Final = 2
# EFBIG: a limit on file sizes, as containers set it, is a full disk to the caller.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DirectoryStore:
    """The blobs under one directory; a ``BlobStore``. One process has it (``owned``)."""

    options: Mapping[str, str] = {}

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        """Takes the root, and what changes files there."""
        self._root = root
        self._files: FileSystem = files or LocalFileSystem()
        self._directory = root / "sha256"
        self._temporary = root / "tmp"
        # What is being staged now: a file that was moved here keeps the time at which it was written.
        self._staging: set[Path] = set()

    @property
    def url(self) -> str:
        """Base of the store as a ``file://`` URL."""
        return self._root.absolute().as_uri()

    def path(self, hash_: str) -> Path:
        """Returns where the blob with this hash is, or would be."""
        return self._directory / hash_[:2] / hash_

    @contextmanager
    def owned(self) -> Iterator["DirectoryStore"]:
        """Makes the directory this process's for the length of the block.

        Raises:
            PreconditionFailed: BLOB_STORE_IN_USE: another registry would take its blobs for garbage.
        """
        self._make_directories()
        # The kernel drops the lock with the process, however it ends.
        descriptor = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield self
        except BlockingIOError as error:
            raise PreconditionFailed(
                f"another registry keeps its blobs in {self._root}; give this one a directory of its own",
                reason="BLOB_STORE_IN_USE",
            ) from error
        finally:
            os.close(descriptor)

    def prepare(self) -> int:
        """Makes the directory and removes temporary files at start, before anything else uses it; returns their bytes.

        Without a grace period, because the directory is this process's alone.
        """
        self._make_directories()
        return sum(self._remove(path) for path in self._temporary.iterdir())

    def repair(self, prefix: str, referenced: Mapping[str, int]) -> tuple[int, list[str]]:
        """Removes, at start, blobs that nothing refers to or that have the wrong size: what a crash left.

        Args:
            prefix: Begins the hashes of the blobs that are looked at: at most two digits.
            referenced: Hash and size of what something refers to, among these.

        Returns:
            Bytes that were freed, and the hashes of referenced blobs that are missing.
        """
        freed, missing = 0, set(referenced)
        for blob in self.scan(prefix):
            if referenced.get(blob.hash) == blob.size_bytes:
                missing.discard(blob.hash)
            else:
                freed += self._remove(self.path(blob.hash))
        return freed, sorted(missing)

    def read_owner(self) -> bytes | None:
        """Returns what says whose the directory is."""
        try:
            return (self._root / OWNER_FILE).read_bytes()
        except FileNotFoundError:
            return None

    def create_owner(self, content: bytes) -> bool:
        """Writes whose the directory is, unless that is said; nobody else writes, for the directory is locked."""
        if self.read_owner() is not None:
            return False
        self.replace_owner(content)
        return True

    def replace_owner(self, content: bytes) -> None:
        """Writes whose the directory is: whatever happens, that is what it was or what it is to be."""
        # It is the first thing that a start does.
        self._make_directories()
        temporary = self._temporary / secrets.token_hex(16)
        try:
            with temporary.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(content)
                file.flush()
                self._files.sync_file(file.fileno())
            self._files.rename(temporary, self._root / OWNER_FILE)
        finally:
            self._remove(temporary)
        self._files.sync_directory(self._root)

    @contextmanager
    def stage(self, source: Path, *, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop) -> Iterator[Staged]:
        """Yields a copy of a file, or the file itself where it is owned, complete on disk under a temporary name."""
        temporary = self._temporary / secrets.token_hex(16)
        self._staging.add(temporary)
        try:
            try:
                digest, home = self._fill(source, temporary, is_owned, on_bytes, stop)
            except OSError as error:
                raise _translate(error, source) from error
            yield _StagedFile(self._files, digest, temporary, self.path(digest.hash), home)
        finally:
            self._remove(temporary)
            self._staging.discard(temporary)

    def size(self, hash_: str) -> int:
        """Returns a blob's size, -1 if it is not there."""
        return size_of(self.path(hash_))

    def open(self, hash_: str) -> BinaryIO:
        """Opens a blob for reading. Raises BlobNotFound."""
        try:
            return self.path(hash_).open("rb")
        except FileNotFoundError as error:
            raise BlobNotFound(f"blob sha256:{hash_} is not in the blob store", metadata={"blob": hash_}) from error

    def scan(self, prefix: str = "") -> Generator[StoredBlob, None, None]:
        """Yields the blobs whose hashes begin so. One that goes meanwhile is left out; what is no blob's name, too."""
        for directory in self._directory.glob(f"{prefix}*" if len(prefix) < _FAN_DIGITS else prefix):
            with os.scandir(directory) as entries:
                for entry in entries:
                    if not _HASH.fullmatch(entry.name) or entry.name[:_FAN_DIGITS] != directory.name:
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield StoredBlob(entry.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, hashes: Collection[str]) -> None:
        """Removes blobs."""
        for value in hashes:
            self._remove(self.path(value))

    def sweep(self, *, before: datetime, is_dry_run: bool = False) -> int:
        """Removes temporary files that were last written before this moment, but for those that are in use."""
        found = [path for path in self._temporary.iterdir() if path not in self._staging]
        stale = [path for path in found if _written_at(path) < before]
        if not is_dry_run:
            for path in stale:
                self._remove(path)
        return len(stale)

    def _make_directories(self) -> None:
        for directory in (self._temporary, self._directory):
            make_durable_directory(self._files, directory)
        # A start that was killed between making a directory and syncing its name left one that may go with the power.
        self._files.sync_directory(self._root)

    def _fill(
        self, source: Path, temporary: Path, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop
    ) -> tuple[Digest, Path | None]:
        """Returns what was staged, and the directory that it was moved from; None where it was copied."""
        if not (is_owned and self._move(source, temporary)):
            return _copy(source, temporary, on_bytes, stop), None
        with temporary.open("rb", buffering=0) as file:
            digest = pump(file, None, on_bytes, stop)
            # It is durable with what is synced after it.
            os.fchmod(file.fileno(), _BLOB_MODE)
            self._files.sync_file(file.fileno())
        return digest, source.parent

    def _move(self, source: Path, target: Path) -> bool:
        """Moves a file; returns False where the store is on another disk, and the file has to be copied."""
        try:
            self._files.rename(source, target)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise
        return True

    def _remove(self, path: Path) -> int:
        """Removes a file, if it is there; returns its bytes.

        Nothing is synced: a name that a power cut brings back is one of a file that the next start removes.
        """
        size = size_of(path)
        with suppress(FileNotFoundError):
            self._files.remove(path)
        return max(size, 0)


@dataclass(frozen=True, slots=True)
class _StagedFile:
    """A file in ``tmp``; ``home`` is the directory that it was moved from, if it was."""

    files: FileSystem
    digest: Digest
    temporary: Path
    target: Path
    home: Path | None

    def commit(self, on_bytes: OnBytes, stop: offload.Stop) -> None:
        del on_bytes, stop
        try:
            with suppress(FileExistsError):
                self.files.make_directory(self.target.parent)
            self.files.rename(self.temporary, self.target)
            # The rename is durable only with the directory, and the directory only with its parent.
            for directory in (self.target.parent, self.target.parent.parent):
                self.files.sync_directory(directory)
            # Last: a power cut must leave the file one of its names, and a blob no second one that a download goes on
            # to write to.
            if self.home is not None:
                self.files.sync_directory(self.home)
        except OSError as error:
            raise _translate(error, self.target) from error


def _copy(source: Path, temporary: Path, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    with source.open("rb", buffering=0) as file:
        before = identity(file)
        digest = copy_file(file, temporary, _BLOB_MODE, on_bytes, stop)
        if identity(file) != before:
            raise changed(source)
    return digest


def _written_at(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.max.replace(tzinfo=UTC)


def _translate(error: OSError, source: Path) -> Exception:
    if error.errno in _FULL:
        return DiskFull("the registry's disk is full; remove a model or free some space")
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return Conflict(f"{source} could not be read: {error.strerror}", reason="SOURCE_CHANGED")
    return error
