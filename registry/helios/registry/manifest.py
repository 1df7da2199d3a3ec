"""Manifests: the files of a revision and their blobs, named by the sha256 of one canonical form.

The canonical form is an OCI image manifest as the CNCF ModelPack specification writes it (raw layers, the path in an
annotation, no times or owners), serialised with sorted keys and no spaces. So the revision's digest is the digest
that the same model has in an OCI registry. The config descriptor is OCI's empty one: everything known of a model is
derived from its files.

Paths come from sources and end as file names on other machines, so they are checked here, where manifests are made
*and* where they are read.

Source: https://github.com/modelpack/model-spec v0.0.7; OCI image-spec 1.1, "Guidelines for Artifact Usage".
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from helios.mesh.errors import InvalidRequest

MEDIA_WEIGHT: Final = "application/vnd.cncf.model.weight.v1.raw"
MEDIA_CONFIG: Final = "application/vnd.cncf.model.weight.config.v1.raw"
MEDIA_DOCUMENT: Final = "application/vnd.cncf.model.doc.v1.raw"
# A file of a start-up artifact; no source makes one, so the manifest of a revision is never an artifact's.
MEDIA_ARTIFACT: Final = "application/vnd.helios.artifact.v1.raw"
MEDIA_TYPES: Final = frozenset({MEDIA_WEIGHT, MEDIA_CONFIG, MEDIA_DOCUMENT, MEDIA_ARTIFACT})

# The largest open models have some 200 shards; a manifest must fit a 4 MiB gRPC message.
MAX_ENTRIES: Final = 10_000
# Linux: NAME_MAX and a quarter of PATH_MAX, which leaves room for the directory it is materialised in.
MAX_PART_BYTES: Final = 255
MAX_PATH_BYTES: Final = 1024
# 16 TiB, ten times the largest model; sums stay far below 2^63, SQL's integer.
MAX_TOTAL_BYTES: Final = 16 << 40

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_EMPTY_CONFIG: Final = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    "size": 2,
}


@dataclass(frozen=True, slots=True)
class Digest:
    """Identity of a blob: sha256 in lower-case hexadecimal, and the size."""

    hash: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not _HASH.fullmatch(self.hash):
            raise _invalid("a blob's hash is 64 lower-case hexadecimal digits")
        if not 0 <= self.size_bytes <= MAX_TOTAL_BYTES:
            raise _invalid("a blob's size is out of range")

    def __str__(self) -> str:
        """Returns ``sha256:<hex>``."""
        return f"sha256:{self.hash}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a revision."""

    path: str
    digest: Digest
    media_type: str

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.media_type not in MEDIA_TYPES:
            raise _invalid(f"unknown media type {self.media_type[:100]!r}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a revision, sorted by path. Building one validates it, so every instance is sound."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise _invalid("a manifest has at least one entry")
        if len(self.entries) > MAX_ENTRIES:
            raise _invalid(f"a manifest has at most {MAX_ENTRIES} entries")
        check_paths(entry.path for entry in self.entries)
        if self.size_bytes > MAX_TOTAL_BYTES:
            raise _invalid("the sizes of a manifest's blobs add up to more than 16 TiB")
        if list(self.entries) != sorted(self.entries, key=lambda entry: entry.path):
            raise _invalid("a manifest's entries are sorted by path")

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """Returns the manifest of these entries, in whatever order they come."""
        return cls(tuple(sorted(entries, key=lambda entry: entry.path)))

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the entries."""
        return sum(entry.digest.size_bytes for entry in self.entries)

    def canonical_json(self) -> bytes:
        """Returns the bytes whose sha256 names the revision."""
        layers = [
            {
                "mediaType": entry.media_type,
                "digest": str(entry.digest),
                "size": entry.digest.size_bytes,
                "annotations": {"org.cncf.model.filepath": entry.path},
            }
            for entry in self.entries
        ]
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "config": _EMPTY_CONFIG,
            "layers": layers,
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def digest(self) -> str:
        """Returns the revision's name, ``sha256:<hex>``."""
        return f"sha256:{hashlib.sha256(self.canonical_json()).hexdigest()}"


def check_path(path: str) -> None:
    """Checks one path of a manifest.

    Raises:
        InvalidRequest: INVALID_MANIFEST, unless it is relative, ``/``-separated, without empty, ``.`` or ``..`` parts,
            backslashes and control characters, and within the limits of Linux.
    """
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid("a path is valid Unicode") from error
    shown = repr(path[:100])
    if not path or len(encoded) > MAX_PATH_BYTES:
        raise _invalid(f"path {shown} is empty or longer than {MAX_PATH_BYTES} bytes")
    if "\\" in path or any(ord(char) < 0x20 or ord(char) == 0x7F for char in path):
        raise _invalid(f"path {shown} holds a backslash or a control character")
    for part in path.split("/"):
        if part in {"", ".", ".."}:
            raise _invalid(f"path {shown} is absolute, or has an empty, '.' or '..' part")
        if len(part.encode("utf-8")) > MAX_PART_BYTES:
            raise _invalid(f"path {shown} has a part longer than {MAX_PART_BYTES} bytes")


def check_paths(paths: Iterable[str]) -> None:
    """Checks that paths can stand side by side: none twice, none a directory of another.

    Raises:
        InvalidRequest: INVALID_MANIFEST.
    """
    seen: set[str] = set()
    directories: set[str] = set()
    for path in paths:
        if path in seen:
            raise _invalid(f"path {path[:100]!r} stands twice")
        seen.add(path)
        parts = path.split("/")
        directories.update("/".join(parts[:end]) for end in range(1, len(parts)))
    clash = seen & directories
    if clash:
        raise _invalid(f"path {min(clash)[:100]!r} is both a file and a directory")


def parse_revision(text: str) -> str:
    """Returns a revision's digest if it has the form ``sha256:<64 hex>``.

    Raises:
        InvalidRequest: INVALID_DIGEST.
    """
    algorithm, _, value = text.partition(":")
    if algorithm != "sha256" or not _HASH.fullmatch(value):
        raise InvalidRequest(
            f"{text[:100]!r} is not a revision: 'sha256:' and 64 lower-case hexadecimal digits",
            reason="INVALID_DIGEST",
            metadata={"param": "revision"},
        )
    return text


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_MANIFEST")
