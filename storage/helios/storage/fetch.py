"""Bringing one blob from a source to the disk tier, every byte verified before the blob has its name.

A source on the same file system lends its bytes by a hard link: allowed only because the registry's blobs are
immutable and read-only, and verified all the same. What comes over a network comes by the mesh's transfer engine
(`ranged_fetch`). Everything else is copied in 8 MiB chunks; hashing runs in a second thread beside reading and writing,
because on one core sha256 is as slow as a disk. Functions here block and
run in pool threads; a token cancels them between chunks, so that a fetch ends soon and cleans up behind itself.
"""

import ctypes
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from helios.mesh.errors import BlobNotFound, Corrupted, HeliosError, Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import Priority
from helios.mesh.transfer.order import Guide
from helios.mesh.transfer.progress import TransferProgress
from helios.mesh.transfer.source import RangeSource
from helios.storage.blob_store import (
    BLOB_MODE,
    HASH_CHUNK_BYTES,
    BlobStore,
    digest_mismatch,
    is_link_refused,
    write_error,
)
from helios.storage.manifest import Digest
from helios.storage.ranged_fetch import PartialFiles
from helios.storage.reflink import Copy, share_copies

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class BlobReader(Protocol):
    """One open blob. Used by one thread at a time; `close` is called exactly once."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills the buffer from the offset on; returns how many bytes, less than asked for only at the end.

        Raises:
            HeliosError: Unavailable (SOURCE_UNAVAILABLE).
        """
        ...

    def close(self) -> None:
        """Lets go of the blob."""
        ...


def _no_end(_: bool) -> None:
    """Nobody waits for the end."""


@dataclass(frozen=True, slots=True)
class RangedBlob:
    """A blob for the transfer engine."""

    source: RangeSource
    part_lengths: tuple[int, ...] = ()
    """The parts that must be read whole, because the source verifies them; empty: any."""
    bytes_elsewhere: Callable[[], Mapping[str, int]] = dict
    """What came from elsewhere than the store by now, by where from: `peer`, `node` (copied from its other blobs)."""
    part_hashes: tuple[bytes, ...] = ()
    """The BLAKE3 that it compares each part with."""
    copied: Callable[[], Sequence[Copy]] = tuple
    """What was copied from other blobs of this node, which may share their room on the disk."""
    guide: Guide | None = None
    """Says which range next, and learns what came."""
    end: Callable[[bool], None] = _no_end
    """Called once when the blob has its name (True), or the fetch has failed."""


class BlobSource(Protocol):
    """Where blobs come from: a directory, an object store, a peer. Blocking, thread-safe, and never trusted."""

    def open(self, digest: Digest) -> BlobReader:
        """Opens a blob for reading.

        Raises:
            HeliosError: Unavailable (SOURCE_UNAVAILABLE).
        """
        ...

    def linkable_path(self, digest: Digest) -> Path | None:
        """A local, read-only file that holds the blob and will never be written to; None when there is none."""
        ...

    def ranged(self, digest: Digest) -> RangedBlob | None:
        """The blob for the transfer engine, of a source across a network; None: `open` reads it best.

        Raises:
            HeliosError: The source can't be opened.
        """
        ...


class FetchToken:
    """Cancels a fetch, and counts its bytes: written by the fetching thread, read by the event loop.

    `priority` says how urgent the fetch is now.
    """

    def __init__(
        self,
        add_bytes: Callable[[int], None] = lambda _: None,
        priority: Callable[[], Priority] = lambda: Priority.START,
    ) -> None:
        self.priority = priority
        self._cancelled = threading.Event()
        self._add_bytes = add_bytes

    def cancel(self) -> None:
        self._cancelled.set()

    def advance(self, count: int) -> None:
        """Counts bytes, or ends the fetch.

        Raises:
            FetchCancelled: `cancel` was called.
        """
        if self._cancelled.is_set():
            raise FetchCancelled("the fetch was cancelled")
        self._add_bytes(count)

    def wait(self, seconds: float) -> None:
        """Waits, for no longer than until the fetch is cancelled, which `advance` tells."""
        if seconds > 0:
            self._cancelled.wait(seconds)


class FetchCancelled(Unavailable):
    """Nobody waits for the blob any more; only the one who cancelled sees this."""

    default_reason = "FETCH_CANCELLED"


