"""The Hugging Face hub, or a service that speaks as it does: mirrors, and companies' own.

Two requests tell all that is needed before a byte is fetched: the commit behind a branch or tag, and the tree with
size, git sha1 and (for what git keeps as a pointer) sha256 of every file. Everything after that names the commit, so a
branch that moves meanwhile changes nothing. Large files are a redirect to a signed URL of a content network that is
good for an hour or so; the transfer engine asks for another when it has expired, and gives the token to the hub alone.

Source: https://huggingface.co/docs/hub/api, and huggingface_hub 2.4 for what stands in no document: X-Error-Code,
X-Linked-Etag, and that a repository one may not see is answered 401.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.source import RangeSource
from helios.registry.sources.reference import HubReference
from helios.registry.sources.remote import Listing, RemoteFile, changed
from helios.registry.sources.settings import HubSettings
from helios.registry.sources.web import Refused, Web, origin, redirected, shown, unavailable, without_credentials

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NEXT: Final = re.compile(r'<([^>]+)>;\s*rel="next"')
# A thousand files a page.
_MAX_PAGES: Final = 100
# huggingface_hub's own codes.
_GATED: Final = "GatedRepo"
_NO_REVISION: Final = "RevisionNotFound"
_BAD_TOKEN: Final = "Invalid credentials in Authorization header"  # noqa: S105 - the hub's words


@dataclass(frozen=True, slots=True)
class _Access:
    """What is asked, for messages."""

    source: str
    revision: str
    endpoint: str
    has_token: bool


class HuggingFaceRepository:
    """A model of the hub; ``remote.Repository``. The token is read when it is made, so a new one needs no restart."""

    def __init__(self, reference: HubReference, web: Web, settings: HubSettings) -> None:
        self._reference = reference
        self._web = web
        self._endpoint = settings.endpoint.rstrip("/")
        token = read_token(settings)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._commit = ""
        self._access = _Access(str(reference), reference.revision, self._endpoint, bool(token))

    async def list_files(self) -> Listing:
        """Returns the files of the commit that the revision names now."""
        base = f"{self._endpoint}/api/models/{self._reference.repository}"
        revision = self._reference.revision
        about = await self._document(f"{base}/revision/{quote(revision, safe='')}" if revision else base)
        commit = about.get("sha") if isinstance(about, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise unavailable(base, "does not answer as a Hugging Face hub")
        self._commit = commit
        entries = await self._tree(f"{base}/tree/{commit}?recursive=true&expand=false")
        files = tuple(self._file(entry) for entry in entries if entry.get("type") == "file")
        return Listing(f"hf:{self._reference.repository}@{commit}", files)

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of a file."""
        try:
            is_whole = length == file.size_bytes
            content = await self._web.read(
                file.place, headers=self._headers, offset=offset, length=length, is_whole=is_whole
            )
        except Refused as error:
            raise self._translate(error) from error
        if len(content) != length:
            raise changed(file.path)
        return content

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns a file for reading by ranges."""
        return HttpSource(file.place, headers=lambda: self._headers)

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a file whose bytes were refused."""
        return explain(self._access, status, code="", message=detail)

    async def _tree(self, url: str) -> list[Mapping[str, Any]]:
        entries: list[Mapping[str, Any]] = []
        headers = self._headers
        for _ in range(_MAX_PAGES):
            try:
                answer = await self._web.request("GET", url, headers=headers)
            except Refused as error:
                raise self._translate(error) from error
            page = answer.document()
            if not isinstance(page, list) or not all(isinstance(entry, dict) for entry in page):
                raise unavailable(url, "does not answer as a Hugging Face hub")
            entries += page
            following = _NEXT.search(answer.headers.get("link", ""))
            if following is None:
                return entries
            url = redirected(url, following[1])
            if origin(url) != origin(self._endpoint):
                # A mirror that passes the hub's own links on.
                headers = without_credentials(headers)
        raise InvalidRequest(f"{self._access.source} has too many files to be one model", reason="UNSUPPORTED_FORMAT")

    async def _document(self, url: str) -> Any:
        try:
            return (await self._web.request("GET", url, headers=self._headers)).document()
        except Refused as error:
            raise self._translate(error) from error

    def _file(self, entry: Mapping[str, Any]) -> RemoteFile:
        """Reads one entry of the tree. Raises Unavailable, or InvalidRequest for a path that can't be one."""
        path, size, oid, pointer = entry.get("path"), entry.get("size"), entry.get("oid"), entry.get("lfs")
        sha256 = pointer.get("oid") or pointer.get("sha256") if isinstance(pointer, dict) else None
        if not isinstance(path, str) or type(size) is not int or not isinstance(oid, str):
            raise unavailable(self._endpoint, "lists files in a form that is not known")
        place = f"{self._endpoint}/{self._reference.repository}/resolve/{self._commit}/{quote(path)}"
        if isinstance(sha256, str):
            return RemoteFile(path, size, place, sha256=sha256)
        return RemoteFile(path, size, place, git_sha1=oid if _COMMIT.fullmatch(oid) else "")

    def _translate(self, error: Refused) -> HeliosError:
        return explain(self._access, error.status, code=error.code, message=error.message)


