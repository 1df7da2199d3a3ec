"""The files that a start of a revision will read, held in memory: what a staged model is.

They are the revision's own, as the storage agent lends them. Where replicas map packed weights, no start reads the
checkpoint any more, and what is held in its place is the artifact that starts of the revision used last. Only a proven
one: a start that finds its artifact to be no good reads the checkpoint.
"""

from pathlib import Path
from typing import Final

from helios.worker.replica.artifact_directory import ArtifactDirectory, is_at, use_existing
from helios.worker.replica.packed_weights import find_proven
from helios.worker.supervisor.resident_files import ResidentFiles

_CHECKPOINT: Final = ".safetensors"


class StartFiles:
    """Files of one revision, mapped, and in use as long as they are. Every method blocks; any thread may call it.

    Attributes:
        files: The files.
        is_packed: Whether packed weights are among them, in place of the checkpoint.
    """

    def __init__(self, directory: Path, revision: str, packed_root: Path | None) -> None:
        """Maps them, and reads nothing yet.

        Args:
            directory: The revision's files.
            revision: Its digest.
            packed_root: Where artifacts of packed weights are; None: none are looked for.

        Raises:
            OSError: There are no files, or one can't be opened.
        """
        self._revision = revision
        self._packed_root = packed_root
        self._packed: ArtifactDirectory | None = None
        found = self._find()
        # None too where it goes just now.
        self._packed = use_existing(found) if found is not None else None
        self.is_packed = self._packed is not None
        try:
            self.files = ResidentFiles(self._paths(directory))
        except BaseException:
            self._release()
            raise

    def is_current(self) -> bool:
        """Returns whether a start would read these files, too, and not others by now."""
        found = self._find()
        if found is None or self._packed is None:
            return found is None and self._packed is None
        return is_at(found, self._packed.descriptor)

    def close(self) -> None:
        """Lets go of them. Idempotent."""
        self.files.close()
        self._release()

    def __del__(self) -> None:
        # A task that is cancelled while a thread maps its files never gets to see them.
        self._release()

    def _find(self) -> Path | None:
        return find_proven(self._packed_root, self._revision) if self._packed_root is not None else None

    def _paths(self, directory: Path) -> list[Path]:
        own = [path for path in directory.rglob("*") if path.is_file()]
        if not own:
            raise FileNotFoundError(f"{directory} holds no file")
        if self._packed is not None:
            own = [path for path in own if path.suffix != _CHECKPOINT]
            own += [path for path in self._packed.path.iterdir() if path.is_file()]
        # Two names of one file are mapped once. By inode, for a file in memory has no path to resolve to.
        by_inode = {(status.st_dev, status.st_ino): path for path in sorted(own) for status in (path.stat(),)}
        return sorted(by_inode.values())

    def _release(self) -> None:
        packed, self._packed = self._packed, None
        if packed is not None:
            packed.release()
