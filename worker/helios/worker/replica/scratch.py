"""A replica's directory for temporary files: sockets of the engine's processes, and whatever libraries leave behind.

Named after the front process, so that whoever learns of its death can remove it, however it died.
"""

import shutil
import tempfile
from pathlib import Path


def make_scratch(pid: int) -> Path:
    """Makes the directory of the calling front process, and the default of ``tempfile`` in it and in its children."""
    path = _scratch(pid)
    # An older process of the same number may have left one.
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    tempfile.tempdir = str(path)
    return path


def remove_scratch(pid: int) -> None:
    """Removes the directory of a front process that is gone or about to go. Idempotent."""
    shutil.rmtree(_scratch(pid), ignore_errors=True)


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


def _prefix() -> str:
    return f"helios-replica-{Path('/proc/self/ns/pid').stat().st_ino}-"
