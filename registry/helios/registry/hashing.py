"""Reading a file once: its sha256, progress, a way to stop, and whether it stayed the same meanwhile."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from helios.mesh.errors import Conflict
from helios.mesh.transfer.disk import PartFile
from helios.registry import offload
from helios.registry.manifest import Digest

OnBytes = Callable[[int], None]

# 1 MiB: fits a core's cache, so that what was read to be hashed is still there when it is written.
BUFFER_BYTES: Final = 1 << 20
# How much is written before the kernel is asked to bring it to the disk: large enough for the disk to stream.
_WRITE_BACK_BYTES: Final = 8 << 20
# A page at each of 64 places: that takes no time, and finds a fine-tune that changed a tenth of its weights.
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def hash_file(path: Path, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Returns a file's digest, telling ``on_bytes`` of each buffer's length. Blocking; raises OSError."""
    with path.open("rb", buffering=0) as file:
        return pump(file, None, on_bytes, stop)


def copy_file(source: BinaryIO, target: Path, mode: int, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Copies a file to a new one of this mode and syncs that; returns its digest.

    The bytes are read once, and go to the disk while later ones are hashed. All room is taken first: a full disk says
    so before gigabytes were read, and the file is not scattered.

    Raises:
        Conflict: SOURCE_CHANGED, it grew.
        OSError: It can't be read, or the target can't be written.
    """
    with PartFile(target, os.fstat(source.fileno()).st_size) as file:
        digest = pump(source, file, on_bytes, stop)
        # It is durable with what is synced after it.
        target.chmod(mode)
        file.sync()
        return digest


def pump(source: BinaryIO, target: PartFile | None, on_bytes: OnBytes, stop: offload.Stop) -> Digest:
    """Reads a file to its end, copying it where there is a target; returns its digest.

    Raises:
        Conflict: SOURCE_CHANGED, it grew.
        OSError: It can't be read, or the target can't be written.
    """
    hasher, size, settled = hashlib.sha256(), 0, 0
    # A file that grows as fast as it is read would never end.
    limit = os.fstat(source.fileno()).st_size
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        stop.check()
        hasher.update(buffer[:count])
        if target is not None:
            target.write(size, buffer[:count])
        size += count
        if size > limit:
            raise changed(source.name)
        if target is not None and size - settled >= _WRITE_BACK_BYTES:
            target.start_writeback(settled, size - settled)
            settled = size
        on_bytes(count)
    return Digest(hasher.hexdigest(), size)


def looks_alike(one: BinaryIO, other: BinaryIO) -> bool:
    """Returns whether two files of one size are the same at some places; then they may be. Blocking; raises OSError."""
    size = os.fstat(one.fileno()).st_size
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    return all(
        os.pread(one.fileno(), _SAMPLE_BYTES, at) == os.pread(other.fileno(), _SAMPLE_BYTES, at)
        for at in range(0, size, step)
    )


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
