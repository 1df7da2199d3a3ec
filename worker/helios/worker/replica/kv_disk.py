"""Keeps a replica's KV blocks on disk within what its model's settings allow.

The engine's tier on disk writes a file a block and removes none. It looks for the file each time, takes one that is
not there for a miss and computes the block, so files may be removed beside it. The oldest go first: reading leaves no
trace in a file's times that could be relied upon.
"""

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import structlog

log = structlog.get_logger()

# Removing begins above the one share of the bound and ends below the other: what is written between two looks finds
# room in the rest.
_FULL_RATIO: Final = 0.9
_ROOMY_RATIO: Final = 0.75
_LOOK_SECONDS: Final = 1.0
# Looking takes a microsecond a file; with a million of them it is to take no more than a twentieth of one core.
_PAUSE_RATIO: Final = 20.0


class BlockFile(NamedTuple):
    """A file of blocks, and when it was written."""

    path: Path
    size_bytes: int
    written_at: float


def superfluous(files: Iterable[BlockFile], limit_bytes: int) -> list[BlockFile]:
    """Returns what is to be removed, oldest first; nothing while there is room. Pure."""
    by_age = sorted(files, key=lambda file: file.written_at)
    total_bytes = sum(file.size_bytes for file in by_age)
    if total_bytes <= limit_bytes * _FULL_RATIO:
        return []
    chosen = []
    for file in by_age:
        if total_bytes <= limit_bytes * _ROOMY_RATIO:
            break
        chosen.append(file)
        total_bytes -= file.size_bytes
    return chosen


async def keep_within(directory: Path, limit_bytes: int) -> None:
    """Looks again and again until cancelled."""
    while True:
        began_at = time.monotonic()
        removed_bytes = await asyncio.to_thread(_remove_superfluous, directory, limit_bytes)
        if removed_bytes:
            log.info("KV blocks removed from disk", bytes=removed_bytes)
        await asyncio.sleep(max(_LOOK_SECONDS, _PAUSE_RATIO * (time.monotonic() - began_at)))


def _remove_superfluous(directory: Path, limit_bytes: int) -> int:
    removed_bytes = 0
    for file in superfluous(_files(directory), limit_bytes):
        file.path.unlink(missing_ok=True)
        removed_bytes += file.size_bytes
    return removed_bytes


def _files(directory: Path) -> Iterable[BlockFile]:
    # What the tier says of itself, and what it is just writing, have other endings.
    for path in directory.rglob("*.bin"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield BlockFile(path, status.st_size, status.st_mtime)