class DirectorySource:
    """The blob store of a registry on this machine: `<base>/sha256/<first two of h>/<h>`."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def open(self, digest: Digest) -> "FileReader":
        try:
            # No symbolic links: one would lead out of the blob store.
            return FileReader(os.open(self._path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except OSError as error:
            raise _source_error(error, digest) from error

    def linkable_path(self, digest: Digest) -> Path | None:
        path = self._path(digest)
        try:
            state = path.lstat()
        except OSError as error:
            raise _source_error(error, digest) from error
        # Exactly the mode of a blob: a link shares its inode, so its mode must not need to be changed.
        is_immutable = stat.S_ISREG(state.st_mode) and stat.S_IMODE(state.st_mode) == BLOB_MODE
        return path if is_immutable else None

    def ranged(self, digest: Digest) -> RangedBlob | None:
        """A local file is copied by one reader: more of them wait for the same disk."""
        del digest
        return None

    def _path(self, digest: Digest) -> Path:
        return self._base / "sha256" / digest.hash[:2] / digest.hash


class FileReader:
    """Reads an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise Unavailable(f"a blob can't be read: {error.strerror}", reason="SOURCE_UNAVAILABLE") from error
        return done

    def close(self) -> None:
        os.close(self._descriptor)


class BlobFetcher:
    """Fetches blobs from sources into a store."""

    def __init__(
        self,
        store: BlobStore,
        *,
        hashing: ThreadPoolExecutor,
        is_link_allowed: bool = True,
        downloader: Downloader | None = None,
        on_shared: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Takes the pool for hashing, which needs as many threads as there are fetches at a time, and what is told, in
        a thread, of bytes that take no room of their own.

        The downloader is the node's, so that all its fetches share one bandwidth; None: one that is not limited.
        """
        self._store = store
        self._downloader = downloader or Downloader()
        self._partial = PartialFiles(store.root, store.files)
        self._hashing = hashing
        self._on_shared = on_shared
        self._is_link_allowed = is_link_allowed

    def fetch(self, source: BlobSource, digest: Digest, token: FetchToken) -> dict[str, int]:
        """Fetches one blob; afterwards it is there, verified, or it is not there at all. Blocks.

        What came over a network is kept for the next try, out of sight, unless it was wrong.

        Returns:
            Bytes that came over a network, or in place of that, by where from: `store`, `peer`, `node`, and `resumed`
            of an earlier try. Empty for a local source.

        Raises:
            DigestMismatch: The source has other bytes under this name.
            DiskFull: No room.
            Unavailable: SOURCE_UNAVAILABLE, TIER_FAILED, or FetchCancelled.
        """
        ranged = source.ranged(digest)
        if ranged is not None:
            return self._fetch_ranged(ranged, digest, token)
        temporary = self._store.new_temporary()
        try:
            if self._is_link_allowed and self._link(source, digest, temporary):
                actual_hash = self._hash_linked(temporary, digest, token)
            else:
                with closing(source.open(digest)) as reader:
                    actual_hash = self._copy(reader, digest, temporary, token)
            self._store.commit(temporary, digest, actual_hash)
        except OSError as error:
            raise write_error(error, temporary) from error
        finally:
            self._store.discard_temporary(temporary)
        return {}

    def held_bytes(self, digest: Digest) -> int:
        """What an earlier fetch of a blob has left on the disk, for the next one to go on with."""
        return min(digest.size_bytes, self._partial.held_bytes(digest))

    def drop_unfinished(self, keep: Iterable[Digest]) -> None:
        """Removes what earlier fetches of other blobs have left.

        Raises:
            OSError: The disk refuses.
        """
        self._partial.tidy(0.0, keep={digest.hash for digest in keep})

    def _fetch_ranged(self, blob: RangedBlob, digest: Digest, token: FetchToken) -> dict[str, int]:
        told_bytes = 0

        def tell(progress: TransferProgress) -> None:
            nonlocal told_bytes
            token.advance(progress.done_bytes - told_bytes)
            told_bytes = progress.done_bytes

        is_whole = False
        try:
            with self._partial.fetch(
                self._downloader,
                blob.source,
                digest,
                priority=token.priority,
                check=lambda: token.advance(0),
                on_progress=tell,
                part_lengths=blob.part_lengths,
                part_hashes=blob.part_hashes,
                guide=blob.guide,
            ) as (path, fetched):
                self._on_shared(share_copies(path, blob.copied()))
                self._store.commit(path, digest, fetched.sha256)
            is_whole = True
        except BlobNotFound as error:
            raise _source_error(FileNotFoundError(), digest) from error
        except OSError as error:
            raise write_error(error, self._store.root) from error
        finally:
            blob.end(is_whole)
        counts = {**blob.bytes_elsewhere(), "resumed": fetched.resumed_bytes}
        counts["store"] = max(0, fetched.fetched_bytes - sum(blob.bytes_elsewhere().values()))
        return {name: count for name, count in counts.items() if count}

    def _link(self, source: BlobSource, digest: Digest, temporary: Path) -> bool:
        path = source.linkable_path(digest)
        if path is None:
            return False
        try:
            self._store.files.link(path, temporary)
        except OSError as error:
            if is_link_refused(error):
                return False
            if isinstance(error, FileNotFoundError):
                raise _source_error(error, digest) from error
            raise
        return True

    def _copy(self, reader: BlobReader, digest: Digest, temporary: Path, token: FetchToken) -> str:
        """Copies, hashes and syncs; returns the hash of what was written."""
        with _Hasher(self._hashing) as hasher, self._store.open_temporary(temporary, digest.size_bytes) as file:
            buffers = [memoryview(bytearray(min(HASH_CHUNK_BYTES, digest.size_bytes + 1))) for _ in range(2)]
            offset = 0
            while True:
                buffer = buffers[0]
                buffers.reverse()
                # One byte more than there should be is asked for, so that a source that is too long is noticed.
                count = reader.read_into(offset, buffer[: digest.size_bytes + 1 - offset])
                if offset + count > digest.size_bytes:
                    raise digest_mismatch(digest, actual_hash="unknown", actual_bytes=offset + count)
                if count == 0:
                    break
                # The other buffer is free again once its hash is taken, which `update` waits for.
                hasher.update(buffer[:count])
                _write_all(file.fileno(), buffer[:count])
                _start_writeback(file.fileno(), offset, count)
                offset += count
                token.advance(count)
            actual_hash = hasher.result()
            os.ftruncate(file.fileno(), offset)
            os.fchmod(file.fileno(), BLOB_MODE)
            self._store.files.sync_file(file.fileno())
        return actual_hash

    def _hash_linked(self, temporary: Path, digest: Digest, token: FetchToken) -> str:
        """Hashes a linked file; the link holds the very inode that is renamed afterwards."""
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with closing(FileReader(descriptor)) as reader:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_size != digest.size_bytes:
                raise digest_mismatch(digest, actual_hash="unknown", actual_bytes=state.st_size)
            sha256 = hashlib.sha256()
            buffer = memoryview(bytearray(min(HASH_CHUNK_BYTES, max(1, digest.size_bytes))))
            offset = 0
            while count := reader.read_into(offset, buffer):
                sha256.update(buffer[:count])
                offset += count
                token.advance(count)
            # The registry may have written it moments ago; the index must not outlive the bytes.
            self._store.files.sync_file(descriptor)
            return sha256.hexdigest()


class _Hasher:
    """Hashes one chunk in another thread while the caller writes it and reads the next."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._sha256 = hashlib.sha256()
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the thread: it must not read a buffer that is given away."""
        self._wait()

    def update(self, chunk: memoryview) -> None:
        """Takes a chunk; the chunk before it is free when this returns."""
        self._wait()
        self._running = self._pool.submit(self._sha256.update, chunk)

    def result(self) -> str:
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Has the kernel write a range now, beside reading and hashing, so that fsync finds little left to do.

    Best effort: where the call is not to be had, fsync does all of it. Source: sync_file_range(2).
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


def _source_error(error: OSError, digest: Digest) -> HeliosError:
    if isinstance(error, FileNotFoundError):
        message = f"blob sha256:{digest.hash} is not in the blob store"
    else:
        message = f"blob sha256:{digest.hash} can't be read: {error.strerror}"
    return Unavailable(message, reason="SOURCE_UNAVAILABLE", metadata={"digest": f"sha256:{digest.hash}"})


def is_leftover_unwanted(error: HeliosError) -> bool:
    """Whether what a failed fetch brought so far should go: the bytes are wrong as a whole, or there is no room."""
    return isinstance(error, Corrupted) or error.reason == "DISK_FULL"
