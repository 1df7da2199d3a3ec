"""Pulling from the other places: a web server, an object store, ModelScope, an OCI registry."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import SecretStr

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed
from helios.registry.manifest import MEDIA_CONFIG, MEDIA_WEIGHT, Digest, Entry, Manifest
from helios.registry.sources.settings import (
    DownloadSettings,
    ModelScopeSettings,
    OciSettings,
    SourceSettings,
    StoreSettings,
)
from tests.emulators.buckets import make_bucket, s3_client
from tests.emulators.docker_registry import BINARY, docker_registry, pusher
from tests.emulators.faulty_proxy import FaultyProxy, expired_token, reset_body, status
from tests.emulators.hugging_face import content_response
from tests.emulators.servers import Emulator
from tests.registry import tiny
from tests.registry.support import Parts, open_parts

FILLER = 300_000


@dataclass
class Server:
    """A web server with files below ``/files``; everything else is its tests' own."""

    files: dict[str, bytes]
    is_ranged: bool = True
    login: str = ""
    address: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)

    async def file(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.match_info["path"]))
        if self.login and request.headers.get("Authorization") != self.login:
            return web.Response(status=401)
        content = self.files.get(request.match_info["path"])
        if content is None:
            return web.Response(status=404)
        if not self.is_ranged:
            return web.Response(body=content)
        return content_response(request, content, hashlib.md5(content).hexdigest(), {})

    async def scope_list(self, request: web.Request) -> web.Response:
        """ModelScope's list."""
        if request.query["Revision"] != "master":
            return web.json_response(
                {"Code": 10010205001, "Message": "revision not exist", "Success": False}, status=404
            )
        if self.login and request.headers.get("Authorization") != self.login:
            return web.json_response({"Code": 10010205002, "Message": "no", "Success": False}, status=403)
        entries = [
            {"Path": path, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for path, content in self.files.items()
        ]
        data = {"Files": [{"Path": "onnx", "Type": "tree", "Size": 0}, *entries]}
        return web.json_response({"Code": 200, "Success": True, "Data": data})

    async def scope_file(self, request: web.Request) -> web.StreamResponse:
        """ModelScope's files."""
        self.requests.append((request.method, request.query["FilePath"]))
        content = self.files[request.query["FilePath"]]
        return content_response(request, content, hashlib.md5(content).hexdigest(), {})


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    application = web.Application()
    application.router.add_get("/files/{path:.+}", server.file)
    application.router.add_get("/api/v1/models/org/m/repo/files", server.scope_list)
    application.router.add_get("/api/v1/models/org/m/repo", server.scope_file)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        server.address = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A model in two shards, and something that is not of it."""
    directory = tiny.write_sharded(tmp_path / "model")
    return {path.name: path.read_bytes() for path in directory.iterdir()} | {"notes.bin": b"n"}


@asynccontextmanager
async def registry(root: Path, **more: object) -> AsyncIterator[Parts]:
    # Few at a time: tests count what came before something broke.
    downloads = DownloadSettings(chunk_bytes=64 << 10, in_flight=8)
    settings = SourceSettings(downloads=downloads, **more)  # type: ignore[arg-type]
    async with open_parts(root, source_settings=settings) as parts:
        yield parts


async def stored(parts: Parts, digest: str) -> dict[str, bytes]:
    """What the registry has of a revision."""
    manifest, _ = await parts.store.get_manifest(digest)
    found = {}
    for entry in manifest.entries:
        hash_ = entry.digest.hash
        found[entry.path] = (parts.state.blobs / "sha256" / hash_[:2] / hash_).read_bytes()
    return found


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items()).encode()


@pytest.mark.parametrize("is_ranged", [True, False])
async def test_a_web_directory_is_found_by_the_names_of_its_files(
    tmp_path: Path, files: dict[str, bytes], is_ranged: bool
) -> None:
    async with serving(Server(files, is_ranged)) as server, registry(tmp_path / "registry") as parts:
        done = await parts.ingest("m", f"{server.address}/files/")
        del files["notes.bin"]
        assert await stored(parts, done.model.revision.digest) == files
        assert done.model.revision.source == f"{server.address}/files"
        server.requests.clear()
        again = await parts.ingest("n", f"{server.address}/files")
        assert again.model.revision.digest == done.model.revision.digest
        # What has a validator is known again; without one, weights are looked at anew.
        assert any(method == "GET" and "0000" in path for method, path in server.requests) is not is_ranged


async def test_sums_tell_what_is_there_and_that_it_is_known(tmp_path: Path, files: dict[str, bytes]) -> None:
    async with serving(Server(files | {"SHA256SUMS": sums(files)})) as server, registry(tmp_path / "r") as parts:
        directory = await parts.ingest("local", tmp_path / "model")
        done = await parts.ingest("m", f"{server.address}/files")
        assert done.new_bytes == 0
        assert done.model.revision.digest == directory.model.revision.digest
        server.files["SHA256SUMS"] = sums(files | {"config.json": b"{}"})
        with pytest.raises(HeliosError) as caught:
            await parts.ingest("m", f"{server.address}/files")
        assert caught.value.reason == "DIGEST_MISMATCH"


async def test_a_web_directory_without_a_model_or_with_a_login_is_refused_in_words(tmp_path: Path) -> None:
    async with serving(Server({})) as server, registry(tmp_path / "registry") as parts:
        with pytest.raises(NotFound, match="neither SHA256SUMS nor") as missing:
            await parts.ingest("m", f"{server.address}/files")
        assert missing.value.reason == "SOURCE_NOT_FOUND"
        server.login = "Basic x"
        with pytest.raises(PermissionDenied, match="wants a login"):
            await parts.ingest("m", f"{server.address}/files")


async def test_modelscope_is_a_hub(tmp_path: Path, files: dict[str, bytes]) -> None:
    async with serving(Server(dict(files))) as server:
        hub = ModelScopeSettings(endpoint=server.address)
        async with registry(tmp_path / "registry", modelscope=hub) as parts:
            done = await parts.ingest("m", "ms:org/m")
            assert done.model.revision.source == "ms:org/m@master"
            del files["notes.bin"]
            assert await stored(parts, done.model.revision.digest) == files
            server.requests.clear()
            assert (await parts.ingest("n", "ms:org/m")).new_bytes == 0
            assert server.requests == []
            with pytest.raises(NotFound):
                await parts.ingest("m", "ms:org/m@v9")
            server.login = "Bearer secret"
            with pytest.raises(PreconditionFailed, match="SOURCES__MODELSCOPE__TOKEN"):
                await parts.ingest("m", "ms:org/m")
        hub = ModelScopeSettings(endpoint=server.address, token=SecretStr("secret"))
        async with registry(tmp_path / "other", modelscope=hub) as parts:
            assert (await parts.ingest("m", "ms:org/m")).new_bytes > 0


@dataclass
class OciServer:
    """As much of an OCI registry as a pull asks for, with the token flow where it has a password."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    password: str = ""
    address: str = ""
    fetched: list[str] = field(default_factory=list)

    def push(self, tag: str, files: dict[str, bytes]) -> str:
        """Stores a model; returns its digest."""
        entries = []
        for path, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            self.blobs[f"sha256:{sha256}"] = content
            kind = MEDIA_WEIGHT if path.endswith(".safetensors") else MEDIA_CONFIG
            entries.append(Entry(path, Digest(sha256, len(content)), kind))
        manifest = Manifest.of(entries)
        self.manifests[tag] = self.manifests[manifest.digest()] = manifest.canonical_json()
        return manifest.digest()

    async def manifest(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        found = self.manifests.get(request.match_info["wanted"])
        if found is None:
            return web.Response(status=404)
        return web.Response(body=found, content_type="application/vnd.oci.image.manifest.v1+json")

    async def blob(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        self.fetched.append(request.match_info["digest"])
        return content_response(request, self.blobs[request.match_info["digest"]], "x", {})

    async def token(self, request: web.Request) -> web.Response:
        if request.query["scope"] != "repository:org/m:pull" or request.headers.get("Authorization") != self.password:
            return web.Response(status=401)
        return web.json_response({"token": "granted", "expires_in": 1})

    def _refusal(self, request: web.Request) -> web.Response | None:
        if not self.password or request.headers.get("Authorization") == "Bearer granted":
            return None
        challenge = f'Bearer realm="http://{self.address}/token",service="registry"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})


@asynccontextmanager
async def oci_registry() -> AsyncIterator[OciServer]:
    server = OciServer()
    application = web.Application()
    application.router.add_get("/v2/org/m/manifests/{wanted}", server.manifest)
    application.router.add_get("/v2/org/m/blobs/{digest}", server.blob)
    application.router.add_get("/token", server.token)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.address = "{}:{}".format(*runner.addresses[0][:2])
        yield server
    finally:
        await runner.cleanup()


async def test_a_model_has_the_digest_that_its_manifest_has_in_an_oci_registry(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    del files["notes.bin"]
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        digest = server.push("v1", files)
        done = await parts.ingest("m", f"oci://{server.address}/org/m:v1")
        assert done.model.revision.digest == digest
        assert done.model.revision.source == f"oci://{server.address}/org/m@{digest}"
        assert await stored(parts, digest) == files
        server.fetched.clear()
        assert (await parts.ingest("n", f"oci://{server.address}/org/m@{digest}")).new_bytes == 0
        assert server.fetched == []
        with pytest.raises(NotFound, match="check repository and tag"):
            await parts.ingest("m", f"oci://{server.address}/org/m:v2")
        server.manifests["image"] = json.dumps({"layers": [], "config": {"mediaType": "x"}}).encode()
        with pytest.raises(InvalidRequest, match="not a model"):
            await parts.ingest("m", f"oci://{server.address}/org/m:image")


@pytest.mark.slow
async def test_a_real_registrys_models_are_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert BINARY.exists(), "make debian unpacks it"
    del files["notes.bin"]
    model = OciServer()
    digest = model.push("v1", files)
    with docker_registry() as address:
        async with pusher(address, "org/m") as push, registry(tmp_path / "registry") as parts:
            assert await push.push("v1", files, model.manifests["v1"]) == digest
            done = await parts.ingest("m", f"oci://{address}/org/m:v1")
            assert done.model.revision.digest == digest
            assert await stored(parts, digest) == files
            with pytest.raises(NotFound):
                await parts.ingest("m", f"oci://{address}/org/none:v1")


async def test_an_oci_registrys_tokens_are_got(tmp_path: Path, files: dict[str, bytes]) -> None:
    del files["notes.bin"]
    async with oci_registry() as server:
        server.push("v1", files)
        # That is user, pw.
        server.password = "Basic dXNlcjpwdw=="
        async with registry(tmp_path / "anybody") as parts:
            with pytest.raises(PreconditionFailed, match="OCI__CREDENTIALS"):
                await parts.ingest("m", f"oci://{server.address}/org/m:v1")
        for password, is_right in (("pw", True), ("wrong", False)):
            oci = OciSettings(credentials={server.address: SecretStr(f"user:{password}")})
            async with registry(tmp_path / password, oci=oci) as parts:
                if is_right:
                    done = await parts.ingest("m", f"oci://{server.address}/org/m:v1")
                    assert await stored(parts, done.model.revision.digest) == files
                else:
                    with pytest.raises(PermissionDenied):
                        await parts.ingest("m", f"oci://{server.address}/org/m:v1")


async def test_a_prefix_of_an_object_store_is_a_model(
    tmp_path: Path, files: dict[str, bytes], seaweedfs_server: Emulator
) -> None:
    bucket = make_bucket(seaweedfs_server)
    with closing(s3_client(seaweedfs_server)) as client:
        for path, content in files.items():
            client.put_object(Bucket=bucket, Key=f"models/mine/{path}", Body=content)
        client.put_object(Bucket=bucket, Key="models/other/config.json", Body=b"{}")
        with FaultyProxy(seaweedfs_server.address) as proxy:
            options = {
                name: SecretStr(value) for name, value in seaweedfs_server.through(proxy.address).options.items()
            }
            stores = StoreSettings(s3=options)
            async with registry(tmp_path / "registry", stores=stores) as parts:
                proxy.inject(status(503, times=2), status(500, part="safetensors", times=2))
                proxy.inject(reset_body(after_bytes=100, part="safetensors"))
                done = await parts.ingest("m", f"s3://{bucket}/models/mine")
                assert proxy.broken_count == 5
                del files["notes.bin"]
                assert await stored(parts, done.model.revision.digest) == files
                # Known again by its ETags, until an object is written anew.
                proxy.requests.clear()
                assert (await parts.ingest("n", f"s3://{bucket}/models/mine/")).new_bytes == 0
                assert not any("safetensors" in target for _, target in proxy.requests)
                changed = json.dumps(json.loads(files["config.json"]) | {"note": 1}).encode()
                client.put_object(Bucket=bucket, Key="models/mine/config.json", Body=changed)
                assert (await parts.ingest("n", f"s3://{bucket}/models/mine")).new_bytes == len(changed)
                proxy.inject(expired_token(times=10))
                with pytest.raises(PermissionDenied, match="SOURCES__STORES__S3"):
                    await parts.ingest("m", f"s3://{bucket}/models/mine")
                proxy.heal()
                with pytest.raises(NotFound, match="check bucket and prefix"):
                    await parts.ingest("m", f"s3://{bucket}/models/none")
