"""Files held in memory: mapped, read once, and locked where the kernel lets us.

The mapping is shared and read-only, so that the pages are the page cache's own: whoever maps the same file later, a
replica above all, finds them there, and there is one copy on the host. What is locked the kernel can't drop. Without
the right to lock (RLIMIT_MEMLOCK is 8 MiB for most), pages are brought in and stay as long as memory lasts;
`resident_bytes` tells how many are left, `bring_in` reads the rest again.

libc directly: Python's mmap keeps its address to itself, which mlock needs.
"""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

# Source: asm-generic/mman-common.h, Linux 5.14.
_MADV_POPULATE_READ: Final = 22
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
# One step of bringing in: half a tenth of a second of a slow disk, after which a stop is heard.
_WINDOW_BYTES: Final = 32 << 20
# Two threads in windows of 64 MiB: measured best of 1 to 16 threads and 2 to 64 MiB. One waits for the disk while the
# other maps what it read; more of them take turns on one file's lock.
_READERS: Final = 2
_READ_BYTES: Final = 64 << 20

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
_libc.munmap.argtypes = _libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class ResidentFiles:
    """Some files, mapped. Any thread may call anything: what is closed meanwhile is left alone.

    Attributes:
        size_bytes: Of all files together.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Maps the files; an empty one is left out. Raises OSError where one can't be opened."""
        self._parts: list[tuple[int, int]] = []
        # Held for one window at a time: what is being read must not be unmapped.
        self._lock = threading.Lock()
        self._locked: list[tuple[int, int]] = []
        self.size_bytes = 0
        try:
            for path in paths:
                self._map(path)
        except OSError:
            self.close()
            raise

    @property
    def locked_bytes(self) -> int:
        """Of all files together, what the kernel can't drop."""
        return sum(size for _, size in self._locked)

    def bring_in(self) -> None:
        """Reads what is not in memory, and locks what may be locked. Blocks, and ends soon after ``close``.

        Raises OSError where a file can't be read.
        """
        for part in tuple(self._parts):
            address, size = part
            for offset in range(0, size, _WINDOW_BYTES):
                with self._lock:
                    if part not in self._parts:
                        return
                    _populate(address + offset, min(_WINDOW_BYTES, size - offset))
            with self._lock:
                # Refused beyond RLIMIT_MEMLOCK: what the page cache holds is still much better than the disk.
                if part in self._parts and part not in self._locked and _libc.mlock(address, size) == 0:
                    self._locked.append(part)

    def resident_bytes(self) -> int:
        """Counts what is in memory now; 100 GB take 30 ms.

        Of a file that this process neither owns nor may write, the kernel says that all of it is. Source: mincore(2).
        """
        count = 0
        with self._lock:
            for address, size in self._parts:
                flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
                if _libc.mincore(address, size, flags) == 0:
                    count += min(bytes(flags).count(1) * mmap.PAGESIZE, size)
        return count

    def close(self) -> None:
        """Unmaps and unlocks. Idempotent."""
        with self._lock:
            for address, size in self._parts:
                _libc.munmap(address, size)
            self._parts.clear()
            self._locked.clear()

    def __del__(self) -> None:
        # A task that is cancelled while a thread maps its files never gets to see them.
        self.close()

    def _map(self, path: Path) -> None:
        address, size = _map(path)
        if size:
            self._parts.append((address, size))
            self.size_bytes += size


def read_in(paths: Iterable[Path], stop: threading.Event) -> int:
    """Reads files into the page cache, for a loader that maps them; returns their bytes.

    Large reads of several threads in place of a page fault every few pages. What is in memory costs 4 ms a GiB, and
    nothing is copied. Blocks; ends within a window once ``stop`` is set. Raises OSError where a file can't be opened or
    read.
    """
    parts: list[tuple[int, int]] = []
    try:
        parts += (part for part in map(_map, paths) if part[1])
        windows = [(at + offset, min(_READ_BYTES, size - offset)) for at, size in parts for offset in _steps(size)]

        def read(window: tuple[int, int]) -> None:
            if not stop.is_set():
                _populate(*window)

        with ThreadPoolExecutor(_READERS, thread_name_prefix="read ahead") as pool:
            for _ in pool.map(read, windows):
                pass
    finally:
        for address, size in parts:
            _libc.munmap(address, size)
    return sum(size for _, size in parts)


def _steps(size: int) -> range:
    return range(0, size, _READ_BYTES)


def _map(path: Path) -> tuple[int, int]:
    """Maps a file, read-only; returns address and size, both 0 of an empty one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return 0, 0
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, _MAP_FAILED):
        raise _error(path)
    return address, size


def _populate(address: int, size: int) -> None:
    """Brings pages in. Raises OSError where that can't be done: of a bad sector the kernel says EFAULT."""
    if _libc.madvise(address, size, _MADV_POPULATE_READ) == 0:
        return
    if (number := ctypes.get_errno()) != errno.EINVAL:
        # Not to be tried by touching: a page that can't be read is a SIGBUS then, the end of the process.
        raise OSError(number, f"can't read a mapped file: {os.strerror(number)}")
    # An older kernel: each page is touched. string_at copies, so one byte of each.
    for offset in range(0, size, mmap.PAGESIZE):
        ctypes.string_at(address + offset, 1)


def _error(path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"can't map {path}: {os.strerror(number)}")
