"""Reading a file once: its sha256, progress, a way to stop, and whether it stayed the same meanwhile."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from helios.mesh.errors import Conflict
from helios.registry import offload
from helios.registry.manifest import Digest

OnBytes = Callable[[int], None]

# 8 MiB: large enough that system calls don't count, small enough to stop within milliseconds.
BUFFER_BYTES: Final = 8 << 20


def hash_file(path: Path, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Returns a file's digest, telling ``on_bytes`` of each buffer's length. Blocking; raises OSError."""
    with path.open("rb", buffering=0) as file:
        return pump(file, None, on_bytes, stop)


def pump(source: BinaryIO, target: BinaryIO | None, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Reads a file to its end, copying it where there is a target; returns its digest.

    Raises:
        Conflict: SOURCE_CHANGED, it grew.
        OSError: It can't be read, or the target can't be written.
    """
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
            raise changed(source.name)
        on_bytes(count)
    return Digest(hasher.hexdigest(), size)


def size_of(path: Path) -> int:
    """Returns a file's size, -1 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def identity(file: BinaryIO) -> tuple[int, int]:
    """Returns what changes with a file's content."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def changed(source: object) -> Conflict:
    """Says that a source changed."""
    return Conflict(f"{source} changed while it was read; ingest it again", reason="SOURCE_CHANGED")
