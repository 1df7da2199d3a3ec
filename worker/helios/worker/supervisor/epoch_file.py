"""The highest epoch of a leader, over restarts of the worker: replicas outlive it, and so do leaders of the past."""

from pathlib import Path

import structlog

from helios.mesh.files import write_private

log = structlog.get_logger()


class EpochFile:
    """One number on disk. Written when another proxy comes to lead, which is rare: a blocking write is bearable."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """Returns the epoch; 0 where there is none that can be read."""
        try:
            return max(0, int(self._path.read_text()))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            log.warning("the epoch of the last leader can't be read", path=str(self._path), error=str(error))
            return 0

    def write(self, epoch: int) -> None:
        """Replaces the epoch. A disk that is full costs what a restart knows, and nothing now."""
        try:
            write_private(self._path, str(epoch).encode())
        except OSError as error:
            log.warning("the epoch of the leader can't be kept", path=str(self._path), error=str(error))
