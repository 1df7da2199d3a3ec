"""A Hugging Face hub on loopback: repositories with commits, access rules, a tree, and large files behind signed URLs.

What it must be like is told by huggingface_hub's own client, which downloads from it in a test of its own. Nothing in
it goes wrong by itself: put ``FaultyProxy`` before it for that. It makes URLs of the ``Host`` it is asked by, so
redirects lead through the proxy too.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

# What git-lfs tracks in the hub's own .gitattributes, as far as tests need it.
_LARGE: Final = (".safetensors", ".gguf", ".bin", ".msgpack")
BAD_TOKEN: Final = "Invalid credentials in Authorization header"


@dataclass
class Repository:
    """One repository: commits, newest last. ``tokens`` see it where it is private, and read it where it is gated."""

    commits: list[tuple[str, Mapping[str, bytes]]] = field(default_factory=list)
    is_private: bool = False
    is_gated: bool = False
    tokens: frozenset[str] = frozenset()

    def push(self, files: Mapping[str, bytes]) -> str:
        """Makes a commit on the branch ``main``; returns its name."""
        names = [[path, git_sha1(content)] for path, content in sorted(files.items())]
        parent = self.commits[-1][0] if self.commits else ""
        commit = hashlib.sha1(json.dumps([parent, names]).encode()).hexdigest()
        self.commits.append((commit, dict(files)))
        return commit

    def find(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        """Returns a commit by its name, or the branch's last one."""
        if revision == "main":
            return self.commits[-1]
        return next((each for each in self.commits if each[0] == revision), None)


