"""The file that a transfer writes: chunks at their offsets, room taken beforehand, write-back begun early. Blocking."""

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from blake3 import blake3

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_READ_BYTES = 1 << 20
"""1 MiB: fits a core's cache, so that what is read from memory to be hashed is read there once."""


class PartFile:
    """A file that becomes whole. Thread-safe as far as ranges don't overlap; raises OSError."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Opens or makes the file, and takes all its room: a full disk says so before gigabytes were read."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except PermissionError:
            # Whole, and made read-only by a process that was killed before it gave the file its name.
            path.chmod(0o600)
            self._descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(self._descriptor).st_size > size_bytes:
                os.ftruncate(self._descriptor, size_bytes)
            if size_bytes:
                os.posix_fallocate(self._descriptor, 0, size_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, offset: int, piece: memoryview) -> None:
        """Writes a whole piece."""
        while piece:
            count = os.pwrite(self._descriptor, piece, offset)
            piece, offset = piece[count:], offset + count

    def start_writeback(self, offset: int, count: int) -> None:
        """Has the kernel write a range now, so that the sync at the end finds little left to do.

        Best effort: where the call is not to be had, the sync does all of it. Source: sync_file_range(2).
        """
        if _sync_file_range is not None:
            _sync_file_range(self._descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Reads what is there; less than the buffer only at the file's end."""
        return os.preadv(self._descriptor, [buffer], offset)

    def blake3(self, offset: int, length: int) -> bytes:
        """Hashes a range as it is on the disk."""
        hasher = blake3()
        buffer = memoryview(bytearray(min(_READ_BYTES, length)))
        end = offset + length
        while offset < end and (count := self.read_into(offset, buffer[: end - offset])):
            hasher.update(buffer[:count])
            offset += count
        return hasher.digest()

    def sha256(self, size_bytes: int, on_hashed: Callable[[int], None]) -> str:
        """Hashes the file from its beginning; `on_hashed` gets how far it is, and ends it by raising."""
        hasher = hashlib.sha256()
        buffer = memoryview(bytearray(min(_READ_BYTES, max(1, size_bytes))))
        offset = 0
        while offset < size_bytes and (count := self.read_into(offset, buffer[: size_bytes - offset])):
            hasher.update(buffer[:count])
            offset += count
            on_hashed(offset)
        return hasher.hexdigest()

    def sync(self) -> None:
        """Brings everything that was written to the disk, the file's size included."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; what was not synced may be lost."""
        os.close(self._descriptor)
