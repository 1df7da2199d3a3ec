"""Models whose layers are archives, in an OCI registry: the same revision as unpacked, and nothing gets out of them."""

import gzip
import hashlib
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from helios.mesh.errors import DiskFull, HeliosError, InvalidRequest
from helios.registry import offload
from helios.registry.records import IngestSpec
from helios.registry.sources.unpack import Unpacker
from tests.emulators.docker_registry import BINARY, docker_registry, pusher
from tests.registry import tiny
from tests.registry.support import Parts
from tests.registry.test_pull_places import OciServer, oci_registry, registry, stored
from tests.registry.test_tar_stream import write

MIB = 1 << 20
PACKERS: dict[str, Callable[[bytes], bytes]] = {"tar": bytes, "tar+gzip": gzip.compress, "tar+zstd": zstd.compress}
_MODEL = "application/vnd.cncf.model"


def sha256_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def layer(path: str, content: bytes, packing: str) -> dict[str, Any]:
    kind = "weight" if path.endswith(".safetensors") else "weight.config"
    return {
        "mediaType": f"{_MODEL}.{kind}.v1.{packing}",
        "digest": sha256_of(content),
        "size": len(content),
        "annotations": {"org.cncf.model.filepath": path},
    }


def publish(server: OciServer, tag: str, layers: Iterable[tuple[str, bytes, str]]) -> None:
    """Puts layers (path, bytes, packing) behind a tag."""
    entries = []
    for path, content, packing in layers:
        server.blobs[sha256_of(content)] = content
        entries.append(layer(path, content, packing))
    config = {"mediaType": f"{_MODEL}.config.v1+json", "digest": sha256_of(b"{}"), "size": 2}
    manifest = {"schemaVersion": 2, "artifactType": f"{_MODEL}.manifest.v1+json", "config": config, "layers": entries}
    server.manifests[tag] = json.dumps(manifest).encode()


