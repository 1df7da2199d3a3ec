"""The blob store that is a directory, in which every file is complete, verified and named by its sha256.

    <root>/sha256/<first two>/<hash>     mode 0444, never changed after its rename
    <root>/tmp/<random>                  bytes on their way, swept at start
    <root>/owner.json                    which database's it is
    <root>/lock                          held while a registry uses a directory that is not in its state directory

A blob appears by one rename after its bytes are written, hashed and fsynced, so a reader never sees half a blob and a
crash leaves at most a file in ``tmp``, or a complete blob that nothing refers to: both go at the next start. Agents on
the same machine take blobs by hard link.

Sources are copied, never hard-linked: a directory belongs to its user, who may change a file in place, and the blob
would change with it. Files that the registry made itself (a conversion's output) are moved.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from helios.mesh.errors import BlobNotFound, Conflict, DiskFull, PreconditionFailed
from helios.mesh.files import sync_directory, write_private
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

    def __init__(self, root: Path) -> None:
        self._root = root
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
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(exist_ok=True)
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
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(exist_ok=True)
        return sum(_remove(path) for path in self._temporary.iterdir())

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
                freed += _remove(self.path(blob.hash))
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
        """Writes whose the directory is."""
        write_private(self._root / OWNER_FILE, content)
        sync_directory(self._root)

    @contextmanager
    def stage(self, source: Path, *, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop) -> Iterator[Staged]:
        """Yields a copy of a file, or the file itself where it is owned, complete on disk under a temporary name."""
        temporary = self._temporary / secrets.token_hex(16)
        self._staging.add(temporary)
        try:
            try:
                digest = _fill(source, temporary, is_owned, on_bytes, stop)
            except OSError as error:
                raise _translate(error, source) from error
            yield _StagedFile(digest, temporary, self.path(digest.hash))
        finally:
            temporary.unlink(missing_ok=True)
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
            self.path(value).unlink(missing_ok=True)

    def sweep(self, *, before: datetime, is_dry_run: bool = False) -> int:
        """Removes temporary files that were last written before this moment, but for those that are in use."""
        found = [path for path in self._temporary.iterdir() if path not in self._staging]
        stale = [path for path in found if _written_at(path) < before]
        if not is_dry_run:
            for path in stale:
                path.unlink(missing_ok=True)
        return len(stale)


@dataclass(frozen=True, slots=True)
class _StagedFile:
    digest: Digest
    temporary: Path
    target: Path

    def commit(self, on_bytes: OnBytes, stop: offload.Stop) -> None:
        del on_bytes, stop
        try:
            self.target.parent.mkdir(exist_ok=True)
            self.temporary.rename(self.target)
            # The rename is durable only with the directory, and the directory only with its parent.
            for directory in (self.target.parent, self.target.parent.parent):
                sync_directory(directory)
        except OSError as error:
            raise _translate(error, self.target) from error


def _fill(source: Path, temporary: Path, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    if not (is_owned and _move(source, temporary)):
        return _copy(source, temporary, on_bytes, stop)
    with temporary.open("rb", buffering=0) as file:
        digest = pump(file, None, on_bytes, stop)
        os.fsync(file.fileno())
    temporary.chmod(_BLOB_MODE)
    return digest


def _copy(source: Path, temporary: Path, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    with source.open("rb", buffering=0) as file:
        before = identity(file)
        digest = copy_file(file, temporary, on_bytes, stop)
        if identity(file) != before:
            raise changed(source)
    temporary.chmod(_BLOB_MODE)
    return digest


def _move(source: Path, target: Path) -> bool:
    """Moves a file; returns False where the store is on another disk, and the file has to be copied."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
        raise
    return True


def _remove(path: Path) -> int:
    size = size_of(path)
    path.unlink(missing_ok=True)
    return max(size, 0)


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
