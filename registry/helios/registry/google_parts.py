"""Multipart uploads to Google Cloud Storage, by its XML interface.

Google has two ways to go on with an upload: a resumable session, and the multipart upload that it has in common with
S3. Multipart fits what a registry keeps of uploads (``part_upload``): parts travel several at once, each with a
checksum that is verified, the journal says by hash which of them are there, and left ones can be listed and dropped. A
session takes its bytes in order, on one connection, knows only how many of them it has, is not listed, and ends after a
week.

obstore uploads by the same requests, but as one call that begins anew, and it has no call for its tokens. Those come
from google-auth, which finds credentials where Google's own tools do: a key, the metadata server, a federated identity.
google-cloud-storage and google-resumable-media speak the other interface, and bring a client for five requests.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import google.auth
import urllib3
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.urllib3 import Request
from google.oauth2.credentials import Credentials as User
from google.oauth2.service_account import Credentials as ServiceAccount

from helios.mesh.errors import Unavailable
from helios.registry.part_upload import Unfinished, UploadGone
from helios.registry.store_errors import denied, unavailable
from helios.registry.store_http import open_pool
from helios.registry.upload_journal import Upload

_ADDRESS: Final = "https://storage.googleapis.com"
_KINDS: Final[dict[str, Any]] = {
    "service_account": ServiceAccount.from_service_account_info,
    "authorized_user": User.from_authorized_user_info,
}
_SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.read_write",)


@dataclass(frozen=True, slots=True)
class GoogleAccess:
    """How Google is reached, by obstore's options; without any of them, as Google's tools do it.

    Attributes:
        base_url: Where the store is; None: Google's.
        bearer_token: A token to use as it is.
        key: A service account's key, as JSON.
        key_file: A file with credentials.
        is_anonymous: No credentials are sent.
    """

    base_url: str | None
    bearer_token: str | None = field(repr=False)
    key: str | None = field(repr=False)
    key_file: str | None
    is_anonymous: bool


class GoogleParts:
    """The multipart uploads of one bucket below a prefix; a ``PartStore``."""

    def __init__(self, bucket: str, prefix: str, access: GoogleAccess, *, request_seconds: float) -> None:
        """Takes a bucket and a prefix in it. Credentials are looked for with the first request.

        Raises:
            ValueError: The key is none.
        """
        document = json.loads(access.key) if access.key else {}
        base = access.base_url or document.get("gcs_base_url") or _ADDRESS
        self._bucket_url = f"{base.rstrip('/')}/{quote(bucket)}"
        self._prefix = f"{prefix}/" if prefix else ""
        self._pool = open_pool(request_seconds)
        self._login = _Login(access, document, self._pool)

    def begin(self, key: str) -> str:
        return _text(self._ask("POST", key, {"uploads": ""}), "UploadId")

    def put_part(self, upload: Upload, number: int, data: bytes, sha256: str) -> str:
        del sha256
        checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        query = {"partNumber": str(number), "uploadId": upload.upload}
        return self._ask("PUT", upload.key, query, data, {"Content-MD5": checksum}).headers["ETag"]

    def complete(self, upload: Upload, tags: Mapping[int, str]) -> None:
        """Makes the object; one that is there is replaced, by the same bytes: Google knows no condition here."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tags[number])}</ETag></Part>"
            for number in sorted(tags)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        self._ask("POST", upload.key, {"uploadId": upload.upload}, body, {"Content-Type": "application/xml"})

    def abort(self, upload: Upload) -> None:
        try:
            self._ask("DELETE", upload.key, {"uploadId": upload.upload})
        except UploadGone:
            return

    def unfinished(self) -> Iterator[Unfinished]:
        query = {"uploads": "", "prefix": f"{self._prefix}sha256/"}
        is_more = True
        while is_more:
            page = _parse(self._ask("GET", None, query))
            for each in page.iterfind("{*}Upload"):
                key = (each.findtext("{*}Key") or "").removeprefix(self._prefix)
                began_at = datetime.fromisoformat(each.findtext("{*}Initiated") or "")
                yield Unfinished(key, each.findtext("{*}UploadId") or "", began_at)
            is_more = page.findtext("{*}IsTruncated") == "true"
            for name, tag in (("key-marker", "NextKeyMarker"), ("upload-id-marker", "NextUploadIdMarker")):
                query[name] = page.findtext(f"{{*}}{tag}") or ""

    def close(self) -> None:
        self._pool.clear()

    def _ask(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Sends a request for an object, or the bucket where ``key`` is None.

        Raises:
            UploadGone, Unavailable: As ``PartStore`` says.
        """
        path = "" if key is None else "/" + quote(self._prefix + key)
        url = f"{self._bucket_url}{path}?" + "&".join(
            f"{name}={quote(value, safe='')}" if value else name for name, value in query.items()
        )
        try:
            sent = {**(headers or {}), **self._login.headers()}
            answer = self._pool.request(method, url, body=body, headers=sent)
        except GoogleAuthError as error:
            raise (unavailable if error.retryable else denied)(type(error).__name__) from None
        except urllib3.exceptions.HTTPError as error:
            raise unavailable(type(error).__name__) from None
        if answer.status < 300:
            return answer
        code = _code(answer)
        if code == "NoSuchUpload" or (answer.status == 404 and "uploadId" in query):
            raise UploadGone("the store knows the upload no more")
        raise (denied if answer.status in (401, 403) else unavailable)(code)


class _Login:
    """What says to Google who asks. Thread-safe: parts are sent by several threads, of which one renews a token."""

    def __init__(self, access: GoogleAccess, document: Mapping[str, Any], pool: urllib3.PoolManager) -> None:
        self._access = access
        self._document = document
        self._is_anonymous = access.is_anonymous or bool(document.get("disable_oauth"))
        self._request = Request(pool)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._credentials: Any = None

    def headers(self) -> dict[str, str]:
        """Returns the headers. May ask Google; raises GoogleAuthError."""
        if self._access.bearer_token:
            return {"Authorization": f"Bearer {self._access.bearer_token}"}
        if self._is_anonymous:
            return {}
        headers: dict[str, str] = {}
        with self._lock:
            if self._credentials is None:
                self._credentials = self._find()
            # Renews a token some minutes before it expires.
            self._credentials.before_request(self._request, "GET", _ADDRESS, headers)
        return headers

    def _find(self) -> Any:
        document = self._document
        if not document and self._access.key_file:
            try:
                document = json.loads(Path(self._access.key_file).read_bytes())
            except (OSError, ValueError) as error:
                raise denied(f"credentials file: {type(error).__name__}") from None
        make = _KINDS.get(document.get("type", "service_account" if document else ""))
        # Federated identities, and those of machines; a file is found by GOOGLE_APPLICATION_CREDENTIALS.
        return google.auth.default(scopes=_SCOPES)[0] if make is None else make(document, scopes=_SCOPES)


def _parse(answer: urllib3.BaseHTTPResponse) -> ET.Element:
    """Reads an answer of the registry's own store; expat bounds what entities may expand to."""
    try:
        return ET.fromstring(answer.data)  # noqa: S314
    except ET.ParseError as error:
        raise unavailable("an answer that is no XML") from error


def _text(answer: urllib3.BaseHTTPResponse, name: str) -> str:
    found = _parse(answer).findtext(f"{{*}}{name}")
    if not found:
        raise unavailable(f"an answer without {name}")
    return found


def _code(answer: urllib3.BaseHTTPResponse) -> str:
    """Returns what the store calls an error; nothing else of the answer, which may quote what was signed."""
    found = ""
    if answer.data.lstrip().startswith(b"<"):
        with suppress(Unavailable):
            found = _parse(answer).findtext("Code") or ""
    return found if found.isalnum() else f"HTTP {answer.status}"
