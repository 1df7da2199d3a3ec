"""A file of this machine as a source."""

import os
from pathlib import Path

from helios.mesh.errors import BlobNotFound
from helios.mesh.transfer.source import Sink, SourceChanged, SourceState, source_unavailable

_PIECE_BYTES = 1 << 20


class FileSource:
    """Reads a regular file; symbolic links at its end are not followed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> SourceState:
        descriptor = self._open()
        try:
            return _state(descriptor)
        finally:
            os.close(descriptor)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        descriptor = self._open()
        try:
            if _state(descriptor) != state:
                raise SourceChanged("the file was changed while it was read", metadata={"path": str(self._path)})
            buffer = memoryview(bytearray(min(_PIECE_BYTES, length)))
            end = offset + length
            while offset < end and (count := self._read(descriptor, offset, buffer[: end - offset])):
                sink(buffer[:count])
                offset += count
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BlobNotFound(f"{self._path} is not there", metadata={"path": str(self._path)}) from error
        except OSError as error:
            raise source_unavailable(f"{self._path} can't be read: {error.strerror}") from error

    def _read(self, descriptor: int, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            raise source_unavailable(f"{self._path} can't be read: {error.strerror}") from error


def _state(descriptor: int) -> SourceState:
    """The modification time stands for the bytes, as it does for HTTP servers that make ETags of files."""
    state = os.fstat(descriptor)
    return SourceState(state.st_size, etag=f"{state.st_ino:x}-{state.st_mtime_ns:x}-{state.st_size:x}")
