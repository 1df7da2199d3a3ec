"""Every place that models come from, behind a network that breaks: what comes is right, or nothing does.

Hugging Face's hub has tests of its own (``test_pull``), with faults that only it knows. ``FaultyProxy`` stands before
each server, and most of those are real ones.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import obstore
import pytest
from _pytest.mark import ParameterSet
from pydantic import SecretStr

from helios.mesh.errors import Conflict, DigestMismatch, HeliosError, NotFound
from helios.mesh.transfer.objects import open_object_store
from helios.registry.sources.settings import ModelScopeSettings, StoreSettings
from tests.emulators import faulty_proxy as faults
from tests.emulators.docker_registry import docker_registry, pusher
from tests.emulators.faulty_proxy import Fault, FaultyProxy, Reply
from tests.emulators.google import google
from tests.emulators.servers import Emulator
from tests.registry.test_pull import model_files
from tests.registry.test_pull_places import OciServer, Server, registry, serving, stored

# Asked for here, so that no test takes a server of the whole run for what it left behind.
pytestmark = pytest.mark.usefixtures("seaweedfs_bucket", "azurite_bucket")
KINDS = ("http", "ms", "s3", "gs", "az", "oci")
STORES = ("s3", "gs", "az")
# Those whose files have no name but an ETag.
NAMELESS = ("http", *STORES)


def long_form(kind: str) -> ParameterSet:
    """A kind that is read by the same code as another one: the usual run leaves it out."""
    return pytest.param(kind, marks=pytest.mark.soak)


@dataclass
class Place:
    """A model somewhere, and the network on the way there."""

    source: str
    proxy: FaultyProxy
    write: Callable[[str, bytes], None]
    settings: dict[str, object] = field(default_factory=dict)


def secrets(options: Mapping[str, str]) -> dict[str, SecretStr]:
    return {name: SecretStr(value) for name, value in options.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A model of some forty chunks, without what is not taken."""
    found = model_files(tmp_path / "model")
    return {path: found[path] for path in ("config.json", "model.safetensors", "tokenizer.json")}


