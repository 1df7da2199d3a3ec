"""What an ingest needs of a source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helios.registry.manifest import Digest
from helios.registry.progress import ProgressLog


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a revision and where its bytes are now.

    Attributes:
        known: The blob that the bytes are, which the ingest holds; they are not at ``location`` then.
        sha256: What the bytes had when they came, in hexadecimal, and must have when they are stored; empty: any.
    """

    path: str
    location: Path
    size_bytes: int
    media_type: str
    known: Digest | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files that a source came down to.

    Attributes:
        is_owned: The files are the registry's own and may be moved.
        ignored: Names that were left out and why, for the log.
    """

    files: tuple[SourceFile, ...]
    is_owned: bool
    ignored: tuple[tuple[str, str], ...] = ()

    @property
    def new_bytes(self) -> int:
        """Sum of the sizes of the files that are not blobs yet."""
        return sum(file.size_bytes for file in self.files if file.known is None)


class Source(Protocol):
    """One place where a model is. ``fingerprint`` is called before ``files``; both can be cancelled at any await.

    Attributes:
        origin: What the revision will say of where it came from; it can be ingested again by this text.
        is_file: It is one file, whose sha256 ``fingerprint`` compares with the expected one. What is expected of a
            source of several files is its revision, which the ingest compares. Known once ``fingerprint`` has returned.
    """

    origin: str
    is_file: bool

    async def fingerprint(self, expected_sha256: str, progress: ProgressLog) -> tuple[str, str] | None:
        """Returns what stands for the source's content, and for what makes a model's files of it.

        That is a GGUF file's sha256 and the converter's version, or the fingerprint of a listing: where both are known,
        the revision that they became is known. None where there is no telling without reading it all.

        Raises:
            InvalidRequest: INVALID_SOURCE, UNSUPPORTED_FORMAT.
            DigestMismatch: The file is not the expected one.
        """
        ...

    async def files(self, workspace: Path, progress: ProgressLog) -> FileSet:
        """Returns the files; whatever it writes goes to ``workspace``, which the caller removes.

        Raises:
            HeliosError: As above, or the conversion failed.
        """
        ...
