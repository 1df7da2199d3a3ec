"""The blobs of the registry: whole, verified, named by their sha256, and kept for as long as something refers to them.

Where the bytes are is a ``BlobStore``'s affair: a directory (``directory_store``), or an object store
(``object_store``). What this module adds is the same for all: which blobs an ingest holds and which ones are being
deleted (``claims``), one upload of a blob at a time, and room on this machine's disk.

    stage (the sha256 becomes known) → hold → already there? else commit → rows → release

Stores block, and run in threads; nothing here holds a lock while one does.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol
from weakref import WeakValueDictionary

from helios.mesh.errors import BlobNotFound, DigestMismatch, DiskFull
from helios.registry import offload
from helios.registry.claims import Claims
from helios.registry.collection import StoredBlob
from helios.registry.hashing import OnBytes, hash_file, looks_alike, size_of
from helios.registry.manifest import Digest

# Fine-tunes of one model have files of the same sizes; beyond so many a file that is known is copied to be told.
_MAX_LOOKALIKES: Final = 8


class Staged(Protocol):
    """A file whose sha256 is known and that nobody sees under it yet."""

    @property
    def digest(self) -> Digest:
        """What it is."""
        ...

    def commit(self, on_bytes: OnBytes, stop: offload.Stop) -> None:
        """Makes it a blob: all of its bytes under its name, durable, or nothing. Blocks; called at most once.

        Raises:
            Conflict: SOURCE_CHANGED.
            Unavailable: BLOB_STORE_UNAVAILABLE; what was sent is not lost if it is tried again.
        """
        ...


class BlobStore(Protocol):
    """Where blobs are. Blocking and thread-safe; errors are the mesh's.

    A blob is never seen before it is whole and its sha256 was found right. Nothing of a blob changes afterwards.
    Storing one again is no error and changes nothing. What a crash leaves is invisible, and goes with ``sweep``.
    """

    @property
    def url(self) -> str:
        """Base of the store; the blob with hash h is at ``<url>/sha256/<first two of h>/<h>``."""
        ...

    @property
    def options(self) -> Mapping[str, str]:
        """How the store is reached where its URL does not say it; no secrets."""
        ...

    def stage(
        self, source: Path, *, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop
    ) -> AbstractContextManager[Staged]:
        """Yields a file staged; what is not committed by the end of the block leaves nothing.

        Args:
            source: The file.
            is_owned: It is the registry's own, and may be moved.
            on_bytes: Told of each buffer's length; ``commit`` may take back what was counted, and count again.
            stop: Asked at every buffer.

        Raises:
            Conflict: SOURCE_CHANGED, the file was changed or removed while it was read.
            DiskFull: There is no room.
        """
        ...

    def size(self, hash_: str) -> int:
        """Returns a blob's size, -1 if it is not there. Raises Unavailable."""
        ...

    def open(self, hash_: str) -> BinaryIO:
        """Opens a blob for reading, seekable. Raises BlobNotFound, Unavailable."""
        ...

    def scan(self, prefix: str = "") -> Generator[StoredBlob, None, None]:
        """Yields the blobs whose hashes begin so (at most two digits), in any order. Raises Unavailable."""
        ...

    def delete(self, hashes: Collection[str]) -> None:
        """Removes blobs. Idempotent. Raises Unavailable; then any of them may be gone."""
        ...

    def sweep(self, *, before: datetime, is_dry_run: bool = False) -> int:
        """Removes what unfinished uploads that began before this moment left; returns how many. Raises Unavailable."""
        ...


class KnownBlobs(Protocol):
    """What is known of the blobs that something refers to."""

    async def of_size(self, size_bytes: int, limit: int) -> Sequence[str]:
        """Returns the hashes of some of them that have this size."""
        ...

    async def sizes_among(self, sizes: Collection[int]) -> frozenset[int]:
        """Returns those of the sizes that some of them have."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob that is in the store; ``new_bytes`` is its size if it was not there before, else 0."""

    digest: Digest
    new_bytes: int


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A blob as something that can be opened, like a path."""

    store: BlobStore
    hash: str

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Opens it for reading."""
        del mode
        return self.store.open(self.hash)


