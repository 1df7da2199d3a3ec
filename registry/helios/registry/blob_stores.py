"""Which blob store a registry has, by one URL.

| URL | store | credentials, from the environment |
|---|---|---|
| (empty) | the state directory's ``blobs`` | none |
| ``file:///directory`` or ``/directory`` | that directory | none |
| ``s3://bucket/prefix`` | S3 and what speaks it | ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, … |
| ``gs://bucket/prefix`` | Google Cloud Storage | ``GOOGLE_APPLICATION_CREDENTIALS``, … |
| ``az://container/prefix`` | Azure Blob Storage | ``AZURE_STORAGE_ACCOUNT_NAME``, ``AZURE_STORAGE_ACCOUNT_KEY`` |

Endpoint and region have environment variables too (``AWS_ENDPOINT_URL``, ``AWS_REGION``); the names are obstore's,
which are those of the clouds' own tools. Whatever is set in ``blob_store.options`` under the same names goes first.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from helios.mesh.errors import InvalidRequest, PreconditionFailed
from helios.registry.directory_store import DirectoryStore
from helios.registry.part_upload import PartStore, PartUploader, UploadLimits
from helios.registry.settings import BlobStoreSettings
from helios.registry.state import StateDirectory
from helios.registry.upload_journal import UploadJournal

if TYPE_CHECKING:
    from helios.registry.object_store import ObjectStore

# What readers may be told of a store's configuration, under its first name here; all else may be a secret.
_PUBLIC: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "s3": (
        ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
        ("aws_region", "region", "aws_default_region"),
        ("aws_virtual_hosted_style_request", "virtual_hosted_style_request"),
    ),
    "gs": (("google_base_url", "base_url"),),
    "az": (
        ("azure_storage_account_name", "account_name"),
        ("azure_storage_endpoint", "azure_endpoint", "endpoint"),
    ),
}
_CLOUDS: Final = {"s3": "aws", "gs": "google", "az": "azure"}
_CONNECT_SECONDS: Final = 5


class StoreOptions:
    """A store's configuration: the settings' options, then the environment's, by obstore's names in lower case."""

    def __init__(self, options: Mapping[str, SecretStr], environment: Mapping[str, str]) -> None:
        self.explicit = {name.lower(): value.get_secret_value() for name, value in options.items()}
        self._environment = environment

    def find(self, *names: str) -> str | None:
        """Returns the first of these that is set, None where none is."""
        for name in names:
            if name in self.explicit:
                return self.explicit[name]
        return next((self._environment[name.upper()] for name in names if self._environment.get(name.upper())), None)

    def public(self, scheme: str) -> dict[str, str]:
        """Returns what a reader of the store must know, by obstore's names: never a secret."""
        found = {names[0]: self.find(*names) for names in _PUBLIC[scheme]}
        # An endpoint may hold a password, as any URL.
        return {name: value for name, value in found.items() if value and "@" not in value}


@contextmanager
def open_store(
    settings: BlobStoreSettings, state: StateDirectory, environment: Mapping[str, str]
) -> Iterator["DirectoryStore | ObjectStore"]:
    """Yields the blob store of a registry; ``environment`` is the process's, where obstore looks too.

    Raises:
        InvalidRequest: INVALID_BLOB_STORE, the URL or an option makes no sense.
        PreconditionFailed: BLOB_STORE_IN_USE; CLOUD_NOT_INSTALLED.
    """
    if not settings.url:
        # The state directory has one owner already.
        yield DirectoryStore(state.blobs)
        return
    parts = urlsplit(settings.url)
    if parts.scheme in ("", "file"):
        directory = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not directory.is_absolute():
            raise _invalid("a directory is given by an absolute path")
        with DirectoryStore(directory).owned() as store:
            yield store
        return
    if parts.scheme not in _PUBLIC:
        raise _invalid("the URL of a blob store begins with s3://, gs://, az:// or file://")
    if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise _invalid("the URL of a blob store is a bucket and a prefix; credentials come from the environment")
    place = _Place(parts.scheme, parts.netloc, unquote(parts.path).strip("/"))
    options = StoreOptions(settings.options, environment)
    with closing(_open_bucket(place, settings, options, UploadJournal(state.uploads))) as bucket:
        yield bucket


