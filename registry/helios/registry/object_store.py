"""The blob store that is a bucket: S3, Google Cloud Storage, Azure, through obstore.

    <prefix>/sha256/<first two>/<hash>       an object, whole, or nothing
    <prefix>/owner.json                      which database's the prefix is

There are no temporary keys: S3 copies no object above 5 GiB in one piece, so a blob is never moved to its name. It is
written there by an operation that makes it appear at once and only after its sha256 was found right:

| blob | S3, Azure, Google | stores without parts, such as memory |
|---|---|---|
| up to ``part_bytes`` | one conditional write, of bytes that were hashed | the same |
| larger | parts, journaled, completed if all was right (``part_upload``) | one streamed write that fails at its end |
| after a crash | goes on | begins anew |

obstore's synchronous calls are used, in threads: its asynchronous ones can abort the process when it ends.
"""

import hashlib
import io
import re
import string
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from obstore import exceptions

from helios.mesh.errors import BlobNotFound, Conflict, Corrupted, Unavailable
from helios.registry import offload
from helios.registry.blobs import Staged
from helios.registry.collection import StoredBlob
from helios.registry.hashing import OnBytes, changed, hash_file
from helios.registry.manifest import Digest
from helios.registry.ownership import OWNER_FILE
from helios.registry.part_upload import PartUploader, UploadGone, UploadLimits
from helios.registry.store_errors import BlobStoreDenied, mapped

_KEY: Final = re.compile(r"(?:^|/)sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})$")
# S3 deletes 1,000 objects a request.
_BATCH: Final = 1_000
# Between tries of a small write whose connection broke.
_PAUSES_SECONDS: Final = (0.1, 1.0)
# A safetensors header of a usual model comes in one read.
_READ_BYTES: Final = 1 << 20


class ObjectStore:
    """The blobs below a prefix of a bucket; a ``BlobStore``."""

    def __init__(
        self,
        store: Any,
        *,
        url: str,
        options: Mapping[str, str],
        limits: UploadLimits,
        uploader: PartUploader | None = None,
    ) -> None:
        """Takes obstore's store, whose prefix is the blob store's; without an uploader, uploads begin anew."""
        self._store = store
        self._url = url
        self._options = options
        self._limits = limits
        self._uploader = uploader

    @property
    def url(self) -> str:
        """``s3://bucket/prefix`` and the like."""
        return self._url

    @property
    def options(self) -> Mapping[str, str]:
        """Endpoint, region, account."""
        return self._options

    @contextmanager
    def stage(self, source: Path, *, is_owned: bool, on_bytes: OnBytes, stop: offload.Stop) -> Iterator[Staged]:
        """Yields a file whose sha256 is known: an object needs its name before its first byte is sent."""
        del is_owned
        try:
            digest = hash_file(source, on_bytes, stop)
        except OSError as error:
            raise Conflict(f"{source} could not be read: {error.strerror}", reason="SOURCE_CHANGED") from error
        yield _StagedUpload(self, source, digest)

    def upload(self, source: Path, digest: Digest, on_bytes: OnBytes, stop: offload.Stop) -> None:
        """Stores a file under its sha256. Raises as ``Staged.commit``."""
        key = key_of(digest.hash)
        if self.size(digest.hash) not in (-1, digest.size_bytes):
            # Not made by any registry: it would be taken for the blob that the conditional write finds.
            self.delete([digest.hash])
        try:
            if digest.size_bytes <= self._limits.part_bytes:
                self._put_whole(source, digest, key, on_bytes)
            elif self._uploader is not None:
                self._put_parts(self._uploader, source, digest, on_bytes, stop)
            else:
                self._put_stream(source, digest, key, on_bytes, stop)
        except OSError as error:
            raise Conflict(f"{source} could not be read: {error.strerror}", reason="SOURCE_CHANGED") from error
        found = self.size(digest.hash)
        if found != digest.size_bytes:
            raise Corrupted(
                f"the blob store has {found} bytes of {digest} after an upload of {digest.size_bytes}",
                reason="BLOB_STORE_WRONG",
                metadata={"blob": digest.hash},
            )

    def size(self, hash_: str) -> int:
        """Returns a blob's size, -1 if it is not there."""
        try:
            with mapped():
                return int(self._store.head(key_of(hash_))["size"])
        except FileNotFoundError:
            return -1

    def open(self, hash_: str) -> BinaryIO:
        """Opens a blob for reading by ranges."""
        size = self.size(hash_)
        if size < 0:
            raise BlobNotFound(f"blob sha256:{hash_} is not in the blob store", metadata={"blob": hash_})
        return cast("BinaryIO", io.BufferedReader(_Ranges(self._store, key_of(hash_), size), _READ_BYTES))

    def scan(self, prefix: str = "") -> Generator[StoredBlob, None, None]:
        """Yields the blobs whose hashes begin so; what else is there is not the registry's and is left alone."""
        for directory in _directories(prefix):
            with mapped():
                for batch in self._store.list(directory, chunk_size=_BATCH):
                    for each in batch:
                        match = _KEY.search(each["path"])
                        if match is not None:
                            yield StoredBlob(match[2], int(each["size"]), each["last_modified"])

    def delete(self, hashes: Collection[str]) -> None:
        """Removes blobs, many in a request where the store can."""
        keys = [key_of(value) for value in hashes]
        for start in range(0, len(keys), _BATCH):
            self._delete(keys[start : start + _BATCH])

    def sweep(self, *, before: datetime, is_dry_run: bool = False) -> int:
        """Drops uploads that were begun and left before this moment."""
        return 0 if self._uploader is None else self._uploader.sweep(before=before, is_dry_run=is_dry_run)

    def read_owner(self) -> bytes | None:
        """Returns what says whose the prefix is."""
        try:
            with mapped():
                return bytes(self._store.get(OWNER_FILE).bytes())
        except FileNotFoundError:
            return None

    def create_owner(self, content: bytes) -> bool:
        """Writes whose the prefix is, unless that is said."""
        return self._create(OWNER_FILE, content)

    def replace_owner(self, content: bytes) -> None:
        """Writes whose the prefix is."""
        with mapped():
            self._store.put(OWNER_FILE, content, use_multipart=False)

    def close(self) -> None:
        """Closes connections."""
        if self._uploader is not None:
            self._uploader.close()

    def _delete(self, keys: list[str]) -> None:
        try:
            with mapped():
                self._store.delete(keys)
        except FileNotFoundError:
            # Some stores stop at the first that is gone; none of the others may stay.
            for key in keys:
                try:
                    with mapped():
                        self._store.delete(key)
                except FileNotFoundError:
                    continue

    def _put_whole(self, source: Path, digest: Digest, key: str, on_bytes: OnBytes) -> None:
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest.hash:
            raise changed(source)
        # Where it is there another registry was faster, or an answer was lost; its size is looked at next.
        self._create(key, data)
        on_bytes(len(data))

    def _create(self, key: str, data: bytes) -> bool:
        """Writes an object where there is none; returns False where there is one, of an earlier try perhaps."""
        for pause_seconds in (*_PAUSES_SECONDS, None):
            try:
                with mapped():
                    self._store.put(key, data, mode="create", use_multipart=False)
                return True
            except exceptions.AlreadyExistsError:
                return False
            except BlobStoreDenied:
                raise
            except Unavailable:
                # obstore sends a conditional write once; what is sent again can at worst be found there.
                if pause_seconds is None:
                    raise
                time.sleep(pause_seconds)
        raise AssertionError("the last try returns or raises")

    def _put_parts(
        self, uploader: PartUploader, source: Path, digest: Digest, on_bytes: OnBytes, stop: offload.Stop
    ) -> None:
        counted = _Counted(on_bytes)
        for is_last in (False, True):
            try:
                uploader.upload(source, digest, key_of(digest.hash), counted, stop)
                return
            except UploadGone:
                # The answer to a `complete` was lost, or another registry has stored it; else the upload was swept.
                if self.size(digest.hash) == digest.size_bytes:
                    return
                if is_last:
                    raise
                on_bytes(-counted.total)
                counted = _Counted(on_bytes)

    def _put_stream(self, source: Path, digest: Digest, key: str, on_bytes: OnBytes, stop: offload.Stop) -> None:
        content = _verified(source, digest, self._limits.part_bytes, on_bytes, stop)
        with mapped():
            self._store.put(
                key,
                content,
                use_multipart=True,
                chunk_size=self._limits.part_bytes,
                max_concurrency=self._limits.concurrency,
            )


