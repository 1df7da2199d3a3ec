"""Which uploads to OCI registries are unfinished, and where they go on: one small file each.

Nothing here must be true: a place that the target has forgotten, or that was not noted, costs bytes that are sent once
more. So nothing is fsynced, and a disk that is full ends no push. The target alone says how far an upload is, and
checks the sha256 when it ends.
"""

import hashlib
import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from helios.registry.manifest import Digest


class PushJournal:
    """The unfinished uploads of one registry. Blocks for as long as a small file takes."""

    def __init__(self, directory: Path, *, keep_seconds: float) -> None:
        """Takes a directory of its own; places may hold what lets others write there, so nobody else may read it."""
        self._directory = directory
        self._keep_seconds = keep_seconds

    def open(self) -> None:
        """Makes the directory, and forgets what is too old."""
        self._directory.mkdir(exist_ok=True, mode=0o700)
        self.tidy()

    def tidy(self) -> None:
        """Forgets what is too old."""
        oldest = datetime.now(UTC).timestamp() - self._keep_seconds
        for path in self._directory.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime <= oldest:
                    path.unlink()

    def note(self, repository: str, digest: Digest, place: str) -> None:
        """Remembers where an upload goes on, if the disk takes it."""
        path = self._path(repository, digest)
        beside = path.with_suffix(".new")
        with suppress(OSError):
            beside.write_text(json.dumps({"place": place}))
            beside.replace(path)

    def recall(self, repository: str, digest: Digest) -> str:
        """Returns where an upload goes on; empty where none is known."""
        try:
            place = json.loads(self._path(repository, digest).read_bytes())["place"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return place if isinstance(place, str) else ""

    def forget(self, repository: str, digest: Digest) -> None:
        """Forgets an upload that has ended."""
        with suppress(OSError):
            self._path(repository, digest).unlink()

    def _path(self, repository: str, digest: Digest) -> Path:
        return self._directory / hashlib.sha256(f"{repository} {digest}".encode()).hexdigest()
