"""Block uploads to Azure Blob Storage: uncommitted blocks are the parts, and committing their list makes the blob.

Requests are signed by obstore (`sign`, a URL for one blob and one hour), which has the credentials, of whatever kind;
only the query that says which block is added here. Azure's SDK would need the credentials a second time and brings a
pipeline for three requests.

A block's name holds its number and its sha256, so a block is never taken for one of other bytes. An upload has no name
of its own: blocks belong to the blob's key, and Azure drops those that were not committed for a week.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Final, Literal
from xml.sax.saxutils import escape

import urllib3

from helios.registry.part_upload import Unfinished, UploadGone
from helios.registry.store_errors import denied, mapped, unavailable
from helios.registry.store_http import open_pool
from helios.registry.upload_journal import Upload

_SIGNED_FOR: Final = timedelta(hours=1)
# The version in which everything used here is known; SAS tokens and conditional block lists are older.
_VERSION: Final = "2021-12-02"


class AzureParts:
    """The block uploads of one container; a ``PartStore``."""

    def __init__(self, sign: Callable[[Literal["PUT"], str, timedelta], str], *, request_seconds: float) -> None:
        """Takes what signs a method and a key for a time, obstore's ``sign``."""
        self._sign = sign
        self._pool = open_pool(request_seconds)

    def begin(self, key: str) -> str:
        return key

    def put_part(self, upload: Upload, number: int, data: bytes, sha256: str) -> str:
        tag = base64.b64encode(f"{number:06d}-{sha256[:40]}".encode()).decode()
        checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        self._put(upload.key, {"comp": "block", "blockid": tag}, data, {"Content-MD5": checksum})
        return tag

    def complete(self, upload: Upload, tags: Mapping[int, str]) -> None:
        blocks = "".join(f"<Uncommitted>{escape(tags[number])}</Uncommitted>" for number in sorted(tags))
        body = f"<?xml version='1.0' encoding='utf-8'?><BlockList>{blocks}</BlockList>".encode()
        self._put(upload.key, {"comp": "blocklist"}, body, {"If-None-Match": "*"})

    def abort(self, upload: Upload) -> None:
        """Does nothing: there is no call for it but writing the blob."""

    def unfinished(self) -> Iterator[Unfinished]:
        return iter(())

    def close(self) -> None:
        self._pool.clear()

    def _put(self, key: str, query: dict[str, str], body: bytes, headers: dict[str, str]) -> None:
        with mapped():
            url = self._sign("PUT", key, _SIGNED_FOR)
        url += "&" + "&".join(f"{name}={_quoted(value)}" for name, value in query.items())
        try:
            answer = self._pool.request("PUT", url, body=body, headers={"x-ms-version": _VERSION, **headers})
        except urllib3.exceptions.HTTPError as error:
            # Its text holds the signed URL.
            raise unavailable(type(error).__name__) from None
        code = answer.headers.get("x-ms-error-code", f"HTTP {answer.status}")
        if answer.status in (200, 201):
            return
        if (
            code in ("InvalidBlockList", "InvalidBlobOrBlock", "BlobAlreadyExists", "ConditionNotMet")
            or answer.status == 409
        ):
            # Its blocks are gone, with the commit of a list that dropped them, or the blob is there.
            raise UploadGone(f"the blob's blocks are gone ({code})")
        raise (denied if answer.status in (401, 403) else unavailable)(code)


def _quoted(value: str) -> str:
    return value.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
