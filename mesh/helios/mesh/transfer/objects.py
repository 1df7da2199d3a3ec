"""An object of S3, GCS, Azure or an HTTP directory as a source, by obstore.

Its synchronous API, from threads: the asynchronous one may abort the process at its end (PyO3/pyo3-async-runtimes#40).
obstore retries nothing here: the engine does, for it knows what else is under way, and that a chunk is not to be tried
for longer than its transfer lives.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import ObjectStore, from_url

from helios.mesh.errors import BlobNotFound, HeliosError, InvalidRequest, PermissionDenied, Unauthenticated
from helios.mesh.transfer.source import Sink, SourceChanged, SourceState, source_unavailable

_PIECE_BYTES = 1 << 20
"""1 MiB a piece: small enough for progress and for cancelling, large enough that Python's part costs nothing."""

_REQUEST_SECONDS = 120.0
"""The whole of one ranged request: 8 MiB at 70 kB/s. What is slower is stalled."""

_STATUS = re.compile(r"status code: (\d{3})")
"""How object_store words it; it has no field for it."""

_ALLOW_HTTP = "allow_http"
"""A client option to obstore, which panics when it finds it (`aws_allow_http`) among a store's own."""

_ERRORS = (exceptions.BaseError, FileNotFoundError)
"""obstore says that an object is not there in Python's own way."""

_READ_SECONDS = 20.0
_CONNECT_SECONDS = 5.0


class ObjectSource:
    """Reads one object."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        """Takes a store and the object's path in it. The store may serve other sources too."""
        self._store = store
        self._path = path

    def describe(self) -> SourceState:
        try:
            meta = obstore.head(self._store, self._path)
        except _ERRORS as error:
            raise error_of_object(error, self._path) from error
        return _state(meta)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        # Any: obstore types its dictionaries for literals only.
        options: Any = {"range": (offset, offset + length)}
        if state.etag:
            options["if_match"] = state.etag
        try:
            result = obstore.get(self._store, self._path, options=options)
            # Not every server keeps conditions.
            if _state(result.meta) != state:
                raise SourceChanged("the object was replaced while it was read", metadata={"path": self._path})
            for piece in result.stream(min_chunk_size=min(_PIECE_BYTES, length)):
                sink(memoryview(piece))
        except exceptions.PreconditionError as error:
            raise SourceChanged("the object was replaced while it was read", metadata={"path": self._path}) from error
        except _ERRORS as error:
            raise error_of_object(error, self._path) from error

    def close(self) -> None:
        """Connections are the store's. A read that runs ends between two pieces, or by its timeout."""


def open_object_store(
    url: str, *, options: Mapping[str, str] | None = None, client: Mapping[str, Any] | None = None
) -> ObjectStore:
    """Opens the store of `s3://bucket/prefix`, `gs://…`, `az://…` or `https://…`, for reading.

    Args:
        url: The store, with the prefix below which paths are.
        options: obstore's configuration, such as `aws_endpoint`. Credentials that it does not name are those of the
            process's environment.
        client: obstore's client options over those of here, such as `allow_http` or `root_certificate`.

    Raises:
        InvalidRequest: INVALID_LOCATION, when the URL or an option makes no sense.
    """
    given = options or {}
    client_options: Any = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=_READ_SECONDS),
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
        _ALLOW_HTTP: any(name.endswith(_ALLOW_HTTP) and value == "true" for name, value in given.items()),
        **(client or {}),
    }
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=_REQUEST_SECONDS)}
    try:
        config: Any = {name: value for name, value in given.items() if not name.endswith(_ALLOW_HTTP)}
        return from_url(url, config=config, client_options=client_options, retry_config=retry)
    except (exceptions.BaseError, ValueError, TypeError) as error:
        # Its text quotes options, a malformed key of a service account for one.
        raise InvalidRequest(
            f"the object store can't be opened, its URL or options make no sense ({type(error).__name__})",
            reason="INVALID_LOCATION",
            metadata={"url": url[:200]},
        ) from None


def error_of_object(error: Exception, path: str) -> HeliosError:
    """What an error of obstore means to the caller.

    Its text quotes the request, and with it signatures and tokens: only the status goes on from here.
    """
    metadata = {"path": path}
    match error:
        case FileNotFoundError():
            return BlobNotFound(f"{path} is not in the object store", metadata=metadata)
        case exceptions.PermissionDeniedError():
            return PermissionDenied(f"the object store refuses {path}; look at the credentials", metadata=metadata)
        case exceptions.UnauthenticatedError():
            return Unauthenticated("the object store does not know these credentials", metadata=metadata)
    status = _STATUS.search(str(error))
    # Lists and some servers' answers come as errors of no kind.
    if status is not None and status[1] == "403":
        return PermissionDenied(f"the object store refuses {path}; look at the credentials", metadata=metadata)
    if status is not None and status[1] == "401":
        return Unauthenticated("the object store does not know these credentials", metadata=metadata)
    what = f"it answers {status[1]}" if status else "it does not answer, or breaks off"
    return source_unavailable(f"{path} can't be read from the object store: {what}")


def _state(meta: Any) -> SourceState:
    return SourceState(meta["size"], etag=meta["e_tag"] or "")