def read_token(settings: HubSettings) -> str:
    """Returns the token to show: the setting, else the file where ``hf auth login`` keeps one; empty: none."""
    token = settings.token.get_secret_value()
    if token or settings.token_file is None:
        return token
    try:
        return Path(settings.token_file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def explain(access: _Access, status: int, *, code: str, message: str) -> HeliosError:
    """Returns a refusal of the hub in words that say what to do."""
    source, where = access.source, shown(access.endpoint)
    login = (
        "give the registry a token that may: `hf auth login` as the user it runs as, or"
        " HF_TOKEN, or HELIOS_REGISTRY__SOURCES__HUGGING_FACE__TOKEN, in the environment of `helios up`"
    )
    metadata = {"param": "source", "status": str(status)}
    if message == _BAD_TOKEN:
        return PreconditionFailed(
            f"{where} does not take the registry's token (wrong, expired or revoked); {login}",
            reason="SOURCE_TOKEN_INVALID",
            metadata=metadata,
        )
    if code == _GATED:
        if access.has_token:
            return PermissionDenied(
                f"{source} is gated, and the token's user has no access yet: ask for it at"
                f" {where}/{source.partition(':')[2].partition('@')[0]}, then ingest again",
                reason="SOURCE_GATED",
                metadata=metadata,
            )
        return PreconditionFailed(f"{source} is gated; {login}", reason="SOURCE_TOKEN_MISSING", metadata=metadata)
    if code == _NO_REVISION:
        return NotFound(
            f"{source}: the repository has no revision {access.revision!r}; name a branch, tag or commit of it",
            reason="SOURCE_REVISION_NOT_FOUND",
            metadata=metadata,
        )
    if status in {401, 404} and not access.has_token:
        return NotFound(
            f"{where} has no {source} that everybody may see: check the name; if it is private or gated, {login}",
            reason="SOURCE_NOT_FOUND",
            metadata=metadata,
        )
    if status == 404:
        return NotFound(
            f"{where} has no {source} that the registry's token may see: check the name and the token's rights",
            reason="SOURCE_NOT_FOUND",
            metadata=metadata,
        )
    if status in {401, 403}:
        said = f" ({message})" if message else ""
        return PermissionDenied(
            f"{where} refuses access to {source}{said}; check the rights of the registry's token",
            reason="SOURCE_ACCESS_DENIED",
            metadata=metadata,
        )
    said = f": {message}" if message else ""
    return InvalidRequest(f"{where} answered {status} for {source}{said}", reason="INVALID_SOURCE", metadata=metadata)
