"""What of an unfinished transfer survives a crash.

    <target>            the blob's bytes, at their final offsets, with holes where chunks are missing
    <target>.journal    one line of JSON: of what these are bytes; then 40 bytes a chunk: its index, its BLAKE3

A record is written after the chunk's bytes were synced, so it is usually true, and is never believed: a chunk counts
after it was read back and has that BLAKE3. So a torn record, a lost one or one that outran its bytes costs one chunk's
fetch, and the journal itself needs no fsync.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_RECORD = struct.Struct(">Q32s")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """Of what the chunks are; claims of anything else are worth nothing."""

    size_bytes: int
    sha256: str
    """Of the whole blob; empty where it is not known beforehand."""
    etag: str
    grid: str
    """How the blob is cut."""


class Journal:
    """An open journal. Blocking; used by one thread at a time; raises OSError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, target: Path, header: JournalHeader) -> tuple["Journal", dict[int, bytes]]:
        """Opens the journal of a target, and returns what it claims: BLAKE3 by index of chunk.

        One of other bytes, or without its target, is begun anew.
        """
        descriptor = os.open(journal_path(target), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        journal = cls(descriptor)
        try:
            wanted = json.dumps({"version": _VERSION, **asdict(header)}).encode() + b"\n"
            content = _read_all(descriptor)
            if not target.exists() or not content.startswith(wanted):
                os.ftruncate(descriptor, 0)
                _append(descriptor, wanted)
                return journal, {}
            records = content[len(wanted) :]
            whole_bytes = len(records) // _RECORD.size * _RECORD.size
            # A record that was torn would put all that follow at the wrong place.
            os.ftruncate(descriptor, len(wanted) + whole_bytes)
            return journal, dict(_RECORD.iter_unpack(records[:whole_bytes]))
        except BaseException:
            journal.close()
            raise

    def append(self, claims: Mapping[int, bytes]) -> None:
        """Notes chunks whose bytes are on the disk."""
        _append(self._descriptor, b"".join(_RECORD.pack(index, blake3) for index, blake3 in claims.items()))

    def close(self) -> None:
        """Closes the file, which stays."""
        os.close(self._descriptor)


def journal_path(target: Path) -> Path:
    """Where the journal of a target is."""
    return target.with_name(f"{target.name}.journal")


def discard(target: Path) -> None:
    """Removes an unfinished transfer. Idempotent."""
    journal_path(target).unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _read_all(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _append(descriptor: int, data: bytes) -> None:
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while data:
        count = os.pwrite(descriptor, data, end)
        data, end = data[count:], end + count
