"""Manifests of revisions, checked before anything touches the disk.

A manifest comes over the wire and turns into paths below the agent's root, so it is refused whole unless every entry is
harmless: a hostile or broken registry must not be able to write outside a view. Nothing here does I/O.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from helios.mesh.errors import DigestMismatch, InvalidRequest

MAX_ENTRIES = 10_000
"""Far above any model (the largest public ones have some hundred shards), low enough to bound the work of one
request."""

_MAX_PATH_BYTES = 1024
"""Leaves room for the agent's root below Linux's PATH_MAX of 4,096."""

_MAX_PART_BYTES = 255
"""NAME_MAX of every usual file system."""

_EMPTY_CONFIG = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    "size": 2,
}
"""OCI's empty descriptor: everything known of a model is derived from its files."""

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """Identity of a blob: its sha256 in lower-case hexadecimal, and its size."""

    hash: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One file of a revision: a relative path with `/`, and its blob."""

    path: str
    digest: Digest
    media_type: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one revision. Only `make_manifest` makes one, so a Manifest is always harmless."""

    revision: str
    entries: tuple[ManifestEntry, ...]

    @property
    def blobs(self) -> frozenset[Digest]:
        """The distinct blobs; two paths may share one."""
        return frozenset(entry.digest for entry in self.entries)

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the distinct blobs."""
        return sum(blob.size_bytes for blob in self.blobs)


def make_manifest(revision: str, entries: Iterable[ManifestEntry]) -> Manifest:
    """Checks entries and makes a manifest of them.

    Raises:
        InvalidRequest: INVALID_REVISION or INVALID_MANIFEST; the metadata name the entry.
        DigestMismatch: The entries are those of another revision.
    """
    revision_hash(revision)
    listed = tuple(sorted(entries, key=lambda entry: entry.path))
    if not 0 < len(listed) <= MAX_ENTRIES:
        raise _invalid(f"a manifest has 1 to {MAX_ENTRIES} entries, this one has {len(listed)}")
    for entry in listed:
        check_path(entry.path)
        check_digest(entry.digest)
    _check_tree(listed)
    _check_sizes(listed)
    actual = manifest_digest(listed)
    if actual != revision:
        raise DigestMismatch(
            "the manifest is not the one that the revision names", metadata={"revision": revision, "actual": actual}
        )
    return Manifest(revision=revision, entries=listed)


def manifest_digest(entries: Iterable[ManifestEntry]) -> str:
    """The revision that a manifest with these entries, sorted by path, is: `sha256:` of its canonical form.

    The canonical form is an OCI image manifest as the CNCF ModelPack specification writes it, raw layers, the path in
    an annotation, serialised with sorted keys and no spaces. The registry makes it too; a contract test compares
    them.

    Source: https://github.com/modelpack/model-spec v0.0.7.
    """
    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": _EMPTY_CONFIG,
        "layers": [
            {
                "mediaType": entry.media_type,
                "digest": f"sha256:{entry.digest.hash}",
                "size": entry.digest.size_bytes,
                "annotations": {"org.cncf.model.filepath": entry.path},
            }
            for entry in entries
        ],
    }
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def revision_hash(revision: str) -> str:
    """Returns the hash of `sha256:<hash>`.

    Raises:
        InvalidRequest: INVALID_REVISION.
    """
    algorithm, _, hash_ = revision.partition(":")
    if algorithm != "sha256" or not _HASH.fullmatch(hash_):
        raise InvalidRequest(
            "a revision is `sha256:` and 64 lower-case hexadecimal digits",
            reason="INVALID_REVISION",
            metadata={"revision": revision[:100]},
        )
    return hash_


def check_digest(digest: Digest) -> None:
    """Refuses what is not the digest of a blob.

    Raises:
        InvalidRequest: INVALID_MANIFEST.
    """
    if not is_hash(digest.hash) or digest.size_bytes < 0:
        raise _invalid("a digest is 64 lower-case hexadecimal digits and a size", hash=digest.hash[:100])


def is_hash(text: str) -> bool:
    """Whether the text is a sha256 in lower-case hexadecimal."""
    return _HASH.fullmatch(text) is not None


def check_path(path: str) -> None:
    """Refuses a path that is not plainly inside the directory that it is relative to.

    Raises:
        InvalidRequest: INVALID_MANIFEST.
    """
    shown = path[:200]
    if len(path.encode()) > _MAX_PATH_BYTES:
        raise _invalid(f"a path is longer than {_MAX_PATH_BYTES} bytes", path=shown)
    if "\\" in path or any(ord(character) < 0x20 or ord(character) == 0x7F for character in path):
        raise _invalid("a path has control characters or a backslash", path=repr(shown))
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise _invalid("a path is absolute, or has empty, `.` or `..` parts", path=shown)
        if len(part.encode()) > _MAX_PART_BYTES:
            raise _invalid(f"a part of a path is longer than {_MAX_PART_BYTES} bytes", path=shown)


def _check_tree(entries: tuple[ManifestEntry, ...]) -> None:
    """Refuses a path that is there twice, or that is a file and a directory at once."""
    paths = {entry.path for entry in entries}
    if len(paths) != len(entries):
        raise _invalid("a path is there twice")
    for path in paths:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in paths:
                raise _invalid("a path is a file and a directory at once", path=path)


def _check_sizes(entries: tuple[ManifestEntry, ...]) -> None:
    sizes: dict[str, int] = {}
    for entry in entries:
        if sizes.setdefault(entry.digest.hash, entry.digest.size_bytes) != entry.digest.size_bytes:
            raise _invalid("a blob has two sizes", hash=entry.digest.hash)


def _invalid(message: str, **metadata: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_MANIFEST", metadata=metadata)
