"""The registry's directory: one process owns it, and what an earlier one left half done is cleared away.

registry.db     models, revisions, aliases, policies
blobs/          the blob store, where it is a directory
downloads/      files on their way here, as far as they came; they outlive the process
uploads/        which parts of unfinished uploads an object store has
work/           conversions on their way; empty at start
lock            held while a registry runs on the directory
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helios.mesh.errors import PreconditionFailed
from helios.mesh.file_system import FileSystem, LocalFileSystem, make_durable_directory


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Paths below a registry's directory."""

    root: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "registry.db"

    @property
    def blobs(self) -> Path:
        """Root of the blob store."""
        return self.root / "blobs"

    @property
    def uploads(self) -> Path:
        """Journals of uploads to an object store; they outlive the process."""
        return self.root / "uploads"

    @property
    def downloads(self) -> Path:
        """Unfinished downloads: on the blobs' disk, so that they become blobs by renames."""
        return self.root / "downloads"

    @property
    def pushes(self) -> Path:
        """Notes of unfinished uploads to OCI registries; they outlive the process."""
        return self.root / "pushes"

    @property
    def work(self) -> Path:
        """Where conversions write: beside the blobs, so that their output becomes blobs by renames."""
        return self.root / "work"

    @contextmanager
    def owned(self, files: FileSystem | None = None) -> Iterator["StateDirectory"]:
        """Makes the directory this process's for the length of the block, with an empty ``work``.

        Args:
            files: What makes names durable.

        Raises:
            PreconditionFailed: STATE_DIRECTORY_IN_USE, another registry runs on it.
        """
        files = files or LocalFileSystem()
        if not self.root.is_dir():
            make_durable_directory(files, self.root.parent)
            self.root.mkdir(exist_ok=True, mode=0o700)
            files.sync_directory(self.root.parent)
        # The kernel drops the lock with the process, however it ends.
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PreconditionFailed(
                    f"another registry runs on {self.root}; stop it or choose another state directory",
                    reason="STATE_DIRECTORY_IN_USE",
                ) from error
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(exist_ok=True)
            self.blobs.mkdir(exist_ok=True)
            # At every start: the one that made the directories may have been killed before it came to this.
            files.sync_directory(self.root)
            yield self
        finally:
            os.close(descriptor)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yields an empty directory that is removed with all it holds at the end of the block."""
        path = Path(tempfile.mkdtemp(dir=self.work))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
