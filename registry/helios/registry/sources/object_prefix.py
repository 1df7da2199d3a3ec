"""A prefix of an object store: S3 and what speaks as it does, Google Cloud Storage, Azure Blob Storage.

Through obstore, whose synchronous API runs in threads. ``SHA256SUMS`` in the prefix gives the files their identity, as
it does for a web server; without it that is the ETag, so an object that was not written again is known again.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from helios.mesh.errors import (
    BlobNotFound,
    HeliosError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from helios.mesh.transfer.source import RangeSource
from helios.registry import offload
from helios.registry.sources.http_directory import SUMS, parse_sums
from helios.registry.sources.pinned import PinnedSource, check_state
from helios.registry.sources.reference import UrlReference
from helios.registry.sources.remote import MAX_LISTED_FILES, Listing, RemoteFile, changed
from helios.registry.sources.settings import StoreSettings
from helios.registry.sources.web import jitter
from helios.registry.strict_json import malformed

T = TypeVar("T")

_ALLOW_HTTP: Final = ("allow_http", "aws_allow_http", "azure_allow_http", "google_allow_http")
# obstore itself is set to try once, for the sake of transfers.
_ATTEMPTS: Final = 5
_STATUS: Final[Mapping[type[HeliosError], int]] = {BlobNotFound: 404, PermissionDenied: 403, Unauthenticated: 401}
_MAX_SUMS_BYTES: Final = 4 << 20


class ObjectPrefix:
    """All objects below a prefix, or one of them; ``remote.Repository``."""

    def __init__(self, reference: UrlReference, settings: StoreSettings) -> None:
        """Takes the prefix and how its store is reached."""
        self._url = reference.directory
        self._origin = reference.url
        self._only = unquote(reference.file)
        secrets: Mapping[str, Any] = getattr(settings, reference.scheme)
        values = {name: value.get_secret_value() for name, value in secrets.items()}
        # An option of the client; among the store's obstore 0.12 panics over it.
        self._client = {name: values.pop(name).lower() == "true" for name in _ALLOW_HTTP if name in values}
        self._options = values
        self._store: Any = None

    async def list_files(self) -> Listing:
        """Returns the objects below the prefix."""
        # obstore is 30 MB of code, which a registry that pulls from no store need not have in memory.
        self._store = await offload.run(lambda _: self._open_store())
        found = {entry["path"]: entry for entry in await self._call(self._list)}
        sums: dict[str, str] = {}
        if SUMS in found and not self._only:
            size_bytes = found[SUMS]["size"]
            if size_bytes > _MAX_SUMS_BYTES:
                raise malformed(f"{SUMS} is larger than {_MAX_SUMS_BYTES >> 20} MiB")
            sums = parse_sums(await self.read(RemoteFile(SUMS, size_bytes, SUMS), 0, size_bytes))
        files = []
        for path, entry in sorted(found.items()):
            if path in sums:
                files.append(RemoteFile(path, entry["size"], path, sha256=sums[path]))
            else:
                # Of the place, not of the content: another bucket may give the same ETag to other bytes.
                state = entry.get("e_tag") or ""
                etag = f"{self._url} {state}" if state else ""
                files.append(RemoteFile(path, entry["size"], path, etag=etag, state=state))
        if not files:
            raise self.explain(404, "")
        return Listing(self._origin, tuple(files))

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of an object."""
        if length == 0:
            return b""
        content = await self._call(lambda _: self._read(file, offset, length))
        if len(content) != length:
            raise changed(file.path)
        return content

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns an object for reading by ranges."""
        from helios.mesh.transfer.objects import ObjectSource  # noqa: PLC0415 - see list_files

        return PinnedSource(ObjectSource(self._store, file.place), file)

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a refusal."""
        scheme = self._url.partition(":")[0]
        metadata = {"param": "source", "status": str(status)}
        if status == 404:
            return NotFound(
                f"there is no {self._origin}: check bucket and key"
                if self._only
                else f"there is nothing below {self._url}/: check bucket and prefix",
                reason="SOURCE_NOT_FOUND",
                metadata=metadata,
            )
        if status in {401, 403}:
            kind = PreconditionFailed if status == 401 else PermissionDenied
            return kind(
                f"the object store refuses {self._url}/; give the registry credentials that may read it: the cloud's"
                f" own environment variables, or HELIOS_REGISTRY__SOURCES__STORES__{scheme.upper()}",
                reason="SOURCE_ACCESS_DENIED",
                metadata=metadata,
            )
        return InvalidRequest(f"{self._url}/: {detail}", reason="INVALID_SOURCE", metadata=metadata)

    async def _call(self, work: Callable[[offload.Stop], T]) -> T:
        """Does something with the store in a thread, again where it may be better the next time.

        Raises:
            HeliosError: What obstore's error means.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                return await offload.run(work)
            except (BlobNotFound, PermissionDenied, Unauthenticated) as error:
                raise self.explain(_STATUS[type(error)], error.message) from error
            except Unavailable:
                if attempt == _ATTEMPTS:
                    raise
                await asyncio.sleep(jitter(attempt))

    def _open_store(self) -> Any:
        try:
            from helios.mesh.transfer.objects import open_object_store  # noqa: PLC0415 - see list_files
        except ImportError as error:
            raise Unsupported(
                "object stores need the package obstore: pip install 'helios-llm[cloud]'", reason="NOT_INSTALLED"
            ) from error
        client = {"allow_http": any(self._client.values())}
        return open_object_store(self._url, options=self._options, client=client)

    def _list(self, stop: offload.Stop) -> list[Mapping[str, Any]]:
        import obstore  # noqa: PLC0415 - see list_files

        found: list[Mapping[str, Any]] = []
        with _translated(self._url):
            if self._only:
                return [obstore.head(self._store, self._only)]
            for page in obstore.list(self._store):
                stop.check()
                found += page
                if len(found) > MAX_LISTED_FILES:
                    raise malformed(f"{self._url}/ holds more than {MAX_LISTED_FILES} objects: name a model's prefix")
        return found

    def _read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        import obstore  # noqa: PLC0415 - see list_files

        with _translated(file.place):
            found = obstore.get(self._store, file.place, options={"range": (offset, offset + length)})
            check_state(file, found.meta["e_tag"] or "")
            return bytes(found.bytes())


@contextmanager
def _translated(path: str) -> Iterator[None]:
    from obstore import exceptions  # noqa: PLC0415 - see ObjectPrefix.list_files

    from helios.mesh.transfer.objects import error_of_object  # noqa: PLC0415 - see ObjectPrefix.list_files

    try:
        yield
    except (exceptions.BaseError, FileNotFoundError) as error:
        raise error_of_object(error, path) from error
