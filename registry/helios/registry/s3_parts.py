"""Multipart uploads to S3, in the calls that obstore has no Python for: its own uploads can't go on after a crash.

botocore rather than boto3's transfers (which keep no state either) and rather than signing requests here: AWS's own,
with its retries, and its chain of credentials where none are configured. Credentials, endpoint and region are those
that obstore found, so there is one place to set them.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from helios.registry.part_upload import Unfinished, UploadGone
from helios.registry.store_errors import denied, unavailable
from helios.registry.upload_journal import Upload

_DENIED: Final = frozenset({401, 403})
_CONNECT_SECONDS: Final = 5
_ATTEMPTS: Final = 6


@dataclass(frozen=True, slots=True)
class S3Access:
    """How a bucket is reached; without keys, botocore looks where AWS's tools look (roles of pods and machines)."""

    endpoint: str | None
    region: str
    access_key_id: str | None = field(repr=False)
    secret_access_key: str | None = field(repr=False)
    session_token: str | None = field(repr=False)
    is_virtual_hosted: bool


class S3Parts:
    """The uploads of one bucket below a prefix; a ``PartStore``."""

    def __init__(self, bucket: str, prefix: str, access: S3Access, *, request_seconds: float) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: Any = botocore.session.Session().create_client(
            "s3",
            region_name=access.region,
            endpoint_url=access.endpoint,
            aws_access_key_id=access.access_key_id,
            aws_secret_access_key=access.secret_access_key,
            aws_session_token=access.session_token,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "virtual" if access.is_virtual_hosted else "path"},
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=request_seconds,
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                # Parts carry a checksum that every S3 verifies; the newer ones of AWS, others refuse.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
            ),
        )

    def begin(self, key: str) -> str:
        with _mapped():
            return str(self._client.create_multipart_upload(Bucket=self._bucket, Key=self._prefix + key)["UploadId"])

    def put_part(self, upload: Upload, number: int, data: bytes, sha256: str) -> str:
        del sha256
        checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with _mapped():
            answer = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._prefix + upload.key,
                UploadId=upload.upload,
                PartNumber=number,
                Body=data,
                ContentMD5=checksum,
            )
            return str(answer["ETag"])

    def complete(self, upload: Upload, tags: Mapping[int, str]) -> None:
        parts = [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
        try:
            with _mapped():
                self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._prefix + upload.key,
                    UploadId=upload.upload,
                    MultipartUpload={"Parts": parts},
                    IfNoneMatch="*",
                )
        except _Exists:
            self.abort(upload)

    def abort(self, upload: Upload) -> None:
        try:
            with _mapped():
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._prefix + upload.key, UploadId=upload.upload
                )
        except UploadGone:
            return

    def unfinished(self) -> Iterator[Unfinished]:
        with _mapped():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}sha256/"
            )
            for page in pages:
                for each in page.get("Uploads", ()):
                    key = each["Key"].removeprefix(self._prefix)
                    yield Unfinished(key, each["UploadId"], each["Initiated"])

    def close(self) -> None:
        self._client.close()


class _Exists(Exception):
    """There is an object under the key already."""


@contextmanager
def _mapped() -> Iterator[None]:
    """Raises botocore's errors as the mesh's. Their texts are kept out: they may name what was signed."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in ("NoSuchUpload", "ConditionalRequestConflict"):
            raise UploadGone("the store knows the upload no more") from error
        if code == "PreconditionFailed" or status == 412:
            raise _Exists from error
        raise (denied if status in _DENIED else unavailable)(code or f"HTTP {status}") from error
    except BotoCoreError as error:
        raise unavailable(type(error).__name__) from error
