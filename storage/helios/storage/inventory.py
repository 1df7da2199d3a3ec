"""What is on the node: which blobs, which revisions, and which blob is there for which revision.

A mirror in memory of the index on disk, so that decisions are made without I/O. Pure. Blobs belong to no one
revision: a blob is a *stray* when no resident revision uses it (left over by a crash, or fetched for a revision that
is not complete yet).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from helios.storage.manifest import Digest, Manifest


@dataclass(frozen=True, slots=True)
class Resident:
    """A revision whose blobs are all in the tier.

    Attributes:
        last_used_at: When a lease of it was last granted or ended.
        use_count: Leases that were granted.
        clock: The tier's clock when it was last used (`eviction`).
    """

    manifest: Manifest
    last_used_at: datetime
    use_count: int = 1
    clock: float = 0.0

    @property
    def revision(self) -> str:
        """Digest of the manifest, `sha256:<hex>`."""
        return self.manifest.revision


class Inventory:
    """Blobs and revisions of one tier.

    Attributes:
        clock: What eviction measures age by: the rank of what was evicted last.
    """

    def __init__(
        self,
        blobs: Iterable[Digest] = (),
        revisions: Iterable[Resident] = (),
        *,
        clock: float = 0.0,
    ) -> None:
        """Starts with what the index on disk holds."""
        self.clock = clock
        self._blobs = {blob.hash: blob for blob in blobs}
        self._used_bytes = sum(blob.size_bytes for blob in self._blobs.values())
        self._revisions = {resident.revision: resident for resident in revisions}

    @property
    def used_bytes(self) -> int:
        """Sum of the sizes of all blobs."""
        return self._used_bytes

    def has_blob(self, digest: Digest) -> bool:
        """Whether the tier has a blob."""
        return self._blobs.get(digest.hash) == digest

    def blobs(self) -> list[Digest]:
        """All blobs of the tier."""
        return list(self._blobs.values())

    def revisions(self) -> list[Resident]:
        """All revisions of the tier."""
        return list(self._revisions.values())

    def find(self, revision: str) -> Resident | None:
        """A revision of the tier; None where it is not here."""
        return self._revisions.get(revision)

    def missing(self, manifest: Manifest) -> list[Digest]:
        """Blobs of a manifest that are not here, by their hashes."""
        return sorted(blob for blob in manifest.blobs if not self.has_blob(blob))

    def strays(self) -> list[Digest]:
        """Blobs that no resident revision uses."""
        used = {blob for resident in self._revisions.values() for blob in resident.manifest.blobs}
        return [blob for blob in self._blobs.values() if blob not in used]

    def only_of(self, revision: str) -> list[Digest]:
        """Blobs that this revision uses and no other."""
        resident = self._revisions.get(revision)
        if resident is None:
            return []
        others = {blob for other in self._revisions.values() if other is not resident for blob in other.manifest.blobs}
        return [blob for blob in resident.manifest.blobs if blob not in others and self.has_blob(blob)]

    def add_blob(self, digest: Digest) -> None:
        """Notes a blob that the disk has."""
        if digest.hash not in self._blobs:
            self._blobs[digest.hash] = digest
            self._used_bytes += digest.size_bytes

    def add_revision(self, resident: Resident) -> None:
        """Notes a revision whose blobs are all here."""
        assert not self.missing(resident.manifest), "a resident revision has all of its blobs"
        self._revisions[resident.revision] = resident

    def touch(self, revision: str, now: datetime, *, is_new_use: bool = False) -> Resident | None:
        """Notes that a use began (`is_new_use`) or ended; returns the revision as it stands now, None when it is not
        here.
        """
        resident = self._revisions.get(revision)
        if resident is None:
            return None
        touched = replace(
            resident,
            last_used_at=max(now, resident.last_used_at),
            use_count=resident.use_count + is_new_use,
            clock=max(resident.clock, self.clock),
        )
        self._revisions[revision] = touched
        return touched

    def remove_revision(self, revision: str) -> None:
        """Forgets a revision; its blobs stay."""
        self._revisions.pop(revision, None)

    def remove_blob(self, digest: Digest) -> None:
        """Forgets a blob that the disk is about to lose."""
        if self._blobs.pop(digest.hash, None) is not None:
            self._used_bytes -= digest.size_bytes
