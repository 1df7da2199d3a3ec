"""One disk tier: verified blobs under their sha256, and views that link to them.

    <root>/lock                            held while an agent runs: two on one root would evict each other's blobs
    <root>/blobs/sha256/<ab>/<hash>        0444, complete and verified, or not there at all
    <root>/views/<hash of the revision>/   a directory of links, complete or not there at all
    <root>/tmp/                            everything unfinished; swept at start

A blob appears by: write to a temporary name, fsync, verify, rename, fsync the directory. A view appears and goes by
one rename of its directory. Views hold hard links: a path that survives tools which resolve symbolic links, and the
same inode, so every replica maps the same pages. All methods block; call them from pool threads.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import ClassVar

import structlog

from helios.mesh.errors import DigestMismatch, DiskFull, HeliosError, PreconditionFailed, Unavailable
from helios.mesh.file_system import FileSystem, LocalFileSystem, make_durable_directory, remove_tree
from helios.storage.manifest import Digest, Manifest, is_hash, revision_hash
from helios.storage.tiers import DiskRoom

log = structlog.get_logger()

BLOB_MODE = 0o444
"""Read-only for everybody: replicas may run as other users, and a blob never changes."""

HASH_CHUNK_BYTES = 8 << 20
"""8 MiB: large enough that a system call costs nothing, small enough for caches and for prompt cancellation."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM})
"""EFBIG: a limit on the size of a file is lack of room for the one who writes. ENOMEM: files in memory."""

_NO_HARD_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})
"""Another file system, a file system without hard links, or fs.protected_hardlinks and a file of another user."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What a start found and put right."""

    blobs: tuple[Digest, ...]
    adopted_count: int
    dropped_count: int
    swept_count: int