class Blobs:
    """The blobs of one registry process: a store, and the claims on its blobs."""

    def __init__(
        self,
        store: BlobStore,
        known: KnownBlobs,
        *,
        disk: Path,
        reserve_bytes: int,
        is_shared: bool = False,
        require_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes a store, and the directory of this machine whose disk keeps ``reserve_bytes`` free for others.

        Where the store is shared with other registries, whose claims are not known here, nothing is deleted but by the
        collector, which waits. Nowhere is anything deleted where ``require_ownership`` raises, which may block.
        """
        self.store = store
        self._require_ownership = require_ownership
        # A directory has one registry, whatever its database.
        self.is_shared = is_shared and not self.is_local
        self._known = known
        self._disk = disk
        self._reserve_bytes = reserve_bytes
        self._claims = Claims()
        # Set, and replaced, when doomed blobs are free again.
        self._settled = asyncio.Event()
        # One upload of a blob at a time; a lock lives for as long as somebody waits for it.
        self._uploads: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def is_local(self) -> bool:
        """Whether blobs are files of this machine."""
        return self.store.url.startswith("file:")

    def file(self, hash_: str) -> BlobFile:
        """Returns a blob as something to open."""
        return BlobFile(self.store, hash_)

    def require_space(self, needed_bytes: int) -> None:
        """Raises DiskFull unless this machine's disk can take this much and still has its reserve."""
        free = shutil.disk_usage(self._disk).free
        if needed_bytes + self._reserve_bytes > free:
            raise DiskFull(
                f"the registry's disk has {free >> 20} MiB free; {needed_bytes >> 20} MiB are needed and"
                f" {self._reserve_bytes >> 20} MiB are kept free: remove a model or free some space",
                metadata={"free_bytes": str(free), "needed_bytes": str(needed_bytes)},
            )

    async def require_space_for(self, sizes: Collection[int]) -> None:
        """Raises DiskFull unless there is room for files of these sizes, as far as no blob has them already."""
        if self.is_local:
            known = await self._known.sizes_among(sizes)
            self.require_space(sum(size for size in sizes if size not in known))

    async def missing(self, digests: Collection[Digest]) -> list[Digest]:
        """Returns those of the blobs that are not in the store with their size. Raises Unavailable."""
        store = self.store
        return await offload.run(lambda _: [each for each in digests if store.size(each.hash) != each.size_bytes])

    @contextmanager
    def hold(self) -> Iterator["Hold"]:
        """Yields a hold for one ingest; it ends with the block."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            self._claims.release(hold.hashes)

    def held(self, hashes: Collection[str]) -> frozenset[str]:
        """Returns those of the blobs that an ingest holds now."""
        return frozenset(value for value in hashes if self._claims.is_held(value))

    async def collect(
        self, candidates: Collection[str], read_reachable: Callable[[Collection[str]], Awaitable[Collection[str]]]
    ) -> frozenset[str]:
        """Deletes those of the blobs that nothing refers to and nobody holds; returns them.

        Args:
            candidates: Blobs that may go.
            read_reachable: Reads which of some blobs rows refer to; called after the candidates were doomed, which is
                what makes this safe beside ingests (``claims``).

        Raises:
            Unavailable: BLOB_STORE_UNAVAILABLE; some may be gone, and the next collection finds the rest.
            PreconditionFailed: BLOB_STORE_OWNED; the store was taken over, and nothing is gone.
        """
        doomed = self._claims.doom(candidates)
        try:
            reachable = doomed.intersection(await read_reachable(doomed))
            self._settle(reachable)
            # Not settled twice: another collection may have doomed them again.
            doomed -= reachable
            if doomed:
                await offload.run(partial(self._delete, doomed))
            return doomed
        finally:
            self._settle(doomed)

    async def sweep(self, *, before: datetime, is_dry_run: bool = False) -> int:
        """Removes what unfinished uploads that began before this moment left; returns how many.

        Raises:
            PreconditionFailed: BLOB_STORE_OWNED; the store was taken over, and they may be its new owner's.
            Unavailable: The store can't be asked.
        """

        def work(_: offload.Stop) -> int:
            if not is_dry_run:
                self._require_ownership()
            return self.store.sweep(before=before, is_dry_run=is_dry_run)

        return await offload.run(work)

    def _delete(self, hashes: Collection[str], _: offload.Stop) -> None:
        self._require_ownership()
        self.store.delete(hashes)

    def _settle(self, hashes: Collection[str]) -> None:
        self._claims.settle(hashes)
        self._settled.set()
        self._settled = asyncio.Event()

    async def _put(self, hold: "Hold", source: Path, *, is_owned: bool, expected: str, on_bytes: OnBytes) -> Stored:
        # Hashing first saves the copy.
        if self.is_local and not is_owned and await self._is_probably_known(source):
            digest = await offload.run(partial(hash_file, source, on_bytes))
            if (not expected or digest.hash == expected) and await self._take_hold(hold, digest):
                return Stored(digest, 0)
            # The bytes are read again: progress goes back rather than beyond the end.
            on_bytes(-digest.size_bytes)
        with ExitStack() as stack:

            def stage(stop: offload.Stop) -> Staged:
                # Entered in the thread: a cancelled caller, who waits but gets no result, leaves it all the same.
                staging = self.store.stage(source, is_owned=is_owned, on_bytes=on_bytes, stop=stop)
                return stack.enter_context(staging)

            staged = await offload.run(stage)
            if expected and staged.digest.hash != expected:
                raise _mismatch(source, expected, staged.digest)
            return await self._commit(hold, staged, on_bytes)

    async def _is_probably_known(self, source: Path) -> bool:
        """Returns whether a file looks like a blob, to tell a model that comes again from one of the same shape."""
        candidates = await self._known.of_size(size_of(source), _MAX_LOOKALIKES)
        if not candidates:
            return False

        def look(_: offload.Stop) -> bool:
            for hash_ in candidates:
                # Whatever can't be read is told when it is stored.
                with suppress(OSError, BlobNotFound), source.open("rb") as file, self.store.open(hash_) as blob:
                    if looks_alike(file, blob):
                        return True
            return False

        return await offload.run(look)

    async def _commit(self, hold: "Hold", staged: Staged, on_bytes: OnBytes) -> Stored:
        digest = staged.digest
        await self._hold(hold, digest.hash)
        async with self._uploads.setdefault(digest.hash, asyncio.Lock()):
            if await self._has(digest):
                return Stored(digest, 0)
            await offload.run(partial(staged.commit, on_bytes))
            return Stored(digest, digest.size_bytes)

    async def _take_hold(self, hold: "Hold", digest: Digest) -> bool:
        await self._hold(hold, digest.hash)
        return await self._has(digest)

    async def _hold(self, hold: "Hold", hash_: str) -> None:
        while not self._claims.hold(hash_):
            await self._settled.wait()
        hold.hashes.append(hash_)

    async def _has(self, digest: Digest) -> bool:
        return await offload.run(lambda _: self.store.size(digest.hash)) == digest.size_bytes


class Hold:
    """The blobs of one ingest: they are not deleted while it lasts."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.hashes: list[str] = []

    async def put(self, source: Path, *, is_owned: bool = False, expected: str = "", on_bytes: OnBytes) -> Stored:
        """Stores a file and holds its blob. Idempotent.

        Args:
            source: The file.
            is_owned: The file is the registry's own, and may be moved.
            expected: The sha256 that it must have, in hexadecimal; empty for any.
            on_bytes: Told of each buffer's length, from another thread.

        Raises:
            DigestMismatch: The file is not what was expected.
            DiskFull: There is no room; nothing is left behind.
            Conflict: SOURCE_CHANGED, the file was changed or removed while it was read.
            Unavailable: BLOB_STORE_UNAVAILABLE; what an object store has of it is used by the next try.
        """
        return await self._blobs._put(self, source, is_owned=is_owned, expected=expected, on_bytes=on_bytes)

    async def take(self, digests: Collection[Digest]) -> bool:
        """Holds blobs that are in the store; returns False if one is missing."""
        return all([await self._blobs._take_hold(self, digest) for digest in digests])


def _mismatch(source: Path, expected: str, digest: Digest) -> DigestMismatch:
    return DigestMismatch(
        f"{source.name} has sha256 {digest.hash}, expected {expected}",
        metadata={"expected": expected, "found": digest.hash},
    )
