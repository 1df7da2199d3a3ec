"""One GGUF file: the format of llama.cpp, quantised, dequantised here to bf16 safetensors.

The registry itself reads 8 bytes of it; the rest is read by the converter's process, where a hostile file can do no
harm.
"""

import re
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from helios.mesh.errors import Conflict, DigestMismatch, InvalidRequest
from helios.registry import offload
from helios.registry.hashing import hash_file
from helios.registry.manifest import Digest
from helios.registry.progress import ProgressLog
from helios.registry.records import IngestPhase
from helios.registry.sources.conversion import Converter
from helios.registry.sources.directory import scan_directory
from helios.registry.sources.source import FileSet
from helios.registry.strict_json import malformed

GGUF_SUFFIX: Final = ".gguf"
_MAGIC: Final = b"GGUF"
# 2: 64-bit counts; 3: big-endian allowed. 1 was replaced within weeks, in 2023.
_VERSIONS: Final = (2, 3)
_SPLIT: Final = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_PROJECTOR: Final = "mmproj"
# Repositories of quantisations have some twenty-five.
_MAX_SHOWN: Final = 40


class GgufSource:
    """A GGUF file on the registry's machine."""

    is_file = True

    def __init__(self, file: Path, converter: Converter, *, origin: str = "") -> None:
        self._file = file
        self._converter = converter
        self._seen: tuple[int, int] | None = None
        self.origin = origin or f"gguf:{file}"

    async def fingerprint(self, expected_sha256: str, progress: ProgressLog) -> tuple[str, str]:
        """Hashes the file."""
        try:
            self._seen = _identity(self._file)
            progress.begin(IngestPhase.INSPECT, self._seen[0])
            digest = await offload.run(partial(_check_and_hash, self._file, progress))
        except OSError as error:
            raise InvalidRequest(
                f"{self._file} can't be read: {error.strerror}", reason="INVALID_SOURCE", metadata={"param": "source"}
            ) from error
        if expected_sha256 and digest.hash != expected_sha256:
            raise DigestMismatch(
                f"{self._file.name} has sha256 {digest.hash}, expected {expected_sha256}",
                metadata={"expected": expected_sha256, "found": digest.hash},
            )
        return digest.hash, self._converter.version

    async def files(self, workspace: Path, progress: ProgressLog) -> FileSet:
        """Converts the file."""
        progress.begin(IngestPhase.CONVERT)
        await self._converter.convert(self._file, workspace, progress)
        if _identity(self._file) != self._seen:
            raise Conflict(f"{self._file} changed while it was read; ingest it again", reason="SOURCE_CHANGED")
        return await offload.run(lambda _: scan_directory(workspace, is_owned=True))


def choose_gguf(sizes: Mapping[str, int], source: str, how: str) -> str:
    """Returns which of a place's GGUF files is the model: the only one, projectors of images (``mmproj``) apart.

    Args:
        sizes: The files, by path, with their sizes in bytes.
        source: The place, for messages.
        how: What to do to choose, for messages.

    Raises:
        InvalidRequest: AMBIGUOUS_SOURCE, there are several; UNSUPPORTED_FORMAT, it is split into several.
    """
    choices = sorted(path for path in sizes if not path.rpartition("/")[2].lower().startswith(_PROJECTOR)) or [*sizes]
    if {match[1] for path in choices if (match := _SPLIT.fullmatch(path))} and len(set(map(_whole, choices))) == 1:
        raise malformed(
            f"{choices[0]} of {source} is one of {len(choices)} pieces of a model, which can't be read; take one that"
            " is whole, or merge them (llama-gguf-split --merge)"
        )
    if len(choices) == 1:
        return choices[0]
    shown = ", ".join(f"{path} ({sizes[path] / 1e9:.1f} GB)" for path in choices[:_MAX_SHOWN])
    more = ", …" if len(choices) > _MAX_SHOWN else ""
    raise InvalidRequest(
        f"{source} holds {len(choices)} GGUF files; {how}: {shown}{more}",
        reason="AMBIGUOUS_SOURCE",
        metadata={"param": "include"},
    )


def _whole(path: str) -> str:
    match = _SPLIT.fullmatch(path)
    return match[1] if match else path


def check_magic(prefix: bytes, what: str) -> None:
    """Checks the first 8 bytes of a GGUF file. Raises InvalidRequest (UNSUPPORTED_FORMAT)."""
    if len(prefix) < 8 or prefix[:4] != _MAGIC:
        raise malformed(f"{what} is not a GGUF file")
    (version,) = struct.unpack("<I", prefix[4:8])
    if version not in _VERSIONS:
        raise malformed(f"{what} has GGUF version {version}, in little-endian order; versions 2 and 3 are known")


def _check_and_hash(file: Path, progress: ProgressLog, stop: offload.Stop) -> Digest:
    with file.open("rb") as opened:
        check_magic(opened.read(8), file.name)
    return hash_file(file, progress.advance, stop)


def _identity(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise Conflict(f"{file} could not be read: {error.strerror}", reason="SOURCE_CHANGED") from error
    return status.st_size, status.st_mtime_ns
