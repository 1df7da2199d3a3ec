"""The repository of an OCI registry that is pushed to: one request a method, and words for its refusals.

Source: OCI distribution-spec 1.1, "Push".
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from helios.mesh.errors import (
    DigestMismatch,
    HeliosError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from helios.registry.manifest import Digest
from helios.registry.sources.oci_login import OciLogin, said
from helios.registry.sources.reference import OciReference, parse_reference
from helios.registry.sources.settings import OciSettings
from helios.registry.sources.web import Answer, Body, Refused, Web, redirected

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
_BYTES: Final = {"content-type": "application/octet-stream"}
_RANGE: Final = re.compile(r"(?:bytes=)?0-(\d{1,18})", re.ASCII)
# What says that an upload is not known, or not as far as the request has it: another one can be begun.
_LOST_STATUS: Final = frozenset({400, 404, 409, 410, 416})
# What says that this registry takes blobs in one piece only.
_UNCHUNKED_STATUS: Final = frozenset({405, 415, 501})


class UploadLost(Exception):
    """The target does not know this upload any more, or not as far as it was thought to be."""


class Unchunked(Exception):
    """The target takes a blob in one piece only."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload at the target: where it goes on, how far it is, and how little a chunk of it may be."""

    place: str
    offset: int = 0
    min_chunk_bytes: int = 0


def parse_target(text: str) -> OciReference:
    """Returns what a model is pushed to. Raises InvalidRequest (INVALID_TARGET)."""
    try:
        reference = parse_reference(text)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, reason="INVALID_TARGET", metadata={"param": "target"}) from error
    if not isinstance(reference, OciReference):
        raise InvalidRequest(
            f"{text[:200]!r} is no target: oci://HOST[:PORT]/REPOSITORY[:TAG]",
            reason="INVALID_TARGET",
            metadata={"param": "target"},
        )
    return reference


