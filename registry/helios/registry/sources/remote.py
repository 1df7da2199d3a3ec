"""What a model is at a place that is reached by a network: files with sizes and identities, and ways to their bytes."""

import hashlib
import json
from dataclasses import dataclass
from typing import Final, Protocol

from helios.mesh.errors import Conflict, DigestMismatch, HeliosError
from helios.mesh.transfer.source import RangeSource
from helios.registry.manifest import Digest, check_path
from helios.registry.strict_json import malformed

# Far above any model; the list is kept in memory.
MAX_LISTED_FILES: Final = 100_000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at its place. At most one of the identities is given, and the strongest that the place knows.

    Attributes:
        path: Relative, with ``/``; checked.
        size_bytes: As the place says; checked against what comes.
        place: What its repository finds it by: a URL, a key.
        sha256: Of the content, in lower-case hexadecimal.
        git_sha1: Name of the content as a git blob.
        etag: Strong validator of the place's present content, by which it is known again.
        state: The ETag that the bytes come with; empty: any, because another identity is checked, or there is none.
        packing: How files are packed in it (``unpack.PACKINGS``), which are wanted rather than it; empty: it is one.
    """

    path: str
    size_bytes: int
    place: str
    sha256: str = ""
    git_sha1: str = ""
    etag: str = ""
    state: str = ""
    packing: str = ""

    def __post_init__(self) -> None:
        check_path(self.path)
        # The constructor refuses what is no hash and no size.
        Digest(self.sha256 or "0" * 64, self.size_bytes)

    @property
    def identity(self) -> str:
        """What the content is called wherever it is the same; empty where the place does not say."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        if self.git_sha1:
            return f"git:{self.git_sha1}"
        return f"etag:{self.place} {self.etag}" if self.etag else ""

    def check(self, content: bytes) -> bytes:
        """Returns the content if it is this file's.

        Raises:
            Conflict: SOURCE_CHANGED, it has another length.
            DigestMismatch: It is other content than the place promised.
        """
        if len(content) != self.size_bytes:
            raise changed(self.path)
        if self.sha256:
            self._compare(hashlib.sha256(content).hexdigest(), self.sha256)
        elif self.git_sha1:
            self._compare(git_blob_sha1(content), self.git_sha1)
        return content

    def _compare(self, found: str, expected: str) -> None:
        if found != expected:
            raise mismatch(self.path, expected, found)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a place holds.

    Attributes:
        origin: The source again, as exact as the place allows: with the commit in place of the branch.
        files: All files, by path.
    """

    origin: str
    files: tuple[RemoteFile, ...]

    def __post_init__(self) -> None:
        if len(self.files) > MAX_LISTED_FILES:
            raise malformed(f"the source lists more than {MAX_LISTED_FILES} files")


class Repository(Protocol):
    """One model's place. All methods can be cancelled at any await, and are idempotent.

    Each raises HeliosError with words that say what to do: SOURCE_NOT_FOUND, SOURCE_ACCESS_DENIED, SOURCE_UNAVAILABLE.
    """

    async def list_files(self) -> Listing:
        """Returns the files."""
        ...

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of a file: for the small ones, and for headers of large ones. Exactly ``length`` of them."""
        ...

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns a large file for reading by ranges; no request is made yet."""
        ...

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a file whose bytes were refused with this HTTP status."""
        ...


def git_blob_sha1(content: bytes) -> str:
    """Returns the name that git gives to a file with this content."""
    hasher = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    hasher.update(content)
    return hasher.hexdigest()


def fingerprint(files: tuple[RemoteFile, ...]) -> str:
    """Returns the sha256 that stands for the content of all the files; empty where one of them has no identity."""
    if not files or not all(file.identity for file in files):
        return ""
    rows = sorted([file.path, file.size_bytes, file.identity, *filter(None, [file.packing])] for file in files)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def changed(what: str) -> Conflict:
    """Returns the error of a file that is not what it was when it was listed."""
    return Conflict(f"{what} changed at its source while it was fetched; ingest it again", reason="SOURCE_CHANGED")


def mismatch(what: str, expected: str, found: str) -> DigestMismatch:
    """Returns the error of content that is not what its place promised."""
    return DigestMismatch(
        f"{what} came with hash {found}, the source says {expected}: the source, or something between, is broken",
        metadata={"expected": expected, "found": found},
    )