class BlobStore:
    """Files below one root; it keeps no state of its own and decides nothing."""

    is_sealed: ClassVar[bool] = False
    """Whether blobs are sealed memory files: holders take them as descriptors, and hand them back after a restart."""

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        """Takes the root, which `open` makes, and what changes files there."""
        self.root = root
        self.files: FileSystem = files or LocalFileSystem()
        self._blobs = root / "blobs" / "sha256"
        self._views = root / "views"
        self._temporary = root / "tmp"
        self._lock: int | None = None

    def open(self) -> None:
        """Makes the directories and takes the root for this process.

        Raises:
            PreconditionFailed: ROOT_IN_USE, when another agent has it.
        """
        for directory in (self._blobs, self._views, self._temporary):
            make_durable_directory(self.files, directory)
        # A start that was killed between making a directory and syncing its name left one that may go with the power.
        for directory in (self.root, self._blobs.parent, self._blobs):
            self.files.sync_directory(directory)
        lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise PreconditionFailed(
                f"another storage agent uses {self.root}; stop it or choose another root", reason="ROOT_IN_USE"
            ) from error
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def blob_path(self, hash_: str) -> Path:
        """Where a blob of this sha256 (hex) is, or would be."""
        return self._blobs / hash_[:2] / hash_

    def view_path(self, revision: str) -> Path:
        """Where the view of a revision is, or would be."""
        return self._views / revision_hash(revision)

    def disk_room(self) -> DiskRoom:
        """The file system's room for this user.

        Raises:
            Unavailable: TIER_FAILED.
        """
        try:
            state = os.statvfs(self.root)
        except OSError as error:
            raise write_error(error, self.root) from error
        free_bytes = state.f_bavail * state.f_frsize
        # What only root may use counts as used.
        return DiskRoom((state.f_blocks - state.f_bfree) * state.f_frsize + free_bytes, free_bytes)

    def drop_pages(self, hash_: str) -> None:
        """Has the kernel forget a blob's pages; those that somebody maps stay. Best effort."""
        with suppress(OSError):
            descriptor = os.open(self.blob_path(hash_), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def link_count(self, hash_: str) -> int:
        """How many names a blob's file has, its own, those in views and those outside of this tier; 0: it is gone."""
        try:
            return self.blob_path(hash_).stat().st_nlink
        except OSError:
            return 0

    def new_temporary(self) -> Path:
        """A path that does not exist, on the file system of the blobs."""
        return self._temporary / secrets.token_hex(16)

    def open_temporary(self, path: Path, size_bytes: int) -> FileIO:
        """Makes a temporary file and takes its room: a disk that is too full says so before gigabytes were read.

        Raises:
            OSError: The disk refuses.
        """
        file = path.open("xb", buffering=0)
        try:
            if size_bytes:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        except BaseException:
            file.close()
            raise
        return file

    def commit(self, temporary: Path, digest: Digest, actual_hash: str) -> None:
        """Gives a temporary file that is synced to the disk its name; idempotent.

        Args:
            temporary: The file; it is gone afterwards, whatever happens.
            digest: What it should be.
            actual_hash: The sha256 of what was written.

        Raises:
            DigestMismatch: It is something else.
        """
        try:
            state = temporary.stat()
            check_digest(digest, actual_hash=actual_hash, actual_bytes=state.st_size)
            if stat.S_IMODE(state.st_mode) != BLOB_MODE:
                self._set_mode(temporary)
            final = self.blob_path(digest.hash)
            make_durable_directory(self.files, final.parent)
            self.files.rename(temporary, final)
            self.files.sync_directory(final.parent)
        finally:
            self.discard_temporary(temporary)

    def discard_temporary(self, temporary: Path) -> None:
        """Removes an unfinished file. Idempotent.

        Where the disk refuses it is left to the next start: whoever cleans up has an error to tell already.
        """
        try:
            self.files.remove(temporary)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("unfinished file left to the next start", path=str(temporary), error=str(error))

    def remove_blob(self, hash_: str) -> None:
        """Unlinks a blob; processes that have it mapped keep it until they let go. Idempotent.

        Nothing is synced: a name that comes back after a power failure is one of a verified blob.
        """
        with suppress(FileNotFoundError):
            self.files.remove(self.blob_path(hash_))

    def make_view(self, manifest: Manifest) -> Path:
        """Makes the directory of a revision whose blobs are all here. Idempotent: a view that is right is kept.

        Raises:
            HeliosError: DiskFull (no room for the links), Unavailable (TIER_FAILED).
        """
        final = self.view_path(manifest.revision)
        building = self.new_temporary()
        try:
            if final.is_dir():
                if self._is_intact(final, manifest):
                    return final
                # One that could not be removed when its revision went: its links may lead to files that are no blobs.
                self._discard(final)
            self.files.make_directory(building)
            for entry in manifest.entries:
                link = building / entry.path
                self._make_directories(link.parent)
                self._link(self.blob_path(entry.digest.hash), link)
            self.files.rename(building, final)
        except OSError as error:
            with suppress(OSError):
                remove_tree(self.files, building)
            raise write_error(error, building) from error
        return final

    def relink(self, manifest: Manifest, digest: Digest) -> None:
        """Has a view link to the file that a blob is now; each path leads to the old or the new one at any moment.

        Raises:
            HeliosError: DiskFull, Unavailable (TIER_FAILED).
        """
        view = self.view_path(manifest.revision)
        for entry in manifest.entries:
            if entry.digest == digest:
                link = self.new_temporary()
                try:
                    self._link(self.blob_path(digest.hash), link)
                    self.files.rename(link, view / entry.path)
                except OSError as error:
                    self.discard_temporary(link)
                    raise write_error(error, link) from error

    def remove_view(self, revision: str) -> None:
        """Takes a view away with one rename, then its links. Idempotent."""
        self._discard(self.view_path(revision))

    def repair(self, known: dict[str, Digest]) -> Repair:
        """Brings the blobs into a state that can be trusted, after a crash at any instruction.

        Temporary files are swept. A blob that the index knows keeps its place if its size is right; its content was
        verified before it got its name. One that the index does not know is verified and adopted. Everything else is
        removed.
        """
        swept = self._sweep()
        kept: list[Digest] = []
        adopted = dropped = 0
        for path in self._files():
            digest = known.get(path.name)
            size = path.lstat().st_size
            is_good = digest is not None and size == digest.size_bytes and not path.is_symlink()
            if not is_good and digest is None and self._is_named_right(path) and _has_its_hash(path):
                # What is in memory was verified; the index must not outlive bytes that never reached the disk.
                self._set_mode(path)
                self.files.sync_directory(path.parent)
                digest, is_good = Digest(path.name, size), True
                adopted += 1
            if is_good and digest is not None:
                kept.append(digest)
            else:
                remove_tree(self.files, path)
                dropped += 1
        return Repair(tuple(kept), adopted, dropped, swept)

    def repair_views(self, manifests: list[Manifest]) -> None:
        """Removes views of unknown revisions and rebuilds those that are not exactly what their manifest says."""
        wanted = {self.view_path(manifest.revision): manifest for manifest in manifests}
        for path in list(self._views.iterdir()):
            manifest = wanted.get(path)
            if manifest is None or not self._is_intact(path, manifest):
                self._discard(path)
        for manifest in wanted.values():
            self.make_view(manifest)

    def _is_intact(self, view: Path, manifest: Manifest) -> bool:
        try:
            # A process of this user may have put a file there that nobody verified.
            held = {str(path.relative_to(view)) for path in view.rglob("*") if path.is_symlink() or not path.is_dir()}
            return held == {entry.path for entry in manifest.entries} and all(
                os.path.samestat((view / entry.path).stat(), self.blob_path(entry.digest.hash).stat())
                for entry in manifest.entries
            )
        except OSError:
            return False

    def _sweep(self) -> int:
        count = 0
        for path in list(self._temporary.iterdir()):
            remove_tree(self.files, path)
            count += 1
        return count

    def _files(self) -> Iterator[Path]:
        for directory in sorted(self._blobs.iterdir()):
            if directory.is_dir():
                yield from sorted(directory.iterdir())

    def _is_named_right(self, path: Path) -> bool:
        return is_hash(path.name) and path.parent.name == path.name[:2] and path.is_file() and not path.is_symlink()

    def _discard(self, directory: Path) -> None:
        away = self.new_temporary()
        try:
            self.files.rename(directory, away)
        except FileNotFoundError:
            return
        remove_tree(self.files, away)

    def _set_mode(self, path: Path) -> None:
        """Gives a file the mode of a blob, and syncs it: a mode that is lost with the power would stay lost."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, BLOB_MODE)
            self.files.sync_file(descriptor)
        finally:
            os.close(descriptor)

    def _make_directories(self, path: Path) -> None:
        if not path.is_dir():
            self._make_directories(path.parent)
            self.files.make_directory(path)

    def _link(self, blob: Path, link: Path) -> None:
        try:
            self.files.link(blob, link)
        except OSError as error:
            if not is_link_refused(error):
                raise
            self.files.link(blob, link, symbolic=True)


def hash_file(path: Path) -> str:
    """The sha256 of a file, in lower-case hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_its_hash(path: Path) -> bool:
    try:
        return hash_file(path) == path.name
    except OSError as error:
        # A sector that can't be read is a bad blob, and no reason against a start.
        if error.errno != errno.EIO:
            raise
        return False


def check_digest(digest: Digest, *, actual_hash: str, actual_bytes: int) -> None:
    """Raises DigestMismatch where a blob is not what it should be."""
    if actual_hash != digest.hash or actual_bytes != digest.size_bytes:
        raise digest_mismatch(digest, actual_hash=actual_hash, actual_bytes=actual_bytes)


def digest_mismatch(digest: Digest, *, actual_hash: str, actual_bytes: int) -> DigestMismatch:
    """The error that names a blob which is not what it should be."""
    return DigestMismatch(
        f"blob sha256:{digest.hash} is not what its name says; ingest the model again",
        metadata={
            "digest": f"sha256:{digest.hash}",
            "actual": f"sha256:{actual_hash}",
            "size_bytes": str(digest.size_bytes),
            "actual_bytes": str(actual_bytes),
        },
    )


def write_error(error: OSError, path: Path) -> HeliosError:
    """What a failure to write means to the caller."""
    name = errno.errorcode.get(error.errno or 0, "UNKNOWN")
    if error.errno in _NO_ROOM:
        return DiskFull(
            "the storage agent's disk is full; evict a model or give it more room",
            metadata={"errno": name, "path": str(path.parent)},
        )
    return Unavailable(
        f"the storage agent can't write: {error.strerror}", reason="TIER_FAILED", metadata={"errno": name}
    )


def is_link_refused(error: OSError) -> bool:
    """Whether a hard link is not to be had here, while a copy or a symbolic link is."""
    return error.errno in _NO_HARD_LINK
