"""Where compiled graphs and kernels are kept: a directory named by everything that they depend on.

Code that a compiler made for one model, set of flags, library version and machine is wrong for another, sometimes
silently (an instruction that the processor lacks). So the name is a digest of all of it, and a directory is used by any
number of replicas and never changed to mean something else.

A node that serves thousands of models would fill its disk with these directories, so the ones used longest ago go. One
that is in use is locked by whoever uses it: the kernel drops the lock with the last process of a replica, however it
ends, and nobody keeps a list.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

# Grows when the meaning of the key changes.
_VERSION: Final = 2
PROVEN: Final = "helios-proven"
"""File that says that a replica with this directory became ready, and answered a request or ended as it was told."""

# What one node compiles for is some models, each with a few settings.
KEPT: Final = 100
# SmolLM2-135M on a CPU takes 7 MiB; graphs and kernels of many sizes on a GPU take more.
KEPT_BYTES: Final = 4 << 30
_GONE: Final = "gone-"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileInputs:
    """What compiled code depends on.

    Attributes:
        revision: Digest of the model's revision.
        flags: The engine's arguments that shape the graph; JSON values.
        engine_version: Of vLLM.
        engine_path: Where it is installed: what was traced is known by the absolute paths of its sources.
        torch_version: Of torch, with its build (`2.13.0+cpu`).
        driver: Version of the device's driver and of its runtime; empty on a CPU.
        architecture: What the code runs on: a GPU's name and capability, or a processor's instruction sets.
        thread_count: How many threads each rank computes with: loops are cut for so many.
    """

    revision: str
    flags: Mapping[str, Any]
    engine_version: str
    engine_path: str
    torch_version: str
    driver: str
    architecture: str
    thread_count: int


def inputs_document(inputs: CompileInputs) -> str:
    """Returns all inputs as JSON, the same text for the same inputs: what people read, and what the key is made of."""
    document = {"version": _VERSION, **asdict(inputs)}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def cache_key(inputs: CompileInputs) -> str:
    """Returns the name of what was compiled for these inputs: 64 hexadecimal digits. The order of flags is nothing."""
    return hashlib.sha256(inputs_document(inputs).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """A directory that is in use: it stays until ``release``, or until this process and all that it forked ended."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Lets it go. Once."""
        os.close(self.descriptor)


def use_directory(root: str, inputs: CompileInputs) -> CacheDirectory:
    """Takes the directory for these inputs below ``root``, made where it is not there, into use."""
    path = Path(root) / cache_key(inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Not exist_ok, which looks twice: it may go in between.
        with suppress(FileExistsError):
            path.mkdir()
        if (taken := use_existing(path)) is not None:
            return taken


def use_existing(path: Path) -> CacheDirectory | None:
    """Takes a directory into use; None where there is none, or where it is going."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if is_at(path, descriptor):
        # The time of its last use, which decides what goes first.
        os.utime(descriptor)
        return CacheDirectory(path, descriptor)
    os.close(descriptor)
    return None


def mark_proven(path: Path) -> None:
    """Notes that a start with this directory ended well. Idempotent. Raises OSError."""
    (path / PROVEN).touch()


def drop_unproven(path: Path) -> None:
    """Removes a directory whose starts all ended badly so far, unless one is under way.

    What a compiler was killed over may be half a file, and what came from elsewhere may be why a start failed. Raises
    OSError where the disk refuses.
    """
    if path.is_dir() and not (path / PROVEN).exists():
        with suppress(FileNotFoundError):
            _drop(path)


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
        if (count + 1 > kept or size_bytes + own_bytes > kept_bytes) and _drop(path):
            dropped += 1
        else:
            count += 1
            size_bytes += own_bytes
    return dropped


def set_aside(path: Path) -> Path:
    """Takes a directory away by one rename, for the caller to remove; returns where it is.

    So nobody finds half of it, and what a crash leaves of it is in nobody's way until ``drop_unused`` removes it.
    Raises OSError, FileNotFoundError where there is none.
    """
    return path.rename(path.with_name(f"{_GONE}{path.name}-{secrets.token_hex(4)}"))


def is_at(path: Path, descriptor: int) -> bool:
    """Returns whether a directory that was opened is still the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _drop(path: Path) -> bool:
    with _locked_alone(path) as is_alone:
        if not is_alone:
            return False
        gone = set_aside(path)
    shutil.rmtree(gone)
    return True


@contextmanager
def _locked_alone(path: Path) -> Iterator[bool]:
    """Keeps everybody from taking a directory into use; gives False where somebody has."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


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


def processor_architecture(machine: str, processors: str) -> str:
    """Returns a processor's architecture and a digest of its instruction sets.

    Args:
        machine: Such as ``x86_64``.
        processors: Text of /proc/cpuinfo; empty where there is none.
    """
    lines = (line for line in processors.splitlines() if line.startswith(("flags", "Features")))
    sets = sorted(set(next(lines, "").partition(":")[2].split()))
    return f"{machine}-{hashlib.sha256(' '.join(sets).encode()).hexdigest()[:16]}"
