"""Layers that are archives, unpacked beside the other files of a model: safely, and in bounded memory.

An archive comes from anywhere, so nothing in it decides where bytes go, how much room they take, or how much memory:
paths are checked as a manifest's are, each file is new, links and whatever else is no plain file are refused, a file
that does not fit the disk is refused before its first byte, and what decompresses has a bound of its own. Blocks.
"""

import gzip
import hashlib
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from helios.registry import offload
from helios.registry.manifest import MAX_ENTRIES, check_path
from helios.registry.sources.tar_stream import Member, TarReader
from helios.registry.strict_json import malformed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKINGS: Final = frozenset({"tar", "tar+gzip", "tar+zstd"})
"""As the media types of CNCF ModelPack end."""

_MAX_WINDOW_LOG: Final = 27
"""128 MiB of memory, which zstd's own tool allows itself: more is only made by `--long=28` and above."""

_PIECE_BYTES: Final = 1 << 20
_DAMAGED: Final = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError)


@dataclass(frozen=True, slots=True)
class UnpackedFile:
    """A file that was in an archive, and where it is now."""

    path: str
    location: Path
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class Unpacker:
    """Unpacks the archives of one model into one directory.

    Attributes:
        directory: Empty at first, and the caller's.
        takes: Which paths are wanted; others are passed over.
        require_space: Raises DiskFull unless the disk can take so many bytes more.
        on_bytes: Told how many bytes of the archives were read.
    """

    directory: Path
    takes: Callable[[str], bool]
    require_space: Callable[[int], None]
    on_bytes: Callable[[int], None]
    files: dict[str, UnpackedFile] = field(default_factory=dict)

    def unpack(self, archive: Path, packing: str, what: str, stop: offload.Stop) -> None:
        """Adds the files of an archive.

        Args:
            archive: Complete, with the sha256 that was promised.
            packing: One of PACKINGS.
            what: Its name for messages.
            stop: Asked at each piece.

        Raises:
            InvalidRequest: UNSUPPORTED_FORMAT, INVALID_MANIFEST: it is broken, or has what must not be in it.
            DiskFull: A file does not fit.
        """
        try:
            with archive.open("rb") as raw, _open(raw, packing) as stream:
                counted = 0

                def read(count: int) -> bytes:
                    nonlocal counted
                    stop.check()
                    piece: bytes = stream.read(min(count, _PIECE_BYTES))
                    self.on_bytes(raw.tell() - counted)
                    counted = raw.tell()
                    return piece

                reader = TarReader(read, what)
                for member in reader.members():
                    self._take(member, reader, what)
        except _DAMAGED as error:
            raise malformed(f"{what} can't be unpacked: it is damaged, or packed otherwise than it says") from error

    def _take(self, member: Member, reader: TarReader, what: str) -> None:
        path = member.path.removeprefix("./")
        check_path(path)
        if not self.takes(path):
            for _ in reader.content(_PIECE_BYTES):
                pass
            return
        if path in self.files:
            raise malformed(f"{what} has {path[:100]!r}, which was there already")
        if len(self.files) >= MAX_ENTRIES:
            raise malformed(f"{what} has more than {MAX_ENTRIES} files")
        self.require_space(member.size_bytes)
        # Names of its own: paths of archives could not stand side by side on every disk.
        location = self.directory / str(len(self.files))
        sha256 = hashlib.sha256()
        with location.open("xb") as target:
            for piece in reader.content(_PIECE_BYTES):
                sha256.update(piece)
                target.write(piece)
        self.files[path] = UnpackedFile(path, location, member.size_bytes, sha256.hexdigest())


def _open(raw: IO[bytes], packing: str) -> AbstractContextManager[Any]:
    if packing == "tar+gzip":
        return gzip.GzipFile(fileobj=raw)
    if packing == "tar+zstd":
        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})
    return raw
