"""The stores that a registry names, opened: a directory of this machine, or an object store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from helios.mesh.errors import InvalidRequest, Unsupported
from helios.storage.fetch import BlobSource, DirectorySource
from helios.storage.object_source import ObjectStoreSource

_SCHEMES: Final = frozenset({"s3", "gs", "az", "http", "https"})

_MAX_OPEN: Final = 16
"""Object stores whose connections are kept. A registry has one, and one more while its blobs are moved."""


@dataclass(frozen=True, slots=True)
class BlobLocation:
    """A store that has the blobs of a manifest, as the registry names it: the blob with hash h is at
    `<url>/sha256/<first two of h>/<h>`.
    """

    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    """How it is reached where the URL does not say it, by obstore's names; no secrets."""


class Sources:
    """Opens locations, and keeps what it opened. Used on the event loop; opening does no I/O but a look at a path."""

    def __init__(self, credentials: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Takes obstore's configuration by scheme (`s3`, `gs`, `az`), which goes over what a registry says."""
        self._credentials = credentials or {}
        self._stores: dict[tuple[str, tuple[tuple[str, str], ...]], ObjectStoreSource] = {}

    def open(self, locations: Sequence[BlobLocation]) -> BlobSource:
        """Opens the first location that can be had here.

        Raises:
            InvalidRequest: INVALID_MANIFEST, when a URL makes no sense.
            Unsupported: None of them is of a kind that this agent reads.
        """
        last: BlobSource | None = None
        for source, is_here in self._candidates(locations):
            if is_here:
                return source
            last = last or source
        if last is None:
            schemes = ", ".join(sorted({urlsplit(location.url).scheme[:50] for location in locations}))
            raise Unsupported("the registry keeps its blobs where this agent can't read", metadata={"schemes": schemes})
        # It will say itself that it is not there, with the path.
        return last

    def _candidates(self, locations: Sequence[BlobLocation]) -> Iterator[tuple[BlobSource, bool]]:
        """The sources, best first, and whether each is likely to answer: another machine's directory is not here."""
        for location in locations:
            scheme = urlsplit(location.url).scheme
            if scheme == "file":
                directory = _local_directory(location.url)
                yield DirectorySource(directory), directory.is_dir()
            elif scheme in _SCHEMES:
                yield self._open_store(scheme, location), True

    def _open_store(self, scheme: str, location: BlobLocation) -> ObjectStoreSource:
        options = {**location.options, **self._credentials.get(scheme, {})}
        key = location.url, tuple(sorted(options.items()))
        if key not in self._stores:
            while len(self._stores) >= _MAX_OPEN:
                del self._stores[next(iter(self._stores))]
            self._stores[key] = ObjectStoreSource(location.url, options)
        return self._stores[key]


def _local_directory(url: str) -> Path:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise InvalidRequest("the blob store's URL is not an absolute local path", reason="INVALID_MANIFEST")
    return path
