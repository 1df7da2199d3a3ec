"""The blob store: a directory in which every file is complete, verified and named by its sha256.

    <root>/sha256/<first two>/<hash>     mode 0444, never changed after its rename
    <root>/tmp/<random>                  bytes on their way, swept at start

A blob appears by one rename after its bytes are written, hashed and fsynced, so a reader never sees half a blob and a
crash leaves at most a file in ``tmp``, or a complete blob that nothing refers to: both go at the next start.

Sources are copied, never hard-linked: a directory belongs to its user, who may change a file in place, and the blob
would change with it. Files that the registry made itself (a conversion's output) are moved.

A ``Hold`` protects the blobs of a running ingest from deletion until their rows are committed. Deciding and deleting
happen under one lock, and so do finding a blob and taking hold of it; copying happens outside.
"""

import asyncio
import errno
import hashlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from helios.mesh.errors import Conflict, DigestMismatch, DiskFull
from helios.registry import offload
from helios.registry.manifest import Digest

# 8 MiB: large enough that system calls don't count, small enough to stop within milliseconds.
BUFFER_BYTES: Final = 8 << 20
_BLOB_MODE: Final = 0o444
# EFBIG: a limit on file sizes, as containers set it, is a full disk to the caller.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob that is in the store; ``new_bytes`` is its size if it was not there before, else 0."""

    digest: Digest
    new_bytes: int


class BlobStore:
    """The blobs under one directory. One process owns it (``state.StateDirectory`` holds the lock)."""

    def __init__(self, root: Path, *, reserve_bytes: int) -> None:
        """Takes a directory; ``reserve_bytes`` of its disk are left free for others."""
        self._root = root
        self._reserve_bytes = reserve_bytes
        self._lock = asyncio.Lock()
        self._held: Counter[str] = Counter()
        # Sizes of blobs that are or were here; a stale one costs a needless hash, nothing else.
        self._sizes: set[int] = set()
        self._directory = root / "sha256"
        self._temporary = root / "tmp"

    @property
    def url(self) -> str:
        """Base of the store as a ``file://`` URL."""
        return self._root.absolute().as_uri()

    def path(self, hash_: str) -> Path:
        """Returns where the blob with this hash is, or would be."""
        return self._directory / hash_[:2] / hash_

    def prepare(self, referenced: dict[str, int]) -> tuple[int, list[str]]:
        """Brings the directory into order at start, before anything else uses it.

        Removes what a crash left: files in ``tmp``, blobs that no revision refers to, blobs of the wrong size.

        Returns:
            Bytes that were freed, and the hashes of referenced blobs that are missing.
        """
        freed = sum(_remove(path) for path in _files(self._temporary))
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(exist_ok=True)
        for path in _files(self._directory):
            if referenced.get(path.name) != path.stat().st_size or path != self.path(path.name):
                freed += _remove(path)
        self._sizes.update(referenced.values())
        return freed, [value for value in referenced if not self.path(value).exists()]

    def missing(self, digests: Collection[Digest]) -> list[Digest]:
        """Returns those of the blobs that are not in the store with their size."""
        return [digest for digest in digests if _size(self.path(digest.hash)) != digest.size_bytes]

    def require_space(self, needed_bytes: int) -> None:
        """Raises DiskFull unless the disk can take this much and still has its reserve."""
        free = shutil.disk_usage(self._root).free
        if needed_bytes + self._reserve_bytes > free:
            raise DiskFull(
                f"the registry's disk has {free >> 20} MiB free; {needed_bytes >> 20} MiB are needed and"
                f" {self._reserve_bytes >> 20} MiB are kept free: remove a model or free some space",
                metadata={"free_bytes": str(free), "needed_bytes": str(needed_bytes)},
            )

    def require_space_for(self, sizes: Collection[int]) -> None:
        """Raises DiskFull unless there is room for files of these sizes, as far as none of them is known yet."""
        self.require_space(sum(size for size in sizes if size not in self._sizes))

    @contextmanager
    def hold(self) -> Iterator["Hold"]:
        """Yields a hold for one ingest; it ends with the block."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            self._held.subtract(hold.hashes)
            self._held += Counter()

    @asynccontextmanager
    async def collecting(self) -> AsyncIterator[Callable[[Collection[str]], Awaitable[int]]]:
        """Yields a function that deletes blobs (held ones apart) and returns the freed bytes.

        While the block runs no blob is added, so what the caller finds unreferenced stays so.
        """
        async with self._lock:
            yield self._delete

    async def _delete(self, hashes: Collection[str]) -> int:
        doomed = [self.path(value) for value in hashes if value not in self._held]
        return await offload.run(lambda _: sum(_remove(path) for path in doomed))

    async def _put(self, hold: "Hold", source: Path, *, is_owned: bool, expected: str, on_bytes: OnBytes) -> Stored:
        temporary = self._temporary / secrets.token_hex(16)
        try:
            # A blob has this size: hashing first may save the copy.
            if not is_owned and _size(source) in self._sizes:
                digest = await offload.run(partial(hash_file, source, on_bytes))
                if (not expected or digest.hash == expected) and await self._take_hold(hold, digest):
                    return Stored(digest, 0)
                # The bytes are read again: progress goes back rather than beyond the end.
                on_bytes(-digest.size_bytes)
            digest = await offload.run(partial(_fill, source, temporary, is_owned, on_bytes))
            if expected and digest.hash != expected:
                raise _mismatch(source, expected, digest)
            return await self._commit(hold, temporary, digest)
        except OSError as error:
            raise _translate(error, source) from error
        finally:
            temporary.unlink(missing_ok=True)

    async def _commit(self, hold: "Hold", temporary: Path, digest: Digest) -> Stored:
        async with self._lock:
            self._held[digest.hash] += 1
            hold.hashes.append(digest.hash)
            target = self.path(digest.hash)
            if _size(target) == digest.size_bytes:
                return Stored(digest, 0)
            await offload.run(lambda _: _rename(temporary, target))
            self._sizes.add(digest.size_bytes)
            return Stored(digest, digest.size_bytes)

    async def _take_hold(self, hold: "Hold", digest: Digest) -> bool:
        async with self._lock:
            if _size(self.path(digest.hash)) != digest.size_bytes:
                return False
            self._held[digest.hash] += 1
            hold.hashes.append(digest.hash)
            return True


class Hold:
    """The blobs of one ingest: they are not deleted while it lasts."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self.hashes: list[str] = []

    async def put(self, source: Path, *, is_owned: bool = False, expected: str = "", on_bytes: OnBytes) -> Stored:
        """Stores a file and holds its blob. Idempotent.

        Args:
            source: The file.
            is_owned: The file is the registry's own, on the store's disk, and is moved.
            expected: The sha256 that it must have, in hexadecimal; empty for any.
            on_bytes: Told of each buffer's length, from another thread.

        Raises:
            DigestMismatch: The file is not what was expected.
            DiskFull: There is no room; nothing is left behind.
            Conflict: SOURCE_CHANGED, the file was changed or removed while it was read.
        """
        return await self._store._put(self, source, is_owned=is_owned, expected=expected, on_bytes=on_bytes)

    async def take(self, digests: Collection[Digest]) -> bool:
        """Holds blobs that are in the store; returns False if one is missing."""
        return all([await self._store._take_hold(self, digest) for digest in digests])