@asynccontextmanager
async def open_place(kind: str, files: dict[str, bytes], request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        if kind in {"http", "ms"}:
            server = await stack.enter_async_context(serving(Server(dict(files))))
            proxy = stack.enter_context(FaultyProxy(server.address.removeprefix("http://")))
            if kind == "http":
                yield Place(f"http://{proxy.address}/files", proxy, server.files.__setitem__)
            else:
                hub = ModelScopeSettings(endpoint=f"http://{proxy.address}")
                yield Place("ms:org/m", proxy, server.files.__setitem__, {"modelscope": hub})
        elif kind == "oci":
            address = stack.enter_context(docker_registry())
            model = OciServer()
            digest = model.push("v1", files)
            pusher_ = await stack.enter_async_context(pusher(address, "org/m"))
            assert await pusher_.push("v1", files, model.manifests["v1"]) == digest
            proxy = stack.enter_context(FaultyProxy(address))
            yield Place(f"oci://{proxy.address}/org/m:v1", proxy, model.blobs.__setitem__)
        else:
            name = "azurite" if kind == "az" else "seaweedfs"
            emulator: Emulator = request.getfixturevalue(f"{name}_server")
            bucket: str = request.getfixturevalue(f"{name}_bucket")
            prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
            # A way of its own, which keeps no connection open, as the other one does not.
            aside = stack.enter_context(FaultyProxy(emulator.address))
            write = writer(emulator.through(aside.address), f"{emulator.scheme}://{bucket}/{prefix}")
            for path, content in files.items():
                write(path, content)
            if kind == "gs":
                google_proxy = proxy = stack.enter_context(google(emulator))
                stores = StoreSettings(gs=secrets(google_proxy.emulator.options))
            else:
                proxy = stack.enter_context(FaultyProxy(emulator.address))
                stores = StoreSettings(**{kind: secrets(emulator.through(proxy.address).options)})
            yield Place(f"{kind}://{bucket}/{prefix}", proxy, write, {"stores": stores})


def writer(emulator: Emulator, url: str) -> Callable[[str, bytes], None]:
    options = {name: value for name, value in emulator.options.items() if not name.endswith("allow_http")}
    store = open_object_store(url, options=options, client={"allow_http": True})

    def write(path: str, content: bytes) -> None:
        for _ in range(10):
            # A connection that the proxy was about to close may be taken once more.
            with suppress(obstore.exceptions.GenericError):
                obstore.put(store, path, content)
                return
        raise AssertionError(f"{path} could not be written")

    return write


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bad_network_changes_nothing(
    tmp_path: Path, files: dict[str, bytes], kind: str, request: pytest.FixtureRequest
) -> None:
    broken = [
        faults.status(500, times=1),
        faults.status(503, times=1),
        faults.status(429, retry_after=1, times=1),
        faults.reset_request(times=1),
        faults.reset_body(after_bytes=100, times=2),
        faults.slow_drip(bytes_per_second=200_000, times=2),
    ]
    async with open_place(kind, files, request) as place, registry(tmp_path / "r", **place.settings) as parts:
        # After the first requests, so that metadata and bytes are both hit.
        for number, fault in enumerate(broken):
            fault.after = 2 * number
        place.proxy.inject(*broken)
        done = await parts.ingest("m", place.source)
        assert place.proxy.broken_count >= 5
        assert await stored(parts, done.model.revision.digest) == files


@pytest.mark.parametrize("kind", [long_form(kind) if kind in {"ms", "gs", "az"} else kind for kind in KINDS])
async def test_a_place_that_is_broken_is_said_to_be_and_what_came_is_kept(
    tmp_path: Path, files: dict[str, bytes], kind: str, request: pytest.FixtureRequest
) -> None:
    async with open_place(kind, files, request) as place, registry(tmp_path / "r", **place.settings) as parts:
        # Object stores' clients hide how long a store wants to be left alone; credentials that end are known at once.
        is_store = kind in STORES
        broken = faults.expired_token() if is_store else faults.status(503, retry_after=1000)
        place.proxy.inject(replace(broken, method="GET", times=10_000, after=30))
        with pytest.raises(HeliosError) as caught:
            await parts.ingest("m", place.source)
        assert caught.value.reason == ("SOURCE_ACCESS_DENIED" if is_store else "SOURCE_UNAVAILABLE")
        assert parts.files() == set()
        place.proxy.heal()
        place.proxy.requests.clear()
        done = await parts.ingest("m", place.source)
        assert await stored(parts, done.model.revision.digest) == files
        # Some forty chunks, of which some twenty came before.
        assert sum(method == "GET" for method, _ in place.proxy.requests) < 35


@pytest.mark.parametrize("kind", [long_form(kind) if kind in {"ms", "gs", "oci"} else kind for kind in KINDS])
async def test_a_wrong_etag_begins_a_file_anew(
    tmp_path: Path, files: dict[str, bytes], kind: str, request: pytest.FixtureRequest
) -> None:
    async with open_place(kind, files, request) as place, registry(tmp_path / "r", **place.settings) as parts:
        place.proxy.inject(replace(faults.wrong_etag(method="GET"), after=20))
        done = await parts.ingest("m", place.source)
        assert place.proxy.broken_count == 1
        assert await stored(parts, done.model.revision.digest) == files


@pytest.mark.parametrize("kind", NAMELESS)
async def test_what_changes_meanwhile_is_not_mixed(
    tmp_path: Path, files: dict[str, bytes], kind: str, request: pytest.FixtureRequest
) -> None:
    old = files["model.safetensors"]
    new = old[: len(old) // 2] + bytes(byte ^ 1 for byte in old[len(old) // 2 :])
    async with open_place(kind, files, request) as place, registry(tmp_path / "r", **place.settings) as parts:

        def change(reply: Reply) -> Reply:
            place.write("model.safetensors", new)
            return reply

        drip = faults.slow_drip(bytes_per_second=400_000, part="model.safetensors", times=10_000)
        place.proxy.inject(Fault("GET", after=10, change=change), drip)
        # Beside a config of the old state the new weights would be a model that never was.
        done = None
        with suppress(Conflict):
            done = await parts.ingest("m", place.source)
        if done is None:
            assert parts.files() == set()
        else:
            # All was asked for before the change was there.
            assert (await stored(parts, done.model.revision.digest))["model.safetensors"] == old
        place.proxy.heal()
        for content in (new, old, new):
            place.write("model.safetensors", content)
            done = await parts.ingest("m", place.source)
            assert (await stored(parts, done.model.revision.digest))["model.safetensors"] == content


@pytest.mark.parametrize("kind", KINDS)
async def test_a_gguf_file_is_found_among_others_or_by_itself(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    content = b"GGUF\x03\0\0\0" + bytes(range(256)) * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    files = {"a-Q8_0.gguf": content, "README.md": b"# m"}
    async with open_place(kind, files, request) as place, registry(tmp_path / "r", **place.settings) as parts:
        sources = [place.source] if kind != "http" else []
        if kind in NAMELESS:
            sources.append(f"{place.source}/a-Q8_0.gguf")
        for source in sources:
            # That is all of the way but its conversion, which takes long.
            with pytest.raises(DigestMismatch, match=sha256):
                await parts.ingest("m", source, expected_sha256="0" * 64)
        if kind in NAMELESS:
            with pytest.raises(NotFound, match=r"none\.gguf"):
                await parts.ingest("m", f"{place.source}/none.gguf")
