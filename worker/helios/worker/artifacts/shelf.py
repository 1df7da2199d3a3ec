"""The node's own directory of compiled code, as artifacts go into it and come out of it. Blocks; asyncio is elsewhere.

What is installed appears by one rename, whole or not at all. What goes out is what a compiler has left in peace: looked
at before and after it was packed.
"""

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from helios.mesh.errors import Corrupted
from helios.worker.artifacts.archive import files_below, pack, unpack
from helios.worker.replica.artifact_directory import PROVEN, use_existing

_ARCHIVE: Final = "files.tar"
# Before the rename; swept when a worker starts, which is alone on its directory.
_UNFINISHED: Final = "new-"


class Cancelled(Exception):
    """Nobody waits for the work any more."""


class CompileShelf:
    """Directories of compiled code by key, below one root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def sweep(self) -> None:
        """Removes what a killed worker left half installed."""
        for path in self._root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)

    def has(self, key: str) -> bool:
        """Returns whether there is a directory for this key, whatever it holds."""
        return (self._root / key).is_dir()

    def is_offered(self, key: str) -> bool:
        """Returns whether others may have it: compiled code is small, and takes a minute or more to make."""
        return self.has(key)

    def install(self, key: str, files: Path, stop: threading.Event) -> str:
        """Makes the directory of a key from an artifact's files; returns its state, as ``state`` does.

        Args:
            key: The artifact's key; there is no such directory.
            files: Directory with the artifact's files, verified.
            stop: Set when nobody waits any more.

        Raises:
            Corrupted: It is no archive that ``pack`` made.
            Cancelled: ``stop`` was set; nothing is left.
            OSError: The disk refuses, or there is such a directory by now; nothing is left.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        unfinished = self._root / f"{_UNFINISHED}{secrets.token_hex(8)}"

        def check() -> None:
            if stop.is_set():
                raise Cancelled

        try:
            unfinished.mkdir()
            unpack(files / _ARCHIVE, unfinished, check)
            # A mark that somebody sent says nothing of what happens here.
            (unfinished / PROVEN).unlink(missing_ok=True)
            _rebase_groups(unfinished, self._root / key)
            state = _state(unfinished)
            check()
            unfinished.rename(self._root / key)
            return state
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def state(self, key: str) -> str:
        """Returns what changes when a file of the directory comes, goes or is written; empty where there is none."""
        return _state(self._root / key) if self.has(key) else ""

    def pack(self, key: str, into: Path) -> Mapping[str, Path]:
        """Writes what is kept under a key to files in ``into``; returns them by their path in the artifact.

        Raises:
            OSError: The directory is gone, or the disk refuses.
        """
        held = use_existing(self._root / key)
        if held is None:
            raise FileNotFoundError(key)
        try:
            pack(held.path, into / _ARCHIVE, _is_wanted)
        finally:
            held.release()
        return {_ARCHIVE: into / _ARCHIVE}


def _rebase_groups(directory: Path, final: Path) -> None:
    """Has Triton's groups of files name them where they will be: it keeps absolute paths, all below one directory.

    Source: triton.runtime.cache.FileCacheManager.put_group.
    """
    for path in directory.rglob("__grp__*.json"):
        place = final / path.relative_to(directory).parent
        try:
            group = json.loads(path.read_bytes())
            names = {name: str(place / PurePosixPath(member).name) for name, member in group["child_paths"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupted(f"a group of compiled files can't be read: {path.name}") from error
        path.write_text(json.dumps(group | {"child_paths": names}))


def _state(directory: Path) -> str:
    lines = [
        f"{path}\0{status.st_size}\0{status.st_mtime_ns}" for path, status in files_below(directory) if _is_wanted(path)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_wanted(path: PurePosixPath) -> bool:
    """Whether a file is part of the artifact: not our own mark, and not the locks that compilers leave."""
    return path.name != PROVEN and path.suffix != ".lock"