class OciTarget:
    """A repository that is written to. Errors are HeliosError where nothing else is said: TARGET_UNAVAILABLE for what
    may be tried again, others for what is refused.
    """

    def __init__(self, reference: OciReference, web: Web, settings: OciSettings) -> None:
        self.reference = reference
        self.repository = reference.repository
        self._login = OciLogin(reference, web, settings, actions="pull,push")
        self._base = self._login.base

    @property
    def name(self) -> str:
        """What the repository is called among all."""
        return f"{self.reference.host}/{self.repository}"

    def mount_from(self, repositories: Collection[str]) -> None:
        """Says which other repositories blobs may be mounted from."""
        self._login.allow_pull(repositories)

    async def find_manifest(self) -> str:
        """Returns the digest that the tag has; empty where there is none. The first request: it logs in."""
        headers = {"accept": MANIFEST_TYPE}
        try:
            answer = await self._request("HEAD", f"{self._base}/manifests/{self.reference.wanted}", headers)
        except Refused as error:
            if error.status == 404:
                return ""
            raise self.explain(error) from error
        return answer.headers.get("docker-content-digest", "")

    async def has(self, digest: Digest) -> bool:
        """Returns whether the repository has a blob."""
        try:
            answer = await self._request("HEAD", f"{self._base}/blobs/{digest}", {})
        except Refused as error:
            if error.status == 404:
                return False
            raise self.explain(error) from error
        return answer.headers.get("content-length", str(digest.size_bytes)) == str(digest.size_bytes)

    async def begin(self, digest: Digest, mount: str) -> Upload | None:
        """Begins an upload; None if the blob is there at once, mounted from another repository.

        Args:
            digest: The blob.
            mount: A repository that may have it; empty: whichever the target finds itself.
        """
        query = {"mount": str(digest)} | ({"from": mount} if mount else {})
        url = f"{self._base}/blobs/uploads/"
        headers = {"content-length": "0"}
        try:
            answer = await self._request("POST", f"{url}?{urlencode(query)}", headers, is_following=False)
        except Refused as error:
            if error.status not in {403, 404, 405} or not mount:
                raise self.explain(error) from error
            # The other repository may be one that this login must not read.
            return await self.begin(digest, "")
        if answer.status == 201:
            return None
        least = answer.headers.get("oci-chunk-min-length", "0")
        return Upload(_place(url, answer, ""), 0, int(least) if least.isdecimal() and len(least) < 12 else 0)

    async def find(self, place: str, digest: Digest) -> Upload:
        """Returns an upload as far as it is. Raises UploadLost."""
        try:
            answer = await self._request("GET", place, {}, is_following=False)
        except Refused as error:
            raise UploadLost from error
        found = _RANGE.fullmatch(answer.headers.get("range", ""))
        # "0-0" is what nothing is called, too.
        offset = int(found[1]) + 1 if found is not None and found[1] != "0" else 0
        if offset > digest.size_bytes:
            raise UploadLost
        return Upload(_place(place, answer, place), offset)

    async def send(self, upload: Upload, chunk: Body, length: int) -> Upload:
        """Sends a chunk; once. Raises UploadLost, Unchunked."""
        end = upload.offset + length
        headers = {**_BYTES, "content-range": f"{upload.offset}-{end - 1}", "content-length": str(length)}
        try:
            answer = await self._request("PATCH", upload.place, headers, body=chunk, attempts=1, is_following=False)
        except Refused as error:
            if error.status in _UNCHUNKED_STATUS:
                raise Unchunked from error
            if error.status in _LOST_STATUS:
                raise UploadLost from error
            raise self.explain(error) from error
        found = _RANGE.fullmatch(answer.headers.get("range", ""))
        if found is not None and int(found[1]) + 1 != end:
            raise UploadLost
        return Upload(_place(upload.place, answer, upload.place), end, upload.min_chunk_bytes)

    async def finish(self, upload: Upload, digest: Digest, rest: Body | None, length: int) -> None:
        """Ends an upload with what is left of it; once. The target checks its sha256. Raises UploadLost."""
        separator = "&" if "?" in upload.place else "?"
        url = f"{upload.place}{separator}{urlencode({'digest': str(digest)})}"
        headers = {**_BYTES, "content-length": str(length)}
        if length and upload.offset:
            headers["content-range"] = f"{upload.offset}-{upload.offset + length - 1}"
        try:
            answer = await self._request("PUT", url, headers, body=rest, attempts=1, is_following=False)
        except Refused as error:
            if error.status in _LOST_STATUS:
                raise UploadLost(said(error)) from error
            raise self.explain(error) from error
        found = answer.headers.get("docker-content-digest", str(digest))
        if answer.status != 201 or found != str(digest):
            raise UploadLost

    async def put_manifest(self, content: bytes, digest: str) -> None:
        """Stores the manifest under the tag. Raises DigestMismatch: the target calls it something else."""
        url = f"{self._base}/manifests/{self.reference.wanted}"
        headers = {"content-type": MANIFEST_TYPE}
        try:
            answer = await self._request("PUT", url, headers, body=content)
        except Refused as error:
            raise self.explain(error) from error
        found = answer.headers.get("docker-content-digest") or await self.find_manifest()
        if found != digest:
            raise DigestMismatch(
                f"{self.reference.host} stored the manifest of {digest} as {found[:100] or 'nothing'}",
                metadata={"expected": digest, "found": found[:100]},
            )

    def explain(self, error: Refused) -> HeliosError:
        """Returns the error of a refusal."""
        host, target, words = self.reference.host, str(self.reference), said(error)
        metadata = {"param": "target", "status": str(error.status)}
        detail = f" ({words})" if words else ""
        if error.status == 404:
            return NotFound(
                f"{host} has no {self.repository}, and does not make it by itself; make it there first{detail}",
                reason="TARGET_NOT_FOUND",
                metadata=metadata,
            )
        if error.status in {401, 403} and not self._login.credentials:
            return PreconditionFailed(
                f"{host} does not let everybody write {target}; give the registry a login, by docker login or"
                f' HELIOS_REGISTRY__SOURCES__OCI__CREDENTIALS=\'{{"{host}": "USER:PASSWORD"}}\'',
                reason="TARGET_LOGIN_MISSING",
                metadata=metadata,
            )
        if error.status in {401, 403}:
            return PermissionDenied(
                f"{host} refuses {target} to the registry's user; check name, password and rights{detail}",
                reason="TARGET_ACCESS_DENIED",
                metadata=metadata,
            )
        return InvalidRequest(
            f"{host} answered {error.status} for {target}{detail}", reason="TARGET_REFUSED", metadata=metadata
        )

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        body: Body | None = None,
        attempts: int | None = None,
        is_following: bool = True,
    ) -> Answer:
        try:
            return await self._login.request(
                method, url, headers=headers, body=body, attempts=attempts, is_following=is_following
            )
        except Unavailable as error:
            raise Unavailable(
                f"{self.reference.host} can't be pushed to now: {error.message.partition(';')[0]}; push again: what"
                " arrived is not sent again",
                reason="TARGET_UNAVAILABLE",
                retry_after_seconds=error.retry_after_seconds,
                metadata=error.metadata,
            ) from error


def _place(url: str, answer: Answer, otherwise: str) -> str:
    """Returns where an upload goes on after an answer. Raises Unavailable where that would give up TLS."""
    return redirected(url, answer.headers.get("location", otherwise))
