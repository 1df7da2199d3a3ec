"""A replica's directory for temporary files: sockets of the engine's processes, and whatever libraries leave behind.

Named after the front process, so that whoever learns of its death can remove it, however it died. So is its shared
memory, which a killed process leaves behind for good: Python's by its prefix, and what libraries name after one of
their temporary files by that.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Final

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  where Linux keeps it
# A file's name that is this long is not the beginning of somebody else's by chance.
_TELLING_NAME: Final = 24
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def make_scratch(pid: int) -> Path:
    """Makes the directory of the calling front process, and the default of ``tempfile`` in it and in its children."""
    path = _scratch(pid)
    # An older process of the same number may have left one.
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    tempfile.tempdir = str(path)
    # Not public, and the only way: multiprocessing makes names itself, 14 letters with the prefix.
    setattr(shared_memory, "_SHM_NAME_PREFIX", f"/{shared_memory_prefix(pid)}")  # noqa: B010
    return path


def kv_directory() -> Path:
    """Returns where a replica's engine keeps KV blocks on disk: in its own directory, so that they end with it."""
    return Path(tempfile.gettempdir(), "kv")


def remove_scratch(pid: int) -> None:
    """Removes the directory of a front process that is gone or about to go. Idempotent."""
    for segment in _segments(pid):
        with contextlib.suppress(OSError):
            segment.unlink()
    shutil.rmtree(_scratch(pid), ignore_errors=True)


def shared_memory_prefix(pid: int) -> str:
    """Returns how the names of a replica's shared memory begin: at most 8 letters, for a pid has at most 22 bits."""
    digits = ""
    while pid or not digits:
        pid, digit = divmod(pid, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return f"hr{digits}-"


def sweep_scratch() -> int:
    """Removes the directories of fronts that are gone while nobody looked; returns how many.

    Only those of this pid namespace: containers may share a directory for temporary files, but not their pids.
    """
    prefix = _prefix()
    names = [path.name for path in Path(tempfile.gettempdir()).glob(f"{prefix}*")]
    dead = [pid for name in names if (pid := name.removeprefix(prefix)).isdecimal() and not Path("/proc", pid).exists()]
    for pid in dead:
        remove_scratch(int(pid))
    return len(dead)


def _scratch(pid: int) -> Path:
    # Short: the path of a unix socket has at most 107 bytes, of which vLLM takes 37 for its names.
    directory = Path(tempfile.gettempdir())
    own = f"{_prefix()}{pid}"
    return directory if directory.name == own else directory / own


def _segments(pid: int) -> Iterator[Path]:
    if not _SHARED_MEMORY.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in _scratch(pid).iterdir() if len(path.name) >= _TELLING_NAME]
        for segment in _SHARED_MEMORY.iterdir():
            if segment.name.startswith((shared_memory_prefix(pid), *names)):
                yield segment


def _prefix() -> str:
    return f"helios-replica-{Path('/proc/self/ns/pid').stat().st_ino}-"
