"""Directories of start-up artifacts on a node: in use or not, proven or not, removed whole, the longest unused first.

Each is named by the digest of everything that its content depends on and never changed to mean something else, so any
number of replicas use it at once. A node that serves thousands of models would fill its disk with them, so the ones
used longest ago go. One that is in use is locked by whoever uses it: the kernel drops the lock with the last process of
a replica, however it ends, and nobody keeps a list.
"""

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROVEN: Final = "helios-proven"
"""File that says that a replica with this directory became ready, and answered a request or ended as it was told."""

# What one node has artifacts of is some models, each with a few settings.
KEPT: Final = 100
# For compiled code: SmolLM2-135M on a CPU takes 7 MiB; graphs and kernels of many sizes on a GPU take more.
KEPT_BYTES: Final = 4 << 30
_GONE: Final = "gone-"


@dataclass(frozen=True, slots=True)
class ArtifactDirectory:
    """A directory that is in use: it stays until ``release``, or until this process and all that it forked ended."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Lets it go. Once."""
        os.close(self.descriptor)


def use(path: Path) -> ArtifactDirectory:
    """Takes a directory into use, made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Not exist_ok, which looks twice: it may go in between.
        with suppress(FileExistsError):
            path.mkdir()
        if (taken := use_existing(path)) is not None:
            return taken


def use_existing(path: Path) -> ArtifactDirectory | None:
    """Takes a directory into use; None where there is none, or where it is going."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if is_at(path, descriptor):
        # The time of its last use, which decides what goes first.
        os.utime(descriptor)
        return ArtifactDirectory(path, descriptor)
    os.close(descriptor)
    return None


def hold_alone(path: Path) -> int | None:
    """Locks a directory that nobody uses; returns the lock, a descriptor. None where somebody does, or it is not there.

    For whoever fills or removes it: until the descriptor is closed, or given to ``share``, taking it into use waits.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, descriptor):
            return descriptor
    os.close(descriptor)
    return None


def share(descriptor: int) -> None:
    """Makes what ``hold_alone`` gave one use among others: nobody who wants it has to wait, and nobody removes it."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_in_use(path: Path) -> bool:
    """Returns whether somebody uses a directory that is there; what is decided by it may be wrong a moment later."""
    descriptor = hold_alone(path)
    if descriptor is None:
        return path.is_dir()
    os.close(descriptor)
    return False


def is_at(path: Path, descriptor: int) -> bool:
    """Returns whether a directory that was opened is still the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def mark_proven(path: Path) -> None:
    """Notes that a start with this directory ended well. Idempotent. Raises OSError."""
    (path / PROVEN).touch()


def drop(path: Path) -> None:
    """Removes a directory, whoever uses it: what is mapped stays readable for those who have it. Idempotent."""
    with suppress(FileNotFoundError):
        shutil.rmtree(_set_aside(path), ignore_errors=True)


def drop_unproven(path: Path) -> None:
    """Removes a directory whose starts all ended badly so far, unless one is under way.

    What a compiler was killed over may be half a file, and what came from elsewhere may be why a start failed. Raises
    OSError where the disk refuses.
    """
    if path.is_dir() and not (path / PROVEN).exists():
        with suppress(FileNotFoundError):
            _drop_unless_used(path)


def drop_unused(root: Path, *, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> int:
    """Removes what was used longest ago beyond so many directories or bytes, and nothing in use; returns how many.

    Blocks. Raises OSError where the disk refuses.
    """
    if not root.is_dir():
        return 0
    # Left by one that was killed in the middle.
    for path in root.glob(f"{_GONE}*"):
        # Whoever set it aside may be at it.
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    count = size_bytes = dropped = 0
    for path in sorted((path for path in root.iterdir() if path.is_dir()), key=_used_at, reverse=True):
        own_bytes = _size_bytes(path)
        if (count + 1 > kept or size_bytes + own_bytes > kept_bytes) and _drop_unless_used(path):
            dropped += 1
        else:
            count += 1
            size_bytes += own_bytes
    return dropped


def _set_aside(path: Path) -> Path:
    """Takes a directory away by one rename, for the caller to remove; returns where it is.

    So nobody finds half of it, and what a crash leaves of it is in nobody's way until ``drop_unused`` removes it.
    Raises OSError, FileNotFoundError where there is none.
    """
    return path.rename(path.with_name(f"{_GONE}{path.name}-{secrets.token_hex(4)}"))


def _drop_unless_used(path: Path) -> bool:
    lock = hold_alone(path)
    if lock is None:
        return False
    try:
        gone = _set_aside(path)
    finally:
        os.close(lock)
    shutil.rmtree(gone)
    return True


def _used_at(path: Path) -> float:
    return path.stat().st_mtime


def _size_bytes(directory: Path) -> int:
    sizes = 0
    for path in directory.rglob("*"):
        try:
            sizes += path.lstat().st_size
        except FileNotFoundError:
            # A compiler's temporary file.
            continue
    return sizes
