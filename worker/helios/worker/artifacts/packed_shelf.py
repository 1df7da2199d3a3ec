"""The node's own directory of packed weights, as artifacts go into it and come out of it. Blocks; asyncio is elsewhere.

They are as large as the weights, and nothing is written to them once they are there. So both ways files are linked
where they can be, instead of being copied.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from helios.mesh.errors import Corrupted
from helios.worker.artifacts.shelf import Cancelled
from helios.worker.replica.artifact_directory import PROVEN, use_existing
from helios.worker.replica.packed_weights import MANIFEST, WEIGHTS, is_unfit, read_manifest
from helios.worker.replica.packed_writer import bring_in


class PackedShelf:
    """Artifacts of packed weights by key, below one root."""

    def __init__(self, root: Path, *, offered_bytes: int) -> None:
        """Takes up to which size others may have them; 0: none."""
        self._root = root
        self._offered_bytes = offered_bytes

    def has(self, key: str) -> bool:
        """Returns whether there is one of this key."""
        return (self._root / key).is_dir()

    def is_offered(self, key: str) -> bool:
        """Returns whether others may have it: a start with it went well, and it is not too large."""
        path = self._root / key
        try:
            size_bytes = (path / WEIGHTS).stat().st_size
            is_good = not read_manifest(path).refusal and (path / PROVEN).exists() and not is_unfit(path)
        except (OSError, Corrupted):
            return False
        return is_good and size_bytes <= self._offered_bytes

    def install(self, key: str, files: Path, stop: threading.Event) -> str:
        """Makes an artifact of what is lent; returns its state, as ``state`` does.

        Raises:
            Corrupted: It is none of this key, or is damaged.
            Cancelled: ``stop`` was set; nothing is left.
            DiskFull: It would take the disk's last tenth.
            OSError: The disk refuses, or it is being made by somebody else; nothing is left.
        """

        def check() -> None:
            if stop.is_set():
                raise Cancelled

        bring_in(str(self._root), key, files, check)
        return self.state(key)

    def state(self, key: str) -> str:
        """Returns what changes when there is another one of this key; empty where there is none."""
        try:
            weights = (self._root / key / WEIGHTS).stat()
        except FileNotFoundError:
            return ""
        return f"{weights.st_dev}:{weights.st_ino}:{weights.st_mtime_ns}"

    def pack(self, key: str, into: Path) -> Mapping[str, Path]:
        """Links its files below ``into``, so that they stay while they are sent; returns them by their path.

        Raises:
            OSError: It is gone, or the disk can't link.
        """
        held = use_existing(self._root / key)
        if held is None:
            raise FileNotFoundError(key)
        try:
            for name in (MANIFEST, WEIGHTS):
                os.link(held.path / name, into / name)
        finally:
            held.release()
        return {name: into / name for name in (MANIFEST, WEIGHTS)}