@dataclass(frozen=True, slots=True)
class _StagedUpload:
    store: ObjectStore
    source: Path
    digest: Digest

    def commit(self, on_bytes: OnBytes, stop: offload.Stop) -> None:
        # Hashing counted the bytes; sending them takes longer, so that is what is shown in the end.
        on_bytes(-self.digest.size_bytes)
        self.store.upload(self.source, self.digest, on_bytes, stop)


class _Counted:
    """Passes progress on and adds it up; from several threads, where a lost count costs a wrong figure on a screen."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self.total = 0

    def __call__(self, count: int) -> None:
        self.total += count
        self._on_bytes(count)


class _Ranges(io.RawIOBase):
    """An object as a file that reads the ranges it is asked for."""

    def __init__(self, store: Any, key: str, size_bytes: int) -> None:
        self._store = store
        self._key = key
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size_bytes - self._position)
        if count <= 0:
            return 0
        try:
            with mapped():
                data = self._store.get_range(self._key, start=self._position, length=count)
        except FileNotFoundError as error:
            raise BlobNotFound(f"{self._key} is not in the blob store any more") from error
        if len(data) != count:
            raise Corrupted(f"the blob store has sent {len(data)} bytes of {count}", reason="BLOB_STORE_WRONG")
        view[:count] = memoryview(data)
        self._position += count
        return count


def key_of(hash_: str) -> str:
    """Returns the key of a blob below the prefix."""
    return f"sha256/{hash_[:2]}/{hash_}"


def _directories(prefix: str) -> list[str]:
    """Returns what to list for the blobs whose hashes begin so: obstore lists by whole parts of a key."""
    if not prefix:
        return ["sha256"]
    return [f"sha256/{prefix}"] if len(prefix) > 1 else [f"sha256/{prefix}{digit}" for digit in string.hexdigits[:16]]


def _verified(source: Path, digest: Digest, size_bytes: int, on_bytes: OnBytes, stop: offload.Stop) -> Iterator[bytes]:
    """Yields a file's bytes, and raises instead of ending where they were not the blob's: so the write never ends."""
    hasher = hashlib.sha256()
    with source.open("rb") as file:
        while data := file.read(size_bytes):
            stop.check()
            hasher.update(data)
            yield data
            on_bytes(len(data))
    if hasher.hexdigest() != digest.hash:
        raise changed(source)
