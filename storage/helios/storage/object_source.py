"""An object store as a source of blobs: S3, Google Cloud Storage, Azure, HTTP.

obstore is 30 MB of code, which an agent whose registry keeps its blobs in a directory need not have in memory: it is
imported with the first blob.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.mesh.errors import Unsupported
from helios.mesh.transfer.source import RangeSource, SourceState
from helios.storage.fetch import RangedBlob
from helios.storage.manifest import Digest


class ObjectStoreSource:
    """The blobs below one URL: `<url>/sha256/<first two of h>/<h>`. A `BlobSource`; opened when first used."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        """Takes a URL with a bucket and a prefix, and obstore's configuration of it, credentials included."""
        self._url = url
        self._options = dict(options)
        self._lock = threading.Lock()
        self._store: Any = None

    def ranged(self, digest: Digest) -> RangedBlob:
        """Blocks while the store is opened.

        Raises:
            InvalidRequest: INVALID_LOCATION.
            Unsupported: NOT_INSTALLED.
        """
        try:
            from helios.mesh.transfer.objects import ObjectSource  # noqa: PLC0415 - see the module's docstring
        except ImportError as error:
            raise Unsupported(
                "object stores need the package obstore: pip install 'helios-llm[cloud]'", reason="NOT_INSTALLED"
            ) from error
        return RangedBlob(ObjectSource(self._open_store(), f"sha256/{digest.hash[:2]}/{digest.hash}"))

    def open(self, digest: Digest) -> "RangeReader":
        return RangeReader(self.ranged(digest).source)

    def linkable_path(self, digest: Digest) -> Path | None:
        """Nothing there is a file of this machine."""
        del digest
        return None

    def _open_store(self) -> Any:
        from helios.mesh.transfer.objects import open_object_store  # noqa: PLC0415 - see the module's docstring

        with self._lock:
            if self._store is None:
                client = {"allow_http": True} if _is_plain(self._url, self._options) else {}
                self._store = open_object_store(self._url, options=self._options, client=client)
            return self._store


class RangeReader:
    """Reads a ranged source at offsets, one range after the other; a `BlobReader`."""

    def __init__(self, source: RangeSource) -> None:
        self._source = source
        self._state: SourceState | None = None

    def read_into(self, offset: int, buffer: memoryview) -> int:
        state = self._state = self._state or self._source.describe()
        length = max(0, min(len(buffer), state.size_bytes - offset))
        done = 0

        def take(piece: memoryview) -> None:
            nonlocal done
            buffer[done : done + len(piece)] = piece
            done += len(piece)

        if length:
            self._source.read(state, offset, length, take)
        return done

    def close(self) -> None:
        self._source.close()


def _is_plain(url: str, options: Mapping[str, str]) -> bool:
    """Whether TLS was deliberately not asked for: an endpoint that says http."""
    return url.startswith("http:") or any(value.startswith("http:") for value in options.values())
