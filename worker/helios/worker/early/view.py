"""A directory that shows a replica the files of its revision, first as they grow and then as they are lent.

    <root>/<replica>          a link to the directory below; once the revision is lent, to the one that the agent lends
    <root>/<replica>.growing  links to descriptors of this process, which follow a file through its renaming

The engine is given the link, so that its path means something for as long as it lives, also after this process.
"""

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from helios.mesh.errors import Corrupted
from helios.worker.early.growth import ToldFile

_GROWING: Final = ".growing"
_NEW: Final = ".new"
MARK: Final = ".helios-growing"
"""A file in the directory as long as what it shows may be unfinished."""


class EarlyView:
    """One replica's view. Blocking for microseconds; used on one event loop. Close it once."""

    def __init__(self, link: Path) -> None:
        self._link = link
        self._directory = link.with_name(link.name + _GROWING)
        self._files: dict[str, tuple[int, tuple[int, int]]] = {}

    def show(self, files: Iterable[ToldFile]) -> None:
        """Shows files that are not shown yet; one that has another name by now is shown when that is told.

        Raises:
            OSError: No descriptors, no room.
            Corrupted: A path leads out of the revision.
        """
        if not self._files:
            _remove(self._directory)
            self._directory.mkdir(parents=True)
            (self._directory / MARK).touch()
            _point(self._link, self._directory)
        for file in files:
            if file.path not in self._files:
                self._show(file)

    def read(self, path: str, length: int) -> bytes:
        """Reads the beginning of a file that is shown; less where it is shorter, or not shown."""
        return os.pread(self._files[path][0], length, 0) if path in self._files else b""

    def lend(self, lent: Path) -> bool:
        """Shows what is lent instead; returns whether that is what was shown, file by file."""
        is_same = all(_identity((lent / path).stat()) == shown for path, (_, shown) in self._files.items())
        _point(self._link, lent)
        self.close()
        return is_same

    def close(self) -> None:
        """Lets go of the files. The link stays, since it may be in use. Idempotent."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()
        _remove(self._directory)

    def _show(self, file: ToldFile) -> None:
        relative = PurePosixPath(file.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise Corrupted(f"the path {file.path!r} leads out of the revision")
        try:
            descriptor = os.open(file.place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        self._files[file.path] = descriptor, _identity(os.fstat(descriptor))
        shown = self._directory / relative
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")


def remove_view(link: Path) -> None:
    """Removes what is left of a replica's view. Idempotent."""
    with suppress(OSError):
        link.unlink(missing_ok=True)
    _remove(link.with_name(link.name + _GROWING))


def sweep(root: Path, living: Collection[str]) -> None:
    """Removes the views of all replicas but those, by the names of their links."""
    with suppress(FileNotFoundError):
        for entry in list(root.iterdir()):
            if entry.name not in living:
                entry.unlink() if entry.is_symlink() else _remove(entry)


def is_growing(model_path: str) -> bool:
    """Whether files of this directory may be unfinished."""
    return Path(model_path, MARK).exists()


def _point(link: Path, target: Path) -> None:
    new = link.with_name(link.name + _NEW)
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