def tar(contents: dict[str, bytes], packing: str = "tar", format_: int = tarfile.PAX_FORMAT, **more: object) -> bytes:
    return PACKERS[packing](write(contents, format_, **more))


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model in two shards."""
    directory = tiny.write_sharded(tmp_path_factory.mktemp("model") / "model")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("packing", PACKERS)
async def test_what_is_packed_is_the_same_revision(tmp_path: Path, model: dict[str, bytes], packing: str) -> None:
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        raw = server.push("raw", model)
        # Each file its own archive, as modctl packs; one raw among them; and all of them in one.
        each = [(path, tar({path: content}, packing), packing) for path, content in model.items()]
        publish(server, "each", each)
        publish(server, "some", [each[0], *((path, content, "raw") for path, content in list(model.items())[1:])])
        publish(server, "one", [("model", tar({f"./{path}": data for path, data in model.items()}, packing), packing)])
        for tag in ("each", "some", "one"):
            server.fetched.clear()
            done = await parts.ingest(tag, f"oci://{server.address}/org/m:{tag}")
            assert done.model.revision.digest == raw, tag
            assert await stored(parts, raw) == model
            assert server.fetched
            server.fetched.clear()
            assert (await parts.ingest(f"{tag}-again", f"oci://{server.address}/org/m:{tag}")).new_bytes == 0
            assert server.fetched == [], "what became of these archives is known"


async def test_patterns_choose_among_what_is_in_an_archive(tmp_path: Path, model: dict[str, bytes]) -> None:
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        raw = server.push("raw", model)
        packed = tar(model | {"extra.safetensors": b"no weights", "../outside": b"refused"}, "tar+gzip")
        publish(server, "v1", [("model", packed, "tar+gzip")])
        with pytest.raises(InvalidRequest):
            await parts.ingest("m", f"oci://{server.address}/org/m:v1")
        packed = tar(model | {"extra.safetensors": b"no weights"}, "tar+gzip")
        publish(server, "v1", [("model", packed, "tar+gzip")])
        done = await parts.ingest("m", f"oci://{server.address}/org/m:v1", exclude=("extra.*",))
        assert done.model.revision.digest == raw


def _linked(path: str, target: str, kind: bytes) -> bytes:
    return write({path: b""}, tarfile.GNU_FORMAT, type=kind, linkname=target)


def _huge(path: str) -> bytes:
    header = tarfile.TarInfo(path)
    header.size = 1 << 60
    return header.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str, str]] = {
    "leads out": (lambda model: tar(model | {"../../../outside": b"x"}), "tar", "INVALID_MANIFEST"),
    "is absolute": (lambda model: tar(model | {"/etc/outside": b"x"}), "tar", "INVALID_MANIFEST"),
    "link": (lambda _: _linked("config.json", "/etc/passwd", tarfile.SYMTYPE), "tar", "UNSUPPORTED_FORMAT"),
    "hard link": (lambda _: _linked("config.json", "/etc/passwd", tarfile.LNKTYPE), "tar", "UNSUPPORTED_FORMAT"),
    "sparse": (lambda _: _linked("config.json", "", tarfile.GNUTYPE_SPARSE), "tar", "UNSUPPORTED_FORMAT"),
    "huge": (lambda _: _huge("model.safetensors"), "tar", "DISK_FULL"),
    "twice": (lambda model: tar(model)[:-10240] + tar(model), "tar", "UNSUPPORTED_FORMAT"),
    "clash": (lambda model: tar(model | {"config.json/x": b"x"}), "tar", "INVALID_MANIFEST"),
    "not what it says": (tar, "tar+zstd", "UNSUPPORTED_FORMAT"),
    "cut off": (lambda model: tar(model, "tar+gzip")[:-100], "tar+gzip", "UNSUPPORTED_FORMAT"),
    "cut off in zstd": (lambda model: tar(model, "tar+zstd")[:-100], "tar+zstd", "UNSUPPORTED_FORMAT"),
    "unknown packing": (tar, "tar+brotli", "UNSUPPORTED_FORMAT"),
}


@pytest.mark.parametrize(("make", "packing", "reason"), HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, model: dict[str, bytes], make: Callable[[dict[str, bytes]], bytes], packing: str, reason: str
) -> None:
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        publish(server, "v1", [("model", make(model), packing)])
        with pytest.raises(HeliosError) as refused:
            await parts.ingest("m", f"oci://{server.address}/org/m:v1")
        assert refused.value.reason == reason
        assert parts.files() == set()
    outside = [path for path in tmp_path.rglob("*") if "outside" in path.name]
    assert outside == []
    assert {path.name for path in tmp_path.iterdir()} <= {"registry"}


async def test_files_that_two_archives_have_are_refused(tmp_path: Path, model: dict[str, bytes]) -> None:
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        first, second = tar(model), tar({"config.json": b"{}"})
        publish(server, "v1", [("a", first, "tar"), ("b", second, "tar")])
        with pytest.raises(InvalidRequest, match="was there already"):
            await parts.ingest("m", f"oci://{server.address}/org/m:v1")
        publish(server, "v2", [("a", first, "tar"), ("config.json", b"{}", "raw")])
        with pytest.raises(InvalidRequest, match="stands twice"):
            await parts.ingest("m", f"oci://{server.address}/org/m:v2")


async def test_an_ingest_that_is_left_while_it_unpacks_leaves_nothing_half_done(
    tmp_path: Path, model: dict[str, bytes]
) -> None:
    async with oci_registry() as server, registry(tmp_path / "registry") as parts:
        publish(server, "v1", [("model", tar(model | {"big.bin": bytes(200 * MIB)}, "tar+zstd"), "tar+zstd")])
        events = parts.ingester.ingest(IngestSpec("m", f"oci://{server.address}/org/m:v1"))
        async for event in events:
            if getattr(event, "phase", None) == "convert":
                break
        await events.aclose()
        await _settled(parts)
        # A fast machine may have stored some by then: whole blobs, which the next ingest or the collector takes.
        digests = [hashlib.sha256(content).hexdigest() for content in model.values()]
        assert parts.files() <= {f"blobs/sha256/{digest[:2]}/{digest}" for digest in digests}
        assert list(parts.state.work.iterdir()) == []


async def _settled(parts: Parts) -> None:
    """Another ingest of the name begins once the one before has ended."""
    with pytest.raises(InvalidRequest):
        await parts.ingest("m", "oci://not-a-reference")


@pytest.mark.parametrize("packing", ["tar+gzip", "tar+zstd"])
def test_what_expands_a_thousandfold_takes_no_memory_and_is_held_to_the_disk(tmp_path: Path, packing: str) -> None:
    archive = tmp_path / "a"
    archive.write_bytes(tar({"w": bytes(96 * MIB)}, packing))
    asked: list[int] = []

    def require_space(needed_bytes: int) -> None:
        asked.append(needed_bytes)
        if needed_bytes > 90 * MIB and len(asked) == 1:
            raise DiskFull("no room")

    (tmp_path / "out").mkdir()
    unpacker = Unpacker(tmp_path / "out", lambda _: True, require_space, lambda _: None)
    with pytest.raises(DiskFull):
        unpacker.unpack(archive, packing, "m", offload.Stop())
    assert list((tmp_path / "out").iterdir()) == []
    tracemalloc.start()
    try:
        unpacker.unpack(archive, packing, "m", offload.Stop())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert asked == [96 * MIB, 96 * MIB]
    assert unpacker.files["w"].sha256 == hashlib.sha256(bytes(96 * MIB)).hexdigest()
    assert peak_bytes < 16 * MIB


def test_a_window_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 30,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    content = write({"w": bytes(MIB)}, tarfile.GNU_FORMAT)
    # In pieces, so that it does not know how little comes.
    archive = compressor.compress(content, mode=zstd.ZstdCompressor.FLUSH_BLOCK) + compressor.flush()
    (tmp_path / "a").write_bytes(archive)
    (tmp_path / "out").mkdir()
    unpacker = Unpacker(tmp_path / "out", lambda _: True, lambda _: None, lambda _: None)
    with pytest.raises(InvalidRequest, match="damaged, or packed otherwise"):
        unpacker.unpack(tmp_path / "a", "tar+zstd", "m", offload.Stop())


@pytest.mark.slow
async def test_a_real_registrys_archives_are_read(tmp_path: Path, model: dict[str, bytes]) -> None:
    assert BINARY.exists(), "make debian unpacks it"
    emulated = OciServer()
    raw = emulated.push("raw", model)
    packed = {path: tar({path: content}, "tar+gzip") for path, content in model.items()}
    publish(emulated, "v1", [(path, content, "tar+gzip") for path, content in packed.items()])
    with docker_registry() as address:
        async with pusher(address, "org/m") as push, registry(tmp_path / "registry") as parts:
            await push.push("v1", packed, emulated.manifests["v1"])
            done = await parts.ingest("m", f"oci://{address}/org/m:v1")
            assert done.model.revision.digest == raw
            assert await stored(parts, raw) == model