@dataclass
class HuggingFace:
    """The hub. Its attributes may be changed while it runs.

    Attributes:
        address: ``host:port``.
        tokens: Tokens that are good.
        lies: sha256 that the tree names instead of the true one: path to hash.
        page_size: Entries of a page of the tree.
        requests: What was asked for: method, path, and the Range header.
        leaked: Tokens that came to the content network, which must never happen.
        content_network: Base URL of another server that has large files by their sha256; empty: the hub's own.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    lies: dict[str, str] = field(default_factory=dict)
    page_size: int = 1000
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    content_network: str = ""
    _generation: int = 0
    _hashes: dict[int, tuple[bytes, str]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Base URL."""
        return f"http://{self.address}"

    def repository(self, name: str, files: Mapping[str, bytes], **more: object) -> Repository:
        """Makes a repository with one commit."""
        made = self.repositories[name] = Repository(**more)  # type: ignore[arg-type]
        made.push(files)
        return made

    def expire_urls(self) -> None:
        """Ends the life of every signed URL that was handed out."""
        self._generation += 1

    def bytes_requests(self) -> list[tuple[str, str, str]]:
        """Returns the GETs of the content network."""
        return [each for each in self.requests if each[0] == "GET" and each[1].startswith("/cdn/")]

    async def about(self, request: web.Request) -> web.Response:
        """``/api/models/{name}[/revision/{revision}]``."""
        found = self._find(request, is_reading=False)
        if isinstance(found, web.Response):
            return found
        repository, commit, files = found
        siblings = [{"rfilename": path} for path in sorted(files)]
        gated = "manual" if repository.is_gated else False
        name = request.match_info["name"]
        return web.json_response(
            {"id": name, "modelId": name, "sha": commit, "private": repository.is_private, "gated": gated,
             "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        )  # fmt: skip

    async def tree(self, request: web.Request) -> web.Response:
        """``/api/models/{name}/tree/{revision}``, in pages."""
        found = self._find(request, is_reading=False)
        if isinstance(found, web.Response):
            return found
        _, _, files = found
        start = int(request.query.get("cursor", "0"))
        paths = sorted(files)[start:]
        page = [self._entry(path, files[path]) for path in paths[: self.page_size]]
        headers = {}
        if len(paths) > self.page_size:
            url = request.url.update_query(cursor=str(start + self.page_size))
            headers["Link"] = f'<{url}>; rel="next"'
        return web.json_response(page, headers=headers)

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        """``/{name}/resolve/{revision}/{path}``: the bytes, or where they are."""
        found = self._find(request, is_reading=True)
        if isinstance(found, web.Response):
            return found
        _, commit, files = found
        path = request.match_info["path"]
        if path not in files:
            return _refusal(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(_LARGE):
            return content_response(request, content, git_sha1(content), headers)
        sha256 = self._sha256(content)
        # Another host, as the hub's own content network is: its client takes one of the same origin for the hub.
        host = f"localhost:{request.host.rpartition(':')[2]}"
        query = f"name={request.match_info['name']}&path={path}&commit={commit}&generation={self._generation}"
        location = f"{self.content_network or f'http://{host}/cdn'}/{sha256}?{query}"
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "Location": location}
        return web.Response(status=302, headers=headers)

    async def cdn(self, request: web.Request) -> web.StreamResponse:
        """A signed URL: no login, for a while."""
        if "Authorization" in request.headers:
            self.leaked.append(request.headers["Authorization"])
            return web.Response(status=400, text="Only one auth mechanism allowed")
        if request.query["generation"] != str(self._generation):
            return web.Response(status=403, text="Request has expired")
        found = self.repositories[request.query["name"]].find(request.query["commit"])
        assert found is not None
        content = found[1][request.query["path"]]
        return content_response(request, content, hashlib.md5(content).hexdigest(), {})

    def _find(
        self, request: web.Request, *, is_reading: bool
    ) -> tuple[Repository, str, Mapping[str, bytes]] | web.Response:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            return _refusal(401, "", BAD_TOKEN)
        repository = self.repositories.get(request.match_info["name"])
        is_seen = repository is not None and (not repository.is_private or token in repository.tokens)
        if repository is None or not is_seen:
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if is_reading and repository.is_gated and token not in repository.tokens:
            return _refusal(403 if token else 401, "GatedRepo", "Access to model is restricted")
        found = repository.find(request.match_info.get("revision", "main"))
        if found is None:
            return _refusal(404, "RevisionNotFound", "Invalid rev id")
        return repository, *found

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
        if not path.endswith(_LARGE):
            entry["oid"] = git_sha1(content)
        else:
            sha256 = self.lies.get(path) or self._sha256(content)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
            entry["oid"] = git_sha1(pointer)
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
        return entry

    def _sha256(self, content: bytes) -> str:
        """A hub knows it from the push; here it is computed once."""
        if id(content) not in self._hashes:
            self._hashes[id(content)] = content, hashlib.sha256(content).hexdigest()
        return self._hashes[id(content)][1]


@asynccontextmanager
async def hugging_face() -> AsyncIterator[HuggingFace]:
    """Runs a hub without repositories."""
    hub = HuggingFace()

    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        hub.requests.append((request.method, request.path, request.headers.get("Range", "")))
        return await handler(request)

    application = web.Application(middlewares=[note])
    name = r"{name:[^/]+/[^/]+}"
    application.router.add_get(f"/api/models/{name}/revision/{{revision:.+}}", hub.about)
    application.router.add_get(f"/api/models/{name}/tree/{{revision:.+}}", hub.tree)
    application.router.add_get(f"/api/models/{name}", hub.about)
    application.router.add_get("/cdn/{sha256}", hub.cdn)
    application.router.add_get(f"/{name}/resolve/{{revision:[^/]+}}/{{path:.+}}", hub.resolve)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        hub.address = f"{host}:{port}"
        yield hub
    finally:
        await runner.cleanup()


def git_sha1(content: bytes) -> str:
    """Returns git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refusal(status: int, code: str, message: str) -> web.Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return web.json_response({"error": message}, status=status, headers=headers)


def content_response(request: web.Request, content: bytes, etag: str, headers: dict[str, str]) -> web.Response:
    """Answers with a file, or the range of it that is asked for."""
    headers = headers | {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
    part = request.http_range
    if part.start is None and part.stop is None:
        return web.Response(body=content, headers=headers)
    start, stop, _ = part.indices(len(content))
    if start >= len(content):
        return web.Response(status=416, headers=headers | {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return web.Response(status=206, body=content[start:stop], headers=headers)
