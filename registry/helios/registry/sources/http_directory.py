"""A directory of a web server.

Web servers have no common way to list a directory, and reading the pages that some make for people would be guessing.
So ``SHA256SUMS`` is read where there is one (``sha256sum * > SHA256SUMS`` makes it): it names the files, and is their
identity. Without it the names that files of a model have are asked for one by one, and of weights those that the index
names.
"""

import asyncio
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, unquote

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.source import RangeSource
from helios.registry.inspection import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, SINGLE
from helios.registry.profile import read_weight_map
from helios.registry.sources.directory import CONFIG_NAMES
from helios.registry.sources.pinned import PinnedSource, check_state
from helios.registry.sources.reference import UrlReference
from helios.registry.sources.remote import Listing, RemoteFile, changed
from helios.registry.sources.web import Refused, Web, unavailable
from helios.registry.strict_json import malformed, parse_object

SUMS: Final = "SHA256SUMS"
_SUM: Final = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
# Names with a wildcard can't be asked for.
_ASKED_FOR: Final = (
    *(name for name in CONFIG_NAMES if "*" not in name),
    SINGLE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "README.md",
)  # fmt: skip
_MAX_SUMS_BYTES: Final = 4 << 20
_MAX_INDEX_BYTES: Final = 128 << 20
_PARALLEL: Final = 8


class HttpDirectory:
    """A directory below a URL, or one file of it; ``remote.Repository``."""

    def __init__(self, reference: UrlReference, web: Web) -> None:
        self._url = reference.directory
        self._origin = reference.url
        self._only = unquote(reference.file)
        self._web = web

    async def list_files(self) -> Listing:
        """Returns the files that SHA256SUMS names, or those that are found by name."""
        try:
            sums = (await self._web.request("GET", self._place(SUMS), limit_bytes=_MAX_SUMS_BYTES)).body
        except Refused as error:
            if error.status not in {403, 404, 410}:
                raise self.explain(error.status, error.message) from error
            named = {} if self._only else dict.fromkeys(_ASKED_FOR, "")
        else:
            named = parse_sums(sums)
        if self._only:
            named = {self._only: named.get(self._only, "")}
        found = await self._ask(named)
        if INDEX in found and SINGLE not in found and len(found) and not any(named.values()):
            found |= await self._ask(dict.fromkeys(await self._shards(found[INDEX]), ""))
        if not found:
            raise self.explain(404, "")
        return Listing(self._origin, tuple(found[name] for name in sorted(found)))

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns bytes of a file."""
        try:
            is_whole = length == file.size_bytes
            content = await self._web.read(
                file.place, offset=offset, length=length, is_whole=is_whole, check=lambda etag: check_state(file, etag)
            )
        except Refused as error:
            raise self.explain(error.status, error.message) from error
        if len(content) != length:
            raise changed(file.path)
        return content

    def open(self, file: RemoteFile) -> RangeSource:
        """Returns a file for reading by ranges."""
        return PinnedSource(HttpSource(file.place), file)

    def explain(self, status: int, detail: str) -> HeliosError:
        """Returns the error of a refusal."""
        metadata = {"param": "source", "status": str(status)}
        if status in {404, 410}:
            return NotFound(
                f"there is no {self._origin}"
                if self._only
                else f"there is no model below {self._url}/: it has neither {SUMS} nor config.json",
                reason="SOURCE_NOT_FOUND",
                metadata=metadata,
            )
        if status in {401, 403}:
            return PermissionDenied(
                f"{self._url}/ wants a login, which is not supported for web servers: use an object store, a hub, or"
                " copy the directory to the registry's machine",
                reason="SOURCE_ACCESS_DENIED",
                metadata=metadata,
            )
        said = f": {detail}" if detail else ""
        return InvalidRequest(f"{self._url}/ answered {status}{said}", reason="INVALID_SOURCE", metadata=metadata)

    async def _ask(self, named: dict[str, str]) -> dict[str, RemoteFile]:
        """Asks for the size of each file; those that are not there are left out unless SHA256SUMS has them."""
        free = asyncio.Semaphore(_PARALLEL)

        async def one(name: str, sha256: str) -> RemoteFile | None:
            async with free:
                return await self._head(name, sha256)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*entry), name=f"ask for {entry[0]}") for entry in named.items()]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return {file.path: file for task in tasks if (file := task.result()) is not None}

    async def _head(self, name: str, sha256: str) -> RemoteFile | None:
        url = self._place(name)
        try:
            answer = await self._web.request("HEAD", url)
        except Refused as error:
            if sha256:
                raise malformed(f"{SUMS} names {name[:100]}, which {self._url}/ does not have") from error
            # Servers that hide what is not there answer 403.
            if error.status in {403, 404, 410}:
                return None
            raise self.explain(error.status, error.message) from error
        length = answer.headers.get("content-length", "")
        if not length.isdecimal():
            raise unavailable(url, "does not say how long the file is")
        etag = answer.headers.get("etag", "")
        if sha256:
            return RemoteFile(name, int(length), url, sha256=sha256)
        if etag.startswith("W/"):
            return RemoteFile(name, int(length), url)
        return RemoteFile(name, int(length), url, etag=etag, state=etag)

    async def _shards(self, index: RemoteFile) -> Iterable[str]:
        if index.size_bytes > _MAX_INDEX_BYTES:
            raise malformed(f"{INDEX} is larger than {_MAX_INDEX_BYTES >> 20} MiB")
        content = await self.read(index, 0, index.size_bytes)
        return sorted(set(read_weight_map(parse_object(content, INDEX)).values()))

    def _place(self, name: str) -> str:
        return f"{self._url}/{quote(name)}"


def parse_sums(content: bytes) -> dict[str, str]:
    """Returns path and sha256 of each line that ``sha256sum`` wrote. Raises InvalidRequest (UNSUPPORTED_FORMAT)."""
    found: dict[str, str] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _SUM.fullmatch(line)
        if match is None:
            raise malformed(f"{SUMS} holds {line[:100]!r}, which is no line of sha256sum")
        if match[2] != SUMS:
            found[match[2]] = match[1].lower()
    if not found:
        raise malformed(f"{SUMS} names no file")
    return found
