"""The few operations that what is on the disk depends on, behind one port.

What a crash leaves is decided by the order of these calls alone: bytes of a file are on the disk once the file was
synced, names once their directory was. Everything that changes where blobs are goes through here, so that a test
can stand in for the disk, cut the power at each call, and see what the next start makes of it. Data is written through
plain descriptors: until `sync_file`, none of it is worth anything.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from helios.mesh.files import sync_directory


class FileSystem(Protocol):
    """Changes to files and directories. All calls block, are atomic to other processes, and raise OSError.

    Nothing but `sync_file` and `sync_directory` makes anything durable.
    """

    def sync_file(self, descriptor: int) -> None:
        """Makes the bytes, size and mode of an open file durable; not its name."""
        ...

    def sync_directory(self, directory: Path) -> None:
        """Makes the names in a directory durable; not the directory's own name."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file or directory another name; a file that had that name is replaced."""
        ...

    def link(self, source: Path, target: Path, *, symbolic: bool = False) -> None:
        """Gives a file one more name; a hard link follows no symbolic link."""
        ...

    def remove(self, path: Path) -> None:
        """Removes a file, a link or an empty directory."""
        ...

    def make_directory(self, path: Path) -> None:
        """Makes one directory, whose parent is there."""
        ...


class LocalFileSystem:
    """The real one."""

    def sync_file(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_directory(self, directory: Path) -> None:
        sync_directory(directory)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def link(self, source: Path, target: Path, *, symbolic: bool = False) -> None:
        if symbolic:
            target.symlink_to(source)
        else:
            os.link(source, target, follow_symlinks=False)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()

    def make_directory(self, path: Path) -> None:
        path.mkdir()


def make_durable_directory(files: FileSystem, path: Path) -> None:
    """Makes a directory and those above it, each name synced before anything depends on it. Idempotent."""
    if path.is_dir():
        return
    make_durable_directory(files, path.parent)
    with suppress(FileExistsError):
        files.make_directory(path)
    files.sync_directory(path.parent)


def remove_tree(files: FileSystem, path: Path) -> None:
    """Removes a file, a link, or a directory with everything in it; links are not followed.

    A process that is killed in between leaves a part, so only what nobody reads any more is removed this way.
    """
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove_tree(files, child)
    files.remove(path)
