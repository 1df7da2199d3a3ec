"""What a crash must not forget of uploads in parts: which upload it was, and which parts the store has taken.

    <directory>/<sha256 of the blob>.jsonl
        {"store": …, "key": …, "upload": …, "part_bytes": …}       the first line
        {"part": 3, "sha256": …, "tag": …}                         one for each part, in the order of their arrival

Each line is appended and fsynced before the upload goes on, so the journal never claims what is not so; a line that a
crash tore is left out, which costs one part. A part is used again only if the file still has its sha256 there. It is a
memory aid: without it an upload begins anew, and what the store had of it is swept.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from helios.mesh.files import sync_directory


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the store has: what it hashes to, and the store's name for it."""

    sha256: str
    tag: str


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload as it was when the journal was read.

    Attributes:
        store: URL of the blob store.
        key: The blob's key in it.
        upload: The store's name for the upload.
        part_bytes: Size of every part but the last.
        parts: By number, from 1.
    """

    store: str
    key: str
    upload: str
    part_bytes: int
    parts: Mapping[int, Part] = field(default_factory=dict)


class JournalFile:
    """An open journal of one upload. ``note`` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # What was being written when a crash came would make one unreadable line of itself and what is appended.
        os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def note(self, number: int, part: Part) -> None:
        """Remembers a part that the store has confirmed."""
        self._append({"part": number, "sha256": part.sha256, "tag": part.tag})

    def begin(self, upload: Upload) -> None:
        """Starts the journal over with a new upload."""
        with self._lock:
            os.ftruncate(self._descriptor, 0)
        header = {"store": upload.store, "key": upload.key, "upload": upload.upload, "part_bytes": upload.part_bytes}
        self._append(header)
        sync_directory(self._path.parent)

    def remove(self) -> None:
        """Forgets the upload."""
        self._path.unlink(missing_ok=True)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            os.write(self._descriptor, line)
            os.fsync(self._descriptor)


class UploadJournal:
    """The journals of a registry's uploads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, hash_: str) -> JournalFile:
        """Opens the journal of a blob's upload, making it where there is none."""
        self._directory.mkdir(exist_ok=True, mode=0o700)
        return JournalFile(self._path(hash_))

    def read(self, hash_: str) -> Upload | None:
        """Returns what is known of a blob's upload; None where that is nothing."""
        try:
            return parse_journal(self._path(hash_).read_bytes())
        except FileNotFoundError:
            return None

    def stale(self, *, before: datetime) -> Iterator[tuple[str, Upload | None]]:
        """Yields hash and upload of the journals that were last written before this moment."""
        for path in sorted(self._directory.glob("*.jsonl")):
            if datetime.fromtimestamp(path.stat().st_mtime, UTC) < before:
                yield path.stem, self.read(path.stem)

    def uploads(self) -> frozenset[str]:
        """Returns the store's names of all uploads that are known."""
        found = (self.read(path.stem) for path in self._directory.glob("*.jsonl"))
        return frozenset(upload.upload for upload in found if upload is not None)

    def remove(self, hash_: str) -> None:
        """Forgets a blob's upload."""
        self._path(hash_).unlink(missing_ok=True)

    def _path(self, hash_: str) -> Path:
        return self._directory / f"{hash_}.jsonl"


def parse_journal(content: bytes) -> Upload | None:
    """Reads a journal as far as it is whole; None without a whole header."""
    header: Upload | None = None
    parts: dict[int, Part] = {}
    # What follows the last newline was being written when the crash came.
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
            if header is None:
                header = Upload(record["store"], record["key"], record["upload"], int(record["part_bytes"]), parts)
            else:
                parts[int(record["part"])] = Part(record["sha256"], record["tag"])
        except (ValueError, KeyError, TypeError):
            break
    return header
