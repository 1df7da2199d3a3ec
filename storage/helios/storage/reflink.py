"""Sharing the room of chunks that two blobs have in common, on file systems that can (XFS, btrfs).

A chunk that was copied from another blob of the tier need not lie on the disk twice. FIDEDUPERANGE rather than
FICLONERANGE: the kernel compares the bytes itself, with both files locked, and shares only what is equal, so that no
mistake made here can put a wrong byte into a blob that was verified. It shares whole blocks: of a chunk the aligned
interior, and nothing where it lies differently within a block in the two files. Blocks; any thread may call it.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

# Source: linux/fs.h, _IOWR(0x94, 54, struct file_dedupe_range); include/uapi since Linux 4.5.
_FIDEDUPERANGE: Final = 0xC0189436
# struct file_dedupe_range and one file_dedupe_range_info.
_REQUEST: Final = struct.Struct("=QQHHI qQQiI")
_STEP_BYTES: Final = 16 << 20
"""Most that file systems take at once (btrfs); XFS takes more, and is not faster with it."""

_NOT_HERE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ENOSYS})
"""The file system, or the kernel, has none of it: the copy stays a copy."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a file whose bytes were copied from another one."""

    offset: int
    length: int
    source: Path
    source_offset: int


def share_copies(
    path: Path, copies: Sequence[Copy], *, ioctl: Callable[[int, int, bytearray], int] = fcntl.ioctl
) -> int:
    """Has a file share blocks with the files that its parts were copied from; returns the bytes that this saved.

    Never fails: what can't be shared stays as it is. The file is not read-only yet; its bytes do not change.
    """
    saved_bytes = 0
    with ExitStack() as stack, suppress(OSError):
        target = _open(stack, path, os.O_RDWR)
        block_bytes = os.fstat(target).st_blksize
        sources: dict[Path, int] = {}
        for copy in _joined(copies):
            if copy.source not in sources:
                sources[copy.source] = _open(stack, copy.source, os.O_RDONLY)
            interior = _interior(copy, block_bytes)
            if interior is None:
                continue
            try:
                saved_bytes += _share(target, sources[copy.source], *interior, ioctl=ioctl)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    # On another file system; the next copy may come from this one.
                    continue
                if error.errno not in _NOT_HERE:
                    log.warning("blocks not shared", path=str(path), error=str(error))
                return saved_bytes
    return saved_bytes


def _joined(copies: Sequence[Copy]) -> list[Copy]:
    """The parts by offset, those that follow each other in both files as one: blocks between them are whole then."""
    joined: list[Copy] = []
    for copy in sorted(copies, key=lambda each: each.offset):
        if joined and _follows(joined[-1], copy):
            joined[-1] = replace(joined[-1], length=joined[-1].length + copy.length)
        else:
            joined.append(copy)
    return joined


def _follows(first: Copy, second: Copy) -> bool:
    ends = (first.source, first.offset + first.length, first.source_offset + first.length)
    return ends == (second.source, second.offset, second.source_offset)


def _open(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _interior(copy: Copy, block_bytes: int) -> tuple[int, int, int] | None:
    """The whole blocks of a part: where they are here, where in the source, how many bytes; None: there are none."""
    skipped = -copy.offset % block_bytes
    length = (copy.length - skipped) // block_bytes * block_bytes
    if length <= 0 or (copy.offset - copy.source_offset) % block_bytes:
        return None
    return copy.offset + skipped, copy.source_offset + skipped, length


def _share(
    target: int,
    source: int,
    offset: int,
    source_offset: int,
    length: int,
    *,
    ioctl: Callable[[int, int, bytearray], int],
) -> int:
    shared_bytes = 0
    while shared_bytes < length:
        step = min(_STEP_BYTES, length - shared_bytes)
        at, source_at = offset + shared_bytes, source_offset + shared_bytes
        request = bytearray(_REQUEST.pack(source_at, step, 1, 0, 0, target, at, 0, 0, 0))
        ioctl(source, _FIDEDUPERANGE, request)
        *_, done_bytes, status, _ = _REQUEST.unpack(request)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        if status or not done_bytes:
            # They differ, which nobody believes: what was copied was compared with the chunk's name.
            break
        shared_bytes += done_bytes
    return shared_bytes
