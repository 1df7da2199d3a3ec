"""Reading a blob as the disk has it now, to compare it with its name.

A blob was verified when it was committed and is not hashed again when it is lent: a scrub is what finds bits that
flipped since. It reads past the page cache (O_DIRECT) where the file system allows, because pages that are in memory
hide what the disk holds, and because gigabytes that nobody asked for would push out what replicas map. Blocks; runs in
a pool thread.
"""

import errno
import hashlib
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from helios.mesh.errors import Unavailable
from helios.storage.fetch import FetchToken

_BUFFER_BYTES = 4 << 20
"""4 MiB: as fast as larger ones, and what is read beyond a rate limit at once stays short."""

_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a file is.

    Attributes:
        hash: Its sha256.
        size_bytes: Its size.
        read_seconds: How long reading took, without hashing and without waiting for the rate limit.
        is_direct: Whether the bytes came from the disk and not from memory.
    """

    hash: str
    size_bytes: int
    read_seconds: float
    is_direct: bool


def read_blob(path: Path, token: FetchToken, *, bytes_per_second: float) -> ReadResult:
    """Reads a file and hashes it, no faster than `bytes_per_second` (0: as fast as it goes).

    Raises:
        Unavailable: TIER_FAILED, when it can't be read; FetchCancelled.
    """
    try:
        descriptor, is_direct = _open(path)
    except OSError as error:
        raise _read_error(error, path) from error
    try:
        with mmap.mmap(-1, _BUFFER_BYTES) as pages, memoryview(pages) as buffer:
            return _read(descriptor, buffer, token, is_direct=is_direct, bytes_per_second=bytes_per_second)
    except OSError as error:
        raise _read_error(error, path) from error
    finally:
        os.close(descriptor)


def read_memory(descriptor: int, token: FetchToken, *, bytes_per_second: float = 0.0) -> ReadResult:
    """Reads a file that lies in memory and hashes it, no faster than `bytes_per_second`; closes its descriptor.

    Raises:
        FetchCancelled: The token was cancelled.
        OSError: It can't be read.
    """
    try:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        # Nothing of it lies in the page cache beside, so that there is nothing to drop.
        return _read(descriptor, buffer, token, is_direct=True, bytes_per_second=bytes_per_second)
    finally:
        os.close(descriptor)


def _read(
    descriptor: int, buffer: memoryview, token: FetchToken, *, is_direct: bool, bytes_per_second: float
) -> ReadResult:
    sha256 = hashlib.sha256()
    offset, read_seconds = 0, 0.0
    started_at = time.monotonic()
    while True:
        before = time.monotonic()
        count = os.preadv(descriptor, [buffer], offset)
        read_seconds += time.monotonic() - before
        sha256.update(buffer[:count])
        if not is_direct:
            # Only pages that nobody maps go: the kernel keeps those of replicas.
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        offset += count
        token.advance(count)
        if bytes_per_second > 0:
            token.wait(started_at + offset / bytes_per_second - time.monotonic())
        # A direct read from the end on, which is seldom a block's, would be refused.
        if count < len(buffer):
            return ReadResult(sha256.hexdigest(), offset, read_seconds, is_direct)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT), _DIRECT != 0
    except OSError as error:
        # A tmpfs of an older kernel, and some network file systems, have no direct reads.
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags), False


def _read_error(error: OSError, path: Path) -> Unavailable:
    return Unavailable(
        f"a blob of the tier can't be read: {error.strerror}",
        reason="TIER_FAILED",
        metadata={"errno": errno.errorcode.get(error.errno or 0, "UNKNOWN"), "hash": path.name},
    )