def hash_file(path: Path, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Returns a file's digest, telling ``on_bytes`` of each buffer's length. Blocking; raises OSError."""
    with path.open("rb", buffering=0) as file:
        return _pump(file, None, on_bytes, stop)


def _fill(source: Path, temporary: Path, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    if is_owned:
        source.rename(temporary)
        with temporary.open("rb", buffering=0) as file:
            digest = _pump(file, None, on_bytes, stop)
            os.fsync(file.fileno())
    else:
        with source.open("rb", buffering=0) as file, temporary.open("xb", buffering=0) as target:
            before = os.fstat(file.fileno())
            digest = _pump(file, target, on_bytes, stop)
            os.fsync(target.fileno())
            if _identity(os.fstat(file.fileno())) != _identity(before):
                raise _changed(source)
    temporary.chmod(_BLOB_MODE)
    return digest


def _pump(source: BinaryIO, target: BinaryIO | None, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    hasher, size = hashlib.sha256(), 0
    # A file that grows as fast as it is read would never end.
    limit = os.fstat(source.fileno()).st_size
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        stop.check()
        part = buffer[:count]
        hasher.update(part)
        while target is not None and part:
            part = part[target.write(part) :]
        size += count
        if size > limit:
            raise _changed(source.name)
        on_bytes(count)
    return Digest(hasher.hexdigest(), size)


def _rename(temporary: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    temporary.rename(target)
    # The rename is durable only with the directory, and the directory only with its parent.
    for directory in (target.parent, target.parent.parent):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if not path.is_dir()) if directory.is_dir() else iter(())


def _remove(path: Path) -> int:
    size = _size(path)
    path.unlink(missing_ok=True)
    return max(size, 0)


def _size(path: Path) -> int:
    """Returns a file's size, -1 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _changed(source: object) -> Conflict:
    return Conflict(f"{source} changed while it was read; ingest it again", reason="SOURCE_CHANGED")


def _mismatch(source: Path, expected: str, digest: Digest) -> DigestMismatch:
    return DigestMismatch(
        f"{source.name} has sha256 {digest.hash}, expected {expected}",
        metadata={"expected": expected, "found": digest.hash},
    )


def _translate(error: OSError, source: Path) -> Exception:
    if error.errno in _FULL:
        return DiskFull("the registry's disk is full; remove a model or free some space")
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return Conflict(f"{source} could not be read: {error.strerror}", reason="SOURCE_CHANGED")
    return error
