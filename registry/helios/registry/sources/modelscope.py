"""ModelScope: the same idea as the Hugging Face hub on another wire.

One request lists a branch, with the sha256 of every file, which is what is held to: a branch that moves between listing
and reading is noticed as other content.

Source: modelscope-hub 0.5 (``api.py``, ``file_download.py``); there is no published description.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.source import RangeSource
from helios.registry.sources.hugging_face import read_token
from helios.registry.sources.reference import HubReference
from helios.registry.sources.remote import Listing, RemoteFile, changed
from helios.registry.sources.settings import HubSettings
from helios.registry.sources.web import Refused, Web, unavailable

_DEFAULT_BRANCH: Final = "master"


class ModelScopeRepository:
    """A model of ModelScope; ``remote.Repository``."""

    def __init__(self, reference: HubReference, web: Web, settings: HubSettings) -> None:
        self._reference = reference
        self._revision = reference.revision or _DEFAULT_BRANCH
        self._web = web
        self._base = f"{settings.endpoint.rstrip('/')}/api/v1/models/{reference.repository}/repo"
        token = read_token(settings)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    async def list_files(self) -> Listing:
        """Returns the files of the branch as it is now."""
        url = f"{self._base}/files?{urlencode({'Revision': self._revision, 'Recursive': 'True'})}"
        try:
            answer = (await self._web.request("GET", url, headers=self._headers)).document()
        except Refused as error:
            raise self.explain(error.status, error.message) from error
        match answer:
            case {"Code": 200, "Data": {"Files": list(entries)}}:
                files = tuple(self._file(entry) for entry in entries if entry.get("Type") == "blob")
                return Listing(f"ms:{self._reference.repository}@{self._revision}", files)
            case {"Code": int(code)}:
                # Its refusals may come with a status of 200.
                raise self.explain(code if 400 <= code < 500 else 404, str(answer.get("Message", ""))[:300])
        raise unavailable(url, "does not answer as ModelScope does")

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of a file."""
        try:
            is_whole = length == file.size_bytes
            content = await self._web.read(
                file.place, headers=self._headers, offset=offset, length=length, is_whole=is_whole
            )
        except Refused as error:
            raise self.explain(error.status, error.message) from error
        if len(content) != length:
            raise changed(file.path)
        return content

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns a file for reading by ranges."""
        return HttpSource(file.place, headers=lambda: self._headers)

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a refusal."""
        source, metadata = str(self._reference), {"param": "source", "status": str(status)}
        login = "HELIOS_REGISTRY__SOURCES__MODELSCOPE__TOKEN in the environment of `helios up`"
        if status == 404:
            return NotFound(
                f"ModelScope has no {source} that the registry may see: check name and revision; a private one needs"
                f" a token, {login}",
                reason="SOURCE_NOT_FOUND",
                metadata=metadata,
            )
        if status in {401, 403}:
            if not self._headers:
                return PreconditionFailed(
                    f"{source} is not for everybody; give the registry a token, {login}",
                    reason="SOURCE_TOKEN_MISSING",
                    metadata=metadata,
                )
            return PermissionDenied(
                f"ModelScope refuses {source} to the registry's token; check its rights, or set another one: {login}",
                reason="SOURCE_ACCESS_DENIED",
                metadata=metadata,
            )
        return InvalidRequest(
            f"ModelScope answered {status} for {source}: {detail}", reason="INVALID_SOURCE", metadata=metadata
        )

    def _file(self, entry: Mapping[str, Any]) -> RemoteFile:
        path, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
        if not isinstance(path, str) or type(size) is not int:
            raise unavailable(self._base, "lists files in a form that is not known")
        place = f"{self._base}?{urlencode({'Revision': self._revision, 'FilePath': path})}"
        return RemoteFile(path, size, place, sha256=sha256 if isinstance(sha256, str) else "")
