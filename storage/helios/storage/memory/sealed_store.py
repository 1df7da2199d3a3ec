"""Blobs in sealed memory files, behind the same calls as blobs on a disk.

The root is a directory on a disk all the same: it has the index, which says what holders are expected to hand back, and
views whose links lead to this process's own descriptors. Those are for readers on this machine that take no
descriptors; they end with this process. All methods block; call them from pool threads.
"""

import os
import threading
from io import FileIO
from pathlib import Path

import psutil

from helios.mesh.errors import BlobNotFound
from helios.mesh.sealed import make_memory_file, seal
from helios.storage.blob_store import BLOB_MODE, BlobStore, check_digest
from helios.storage.manifest import Digest
from helios.storage.tiers import DiskRoom


class SealedStore(BlobStore):
    """Memory files by sha256. It starts empty: what was in memory is with its holders, or gone."""

    is_sealed = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock_of_files = threading.Lock()
        self._unfinished: dict[Path, int] = {}
        self._sealed: dict[str, int] = {}

    def close(self) -> None:
        """Lets go of all files; holders keep theirs."""
        with self._lock_of_files:
            for descriptor in (*self._unfinished.values(), *self._sealed.values()):
                os.close(descriptor)
            self._unfinished.clear()
            self._sealed.clear()
        super().close()

    def blob_path(self, hash_: str) -> Path:
        """A path to a blob for this machine, as long as this process has it; else one that leads nowhere."""
        descriptor = self._sealed.get(hash_)
        return super().blob_path(hash_) if descriptor is None else Path(f"/proc/{os.getpid()}/fd/{descriptor}")

    def disk_room(self) -> DiskRoom:
        """The machine's memory, whoever fills it."""
        memory = psutil.virtual_memory()
        return DiskRoom(memory.total, memory.available)

    def drop_pages(self, hash_: str) -> None:
        """Nothing: these pages are the blob."""

    def link_count(self, hash_: str) -> int:
        return int(hash_ in self._sealed)

    def open_temporary(self, path: Path, size_bytes: int) -> FileIO:
        """Makes a memory file. No room is taken ahead: that would be to touch all pages twice."""
        descriptor = make_memory_file("helios-blob")
        with self._lock_of_files:
            self._unfinished[path] = descriptor
        return FileIO(os.dup(descriptor), "w")

    def commit(self, temporary: Path, digest: Digest, actual_hash: str) -> None:
        with self._lock_of_files:
            descriptor = self._unfinished.pop(temporary)
        try:
            check_digest(digest, actual_hash=actual_hash, actual_bytes=os.fstat(descriptor).st_size)
            os.fchmod(descriptor, BLOB_MODE)
            seal(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.keep(digest, descriptor)

    def keep(self, digest: Digest, descriptor: int) -> None:
        """Takes a sealed file whose bytes were verified; the descriptor is the store's from now on."""
        with self._lock_of_files:
            before = self._sealed.pop(digest.hash, None)
            self._sealed[digest.hash] = descriptor
        if before is not None:
            os.close(before)

    def discard_temporary(self, temporary: Path) -> None:
        with self._lock_of_files:
            descriptor = self._unfinished.pop(temporary, None)
        if descriptor is not None:
            os.close(descriptor)
        super().discard_temporary(temporary)

    def remove_blob(self, hash_: str) -> None:
        """Lets go of a blob; its memory is free once all holders have let go of theirs."""
        with self._lock_of_files:
            descriptor = self._sealed.pop(hash_, None)
        if descriptor is not None:
            os.close(descriptor)

    def duplicate(self, digest: Digest) -> int:
        """A descriptor of a blob, which the caller owns.

        Raises:
            BlobNotFound: It is not here.
        """
        with self._lock_of_files:
            if (descriptor := self._sealed.get(digest.hash)) is None:
                raise BlobNotFound("the blob is not in memory", metadata={"hash": digest.hash})
            return os.dup(descriptor)