@dataclass(frozen=True, slots=True)
class _Place:
    scheme: str
    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")


def _open_bucket(
    place: _Place, settings: BlobStoreSettings, options: StoreOptions, journal: UploadJournal
) -> "ObjectStore":
    # In the extra `cloud`: a registry with a directory needs none of it.
    try:
        import obstore.store  # noqa: PLC0415
    except ImportError as error:
        raise PreconditionFailed(
            f"{place.scheme}:// needs the extra 'cloud': pip install helios-llm[cloud]", reason="CLOUD_NOT_INSTALLED"
        ) from error
    from helios.registry.object_store import ObjectStore  # noqa: PLC0415

    kind = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore, "az": obstore.store.AzureStore}[place.scheme]
    # An option of the client to obstore, which reads those from no environment.
    allow_http = options.find(f"{_CLOUDS[place.scheme]}_allow_http", "allow_http")
    client_options: dict[str, Any] = {
        "timeout": timedelta(seconds=settings.request_seconds),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
    }
    if allow_http is not None:
        client_options["allow_http"] = allow_http.lower() in ("true", "1")
    try:
        store: Any = kind(
            place.bucket,
            prefix=place.prefix or None,
            config={name: value for name, value in options.explicit.items() if not name.endswith("allow_http")},
            client_options=client_options,
            retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=settings.retry_seconds)},
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        # The text may quote an option's value.
        raise _invalid(f"the blob store's options make no sense ({type(error).__name__})") from None
    limits = UploadLimits(settings.part_bytes, settings.concurrency)
    parts = _parts_of(place, store, options, settings)
    uploader = PartUploader(place.url, parts, journal, limits)
    return ObjectStore(store, url=place.url, options=options.public(place.scheme), limits=limits, uploader=uploader)


def _parts_of(place: _Place, store: Any, options: StoreOptions, settings: BlobStoreSettings) -> PartStore:
    if place.scheme == "s3":
        from helios.registry.s3_parts import S3Access, S3Parts  # noqa: PLC0415 - in the extra `cloud`

        access = S3Access(
            endpoint=options.find("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
            region=options.find("aws_region", "region", "aws_default_region") or "us-east-1",
            access_key_id=options.find("aws_access_key_id", "access_key_id"),
            secret_access_key=options.find("aws_secret_access_key", "secret_access_key"),
            session_token=options.find("aws_session_token", "aws_token", "session_token", "token"),
            is_virtual_hosted=options.find("aws_virtual_hosted_style_request", "virtual_hosted_style_request")
            == "true",
        )
        return S3Parts(place.bucket, place.prefix, access, request_seconds=settings.request_seconds)
    if place.scheme == "az":
        import obstore  # noqa: PLC0415

        from helios.registry.azure_parts import AzureParts  # noqa: PLC0415

        def sign(method: Literal["PUT"], key: str, expires: timedelta) -> str:
            return str(obstore.sign(store, method, key, expires))

        return AzureParts(sign, request_seconds=settings.request_seconds)
    from helios.registry.google_parts import GoogleAccess, GoogleParts  # noqa: PLC0415

    google = GoogleAccess(
        base_url=options.find("google_base_url", "base_url"),
        bearer_token=options.find("google_bearer_token", "bearer_token"),
        key=options.find("google_service_account_key", "service_account_key"),
        key_file=options.find(
            *("google_service_account", "service_account", "google_service_account_path", "service_account_path"),
            *("google_application_credentials", "application_credentials"),
        ),
        is_anonymous=options.find("google_skip_signature", "skip_signature") == "true",
    )
    try:
        return GoogleParts(place.bucket, place.prefix, google, request_seconds=settings.request_seconds)
    except ValueError as error:
        raise _invalid(f"the key of Google's service account is none ({type(error).__name__})") from None


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_BLOB_STORE", metadata={"param": "blob_store.url"})
