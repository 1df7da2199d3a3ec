"""Pulling from a hub: only what is not here, only what is true, and on from where it stopped."""

import asyncio
import hashlib
import io
import json
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from helios.cli import models_add
from helios.cli.state import StateDirectory
from helios.mesh.channel import Dialer
from helios.mesh.errors import (
    AlreadyExists,
    DigestMismatch,
    DiskFull,
    HeliosError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from helios.registry.downloads import open_downloads
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import Mutation
from helios.registry.records import IngestPhase, IngestProgress, IngestSpec
from helios.registry.sources.settings import DownloadSettings, HuggingFaceSettings, SourceSettings
from tests.emulators import faulty_proxy as faults
from tests.emulators.faulty_proxy import FaultyProxy
from tests.emulators.hugging_face import HuggingFace, hugging_face
from tests.registry import tiny
from tests.registry.support import Mesh, Parts, done_of, open_parts, serve

CHUNK = 64 << 10
# Some forty chunks.
FILLER = 2_500_000
CARD = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"


def model_files(directory: Path) -> dict[str, bytes]:
    """A model as a hub has it: with what is taken and what is not."""
    tiny.write_big(directory, FILLER)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    # No holes: two chunks that are the same can't be told apart.
    weights = files["model.safetensors"]
    noise = bytearray(hashlib.shake_256(b"noise").digest(FILLER))
    files["model.safetensors"] = weights[:-FILLER] + bytes(noise)
    return files | {"README.md": CARD, ".gitattributes": b"*", "onnx/model.onnx": b"o", "pytorch_model.bin": b"p"}


def fetched_bytes(hub: HuggingFace) -> int:
    """Bytes that were asked of a hub's content network, by ranges."""
    total = 0
    for _, _, span in hub.bytes_requests():
        first, _, last = span.removeprefix("bytes=").partition("-")
        total += int(last) + 1 - int(first)
    return total


def blob_path(parts: Parts, hash_: str) -> Path:
    """Where a blob is, in a registry that keeps them in its directory."""
    return parts.state.blobs / "sha256" / hash_[:2] / hash_


@dataclass
class Place:
    """A registry and a hub, with a network between them that can be broken."""

    parts: Parts
    hub: HuggingFace
    proxy: FaultyProxy
    files: dict[str, bytes]
    root: Path

    @property
    def weights(self) -> bytes:
        return self.files["model.safetensors"]

    def fetched_bytes(self) -> int:
        """Bytes that were asked of the content network."""
        return fetched_bytes(self.hub)

    async def stored(self, digest: str) -> dict[str, bytes]:
        """What the registry has of a revision."""
        located = await self.parts.catalog.locate(digest)
        found = {}
        for entry in located.manifest.entries:
            found[entry.path] = blob_path(self.parts, entry.digest.hash).read_bytes()
        return found

    def downloads(self) -> list[str]:
        """Files of the directory of downloads."""
        directory = self.parts.state.downloads
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


class Room:
    """A disk without end."""

    def require_space(self, needed_bytes: int) -> None: ...


@asynccontextmanager
async def open_place(
    root: Path, *, token: str = "", reserve_bytes: int = 0, convert_module: str = "helios.registry.convert"
) -> AsyncIterator[Place]:
    async with hugging_face() as hub:
        files = model_files(root / "model")
        hub.repository("org/m", files)
        with FaultyProxy(hub.address) as proxy:
            settings = SourceSettings(
                hugging_face=HuggingFaceSettings(
                    endpoint=f"http://{proxy.address}", token=SecretStr(token), token_file=None
                ),
                downloads=DownloadSettings(chunk_bytes=CHUNK, in_flight=4),
            )
            async with open_parts(
                root / "registry",
                source_settings=settings,
                reserve_bytes=reserve_bytes,
                convert_module=convert_module,
            ) as parts:
                yield Place(parts, hub, proxy, files, root)
        assert hub.leaked == []


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path) as opened:
        yield opened


async def test_a_pull_that_is_sent_again_asks_nothing_of_a_hub_that_has_moved_on(place: Place) -> None:
    once = Mutation(request_id="r-1")
    first = (await place.parts.ingest("m", "hf:org/m", mutation=once)).model
    place.hub.repositories["org/m"].push(place.files | {"generation_config.json": b"{}"})
    place.hub.requests.clear()
    again = await place.parts.ingest("m", "hf:org/m", mutation=once)
    assert (again.model, again.new_bytes, place.hub.requests) == (first, 0, [])
    with pytest.raises(InvalidRequest) as caught:
        await place.parts.ingest("m", "hf:org/m", tags=("t",), mutation=once)
    assert (caught.value.reason, place.hub.requests) == ("REQUEST_ID_REUSED", [])
    assert (await place.parts.ingest("m", "hf:org/m")).model.revision != first.revision


async def test_a_pulled_model_is_what_the_hub_has(place: Place) -> None:
    events = [event async for event in place.parts.ingester.ingest(IngestSpec("m", "hf:org/m"))]
    done = done_of(events)
    expected = {path: place.files[path] for path in ("README.md", "config.json", "model.safetensors", "tokenizer.json")}
    assert await place.stored(done.model.revision.digest) == expected
    commit = place.hub.repositories["org/m"].commits[-1][0]
    assert done.model.revision.source == f"hf:org/m@{commit}"
    assert done.model.revision.profile.license == "apache-2.0"
    assert done.new_bytes == sum(map(len, expected.values()))
    phases = [event.phase for event in events if isinstance(event, IngestProgress)]
    assert list(dict.fromkeys(phases)) == [
        IngestPhase.INSPECT,
        IngestPhase.FETCH,
        IngestPhase.STORE,
        IngestPhase.COMMIT,
    ]
    assert IngestProgress(IngestPhase.FETCH, len(place.weights), len(place.weights)) in events
    assert place.downloads() == []
    # The same revision as from a directory.
    directory = place.root / "copy"
    directory.mkdir()
    for path, content in expected.items():
        (directory / path).write_bytes(content)
    assert (await place.parts.ingest("n", directory)).model.revision.digest == done.model.revision.digest


async def test_what_is_unchanged_is_not_fetched_again(place: Place) -> None:
    first = await place.parts.ingest("m", "hf:org/m")
    place.hub.requests.clear()
    again = await place.parts.ingest("other", "hf:org/m@main")
    assert again.model.revision.digest == first.model.revision.digest
    assert place.hub.bytes_requests() == []
    assert not any("/resolve/" in path for _, path, _ in place.hub.requests)


async def test_of_a_new_commit_only_what_is_new_is_fetched(place: Place) -> None:
    first = await place.parts.ingest("m", "hf:org/m")
    place.hub.repositories["org/m"].push(place.files | {"generation_config.json": b'{"temperature": 0.5}'})
    place.hub.repository("else/where", place.files)
    before = place.fetched_bytes()
    second = await place.parts.ingest("m", "hf:org/m")
    assert second.model.revision.digest != first.model.revision.digest
    assert second.new_bytes == len(b'{"temperature": 0.5}')
    # The same weights under another name; looking at their header is all that is asked of them.
    await place.parts.ingest("n", "hf:else/where")
    assert place.fetched_bytes() - before <= 2 * (128 << 10)
    old = await place.parts.ingest("old", f"hf:org/m@{place.hub.repositories['org/m'].commits[0][0]}")
    assert old.model.revision.digest == first.model.revision.digest


async def test_a_tree_of_many_pages_is_read_whole(place: Place) -> None:
    place.hub.page_size = 2
    done = await place.parts.ingest("m", "hf:org/m")
    assert "tokenizer.json" in await place.stored(done.model.revision.digest)


@pytest.mark.parametrize(
    "refusal",
    [
        ("hf:org/none", "", NotFound, "SOURCE_NOT_FOUND", "hf auth login"),
        ("hf:org/none", "good", NotFound, "SOURCE_NOT_FOUND", "check the name"),
        ("hf:org/private", "", NotFound, "SOURCE_NOT_FOUND", "private"),
        ("hf:org/private", "other", NotFound, "SOURCE_NOT_FOUND", "token's rights"),
        (
            "hf:org/gated",
            "",
            PreconditionFailed,
            "SOURCE_TOKEN_MISSING",
            "HELIOS_REGISTRY__SOURCES__HUGGING_FACE__TOKEN",
        ),
        ("hf:org/gated", "other", PermissionDenied, "SOURCE_GATED", "/org/gated"),
        ("hf:org/m@nowhere", "", NotFound, "SOURCE_REVISION_NOT_FOUND", "'nowhere'"),
        ("hf:org/m", "expired", PreconditionFailed, "SOURCE_TOKEN_INVALID", "expired"),
        ("hf:org/../m", "", InvalidRequest, "INVALID_SOURCE", "hf:ORGANISATION/NAME"),
    ],
)
async def test_a_refusal_says_what_to_do(tmp_path: Path, refusal: tuple[str, str, type[HeliosError], str, str]) -> None:
    source, token, kind, reason, words = refusal
    async with open_place(tmp_path, token=token) as place:
        place.hub.tokens = {"good", "other"}
        place.hub.repository("org/private", place.files, is_private=True, tokens=frozenset({"good"}))
        place.hub.repository("org/gated", place.files, is_gated=True, tokens=frozenset({"good"}))
        with pytest.raises(kind) as caught:
            await place.parts.ingest("m", source)
        assert caught.value.reason == reason
        assert words in caught.value.message
        assert not token or token in {"other", "expired"} or token not in caught.value.message
        assert place.parts.files() == set()


async def test_a_token_that_may_opens_what_is_gated(tmp_path: Path) -> None:
    async with open_place(tmp_path, token="good") as place:
        place.hub.tokens = {"good"}
        place.hub.repository("org/gated", place.files, is_gated=True, is_private=True, tokens=frozenset({"good"}))
        done = await place.parts.ingest("m", "hf:org/gated")
        assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights


@pytest.mark.parametrize("token", ["", "good"])
async def test_passwords_of_netrc_are_shown_to_nobody(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    async with open_place(tmp_path, token=token) as place:
        # What comes with credentials that are none of these is refused.
        place.hub.tokens = {"good"}
        done = await place.parts.ingest("m", "hf:org/m")
        assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights


async def test_a_conversion_that_fails_does_not_cost_the_download(tmp_path: Path) -> None:
    content = b"GGUF\x03\0\0\0" + hashlib.shake_256(b"noise").digest(2 * CHUNK)
    async with open_place(tmp_path, convert_module="tests.registry.broken_converter") as place:
        place.hub.repository("org/g", {"a-Q8.gguf": content})
        with pytest.raises(InvalidRequest):
            await place.parts.ingest("m", "hf:org/g")
        before = place.fetched_bytes()
        assert before >= len(content)
        with pytest.raises(InvalidRequest):
            await place.parts.ingest("m", "hf:org/g")
        assert place.fetched_bytes() - before == 8, "only its first bytes, which say what it is"


async def test_old_downloads_go_without_another_ingest(tmp_path: Path) -> None:
    directory = tmp_path / "downloads"
    downloads = open_downloads(directory, Room(), DownloadSettings())
    directory.mkdir()
    for name, age_seconds in (("old", 90_000), ("old.journal", 90_000), ("new", 80_000)):
        path = directory / name
        path.write_bytes(b"x")
        written = path.stat().st_mtime - age_seconds
        os.utime(path, (written, written))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await downloads.keep_tidy()
    assert [path.name for path in directory.iterdir()] == ["new"]


async def test_pickles_are_refused_with_the_reason_before_they_are_fetched(place: Place) -> None:
    files = {path: content for path, content in place.files.items() if path != "model.safetensors"}
    place.hub.repository("org/pickle", files)
    with pytest.raises(InvalidRequest, match=r"pickles \(pytorch_model.bin\), which run code when they are loaded"):
        await place.parts.ingest("m", "hf:org/pickle")
    assert place.hub.bytes_requests() == []


async def test_an_architecture_that_no_engine_knows_costs_one_small_file(place: Place) -> None:
    config = json.dumps(tiny.CONFIG | {"architectures": ["LlamaForCausalLN"]}).encode()
    place.hub.repository("org/strange", place.files | {"config.json": config})
    with pytest.raises(InvalidRequest, match="LlamaForCausalLM") as caught:
        await place.parts.ingest("m", "hf:org/strange")
    assert caught.value.reason == "UNSUPPORTED_ARCHITECTURE"
    read = [path for _, path, _ in place.hub.requests if "/resolve/" in path]
    assert [path.rpartition("/")[2] for path in read] == ["config.json"]
    # Another engine may know it.
    done = await place.parts.ingest(
        "m", "hf:org/strange", engine_settings=EngineSettings('{"engine": "custom:mine:Mine"}')
    )
    assert done.model.revision.profile.architecture == "LlamaForCausalLN"


async def test_a_wrong_header_is_refused_before_the_weights_are_fetched(place: Place) -> None:
    place.hub.repository("org/torn", place.files | {"model.safetensors": place.weights[:-1]})
    with pytest.raises(InvalidRequest) as caught:
        await place.parts.ingest("m", "hf:org/torn")
    assert caught.value.reason == "UNSUPPORTED_FORMAT"
    assert place.fetched_bytes() <= 128 << 10


async def test_patterns_choose_files(place: Place) -> None:
    spec = {"exclude": ("README*", "*.bin"), "include": ("*.json", "*.safetensors", "README.md")}
    done = await place.parts.ingest("m", "hf:org/m", **spec)
    assert set(await place.stored(done.model.revision.digest)) == {"config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(InvalidRequest, match="none of the 7 files"):
        await place.parts.ingest("m", "hf:org/m", include=("*.none",))


async def test_several_gguf_files_are_named_for_a_choice(place: Place) -> None:
    place.hub.repository("org/g", {"a-Q4.gguf": b"GGUF\x03\0\0\0", "a-Q8.gguf": b"GGUF\x03\0\0\0", "README.md": CARD})
    with pytest.raises(InvalidRequest, match=r"--include: a-Q4\.gguf \(0.0 GB\), a-Q8\.gguf") as caught:
        await place.parts.ingest("m", "hf:org/g")
    assert caught.value.reason == "AMBIGUOUS_SOURCE"


@pytest.mark.slow
async def test_a_gguf_file_is_fetched_once_and_converted(place: Place, gguf_file: Path) -> None:
    content = gguf_file.read_bytes()
    place.hub.repository("org/g", {"a-Q4.gguf": b"GGUF\x03\0\0\0", "deep/a-F16.gguf": content, "README.md": CARD})
    done = await place.parts.ingest("m", "hf:org/g", include=("*F16.gguf",))
    assert done.model.revision.profile.architecture == "LlamaForCausalLM"
    assert place.downloads() == []
    again = await place.parts.ingest("n", gguf_file)
    assert again.model.revision.digest == done.model.revision.digest
    before = place.fetched_bytes()
    known = await place.parts.ingest("o", "hf:org/g", include=("deep/",), expected_sha256=tiny.sha256(gguf_file))
    assert known.model.revision.digest == done.model.revision.digest
    # Its first bytes say what it is; its sha256 is the hub's.
    assert place.fetched_bytes() - before == 8


FAULTS: dict[str, Callable[[], list[faults.Fault]]] = {
    "500": lambda: [
        faults.status(500, part="/api/"),
        faults.status(502, part="/resolve/"),
        faults.status(503, part="/cdn/"),
    ],
    "429": lambda: [faults.status(429, retry_after=1, part="/tree/"), faults.status(429, retry_after=1, part="/cdn/")],
    "reset": lambda: [faults.reset_body(after_bytes=1000, part="/cdn/", times=3), faults.lost_answer(part="/api/")],
    "another etag": lambda: [faults.wrong_etag(part="/cdn/")],
    "short answer": lambda: [faults.wrong_length(missing_bytes=7, part="/cdn/", times=2)],
    "slow": lambda: [faults.slow_drip(bytes_per_second=100_000, part="/cdn/", times=2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_network_changes_nothing(place: Place, fault: str) -> None:
    # The first request of the content network is for the header; the faults are for the file, too.
    place.proxy.inject(*FAULTS[fault]())
    done = await place.parts.ingest("m", "hf:org/m")
    assert place.proxy.broken_count > 0
    assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights
    assert place.downloads() == []


async def test_a_flipped_bit_is_never_stored(place: Place) -> None:
    async def pull() -> None:
        has_flipped = False
        async for event in place.parts.ingester.ingest(IngestSpec("m", "hf:org/m")):
            if isinstance(event, IngestProgress) and event.phase is IngestPhase.FETCH and not has_flipped:
                has_flipped = True
                place.proxy.inject(faults.flipped_bit(at=0, part="/cdn/"))

    # Slow enough that the fetch is noticed while it runs.
    place.proxy.inject(faults.slow_drip(bytes_per_second=200_000, part="/cdn/", times=8))
    with pytest.raises(DigestMismatch):
        await pull()
    assert place.parts.files() == set()
    assert place.downloads() == []
    done = await place.parts.ingest("m", "hf:org/m")
    assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights


async def test_a_hub_that_lies_about_a_hash_leaves_nothing(place: Place) -> None:
    place.hub.lies["model.safetensors"] = "ab" * 32
    with pytest.raises(DigestMismatch):
        await place.parts.ingest("m", "hf:org/m")
    assert place.parts.files() == set()
    assert place.downloads() == []


async def test_small_files_are_held_to_their_git_hash(place: Place) -> None:
    place.proxy.inject(faults.flipped_bit(at=3, part="/resolve/", method="GET"))
    with pytest.raises(DigestMismatch, match=r"config\.json"):
        await place.parts.ingest("m", "hf:org/m")


async def test_signed_urls_that_expire_are_asked_for_again(place: Place) -> None:
    async def expire() -> None:
        while place.fetched_bytes() < len(place.weights) // 2:
            await asyncio.sleep(0.005)
        place.hub.expire_urls()

    place.proxy.inject(faults.slow_drip(bytes_per_second=400_000, part="/cdn/", times=20))
    async with asyncio.TaskGroup() as group:
        group.create_task(expire())
        done = await place.parts.ingest("m", "hf:org/m")
    assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights


async def test_a_pull_goes_on_where_the_last_one_broke_off(place: Place) -> None:
    repository = place.hub.repositories["org/m"]

    async def revoke() -> None:
        while place.fetched_bytes() < len(place.weights) // 2:
            await asyncio.sleep(0.005)
        repository.is_private = True
        place.hub.expire_urls()

    place.proxy.inject(faults.slow_drip(bytes_per_second=400_000, part="/cdn/", times=10_000))
    async with asyncio.TaskGroup() as group:
        group.create_task(revoke())
        with pytest.raises(NotFound, match="hf auth login"):
            await place.parts.ingest("m", "hf:org/m")
    assert place.parts.files() == set()
    repository.is_private = False
    place.proxy.heal()
    before = place.fetched_bytes()
    done = await place.parts.ingest("m", "hf:org/m")
    # The other half, some chunks that were on their way, and the header.
    assert place.fetched_bytes() - before < len(place.weights) * 3 // 4
    assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights


async def test_a_caller_who_leaves_keeps_what_came(place: Place) -> None:
    place.proxy.inject(faults.slow_drip(bytes_per_second=200_000, part="/cdn/", times=10_000))
    async with aclosing(place.parts.ingester.ingest(IngestSpec("m", "hf:org/m"))) as events:
        async for event in events:
            if isinstance(event, IngestProgress) and event.phase is IngestPhase.FETCH and event.done_bytes > 10 * CHUNK:
                assert event.bytes_per_second > 0
                break
    assert place.parts.files() == set()
    assert len(place.downloads()) == 2
    place.proxy.heal()
    before = place.fetched_bytes()
    done = await place.parts.ingest("m", "hf:org/m")
    assert place.fetched_bytes() - before < len(place.weights) - 5 * CHUNK
    assert (await place.stored(done.model.revision.digest))["model.safetensors"] == place.weights
    assert place.downloads() == []


async def test_two_names_share_one_download(place: Place) -> None:
    place.proxy.inject(faults.slow_drip(bytes_per_second=600_000, part="/cdn/", times=10_000))
    async with asyncio.TaskGroup() as group:
        first = group.create_task(place.parts.ingest("m", "hf:org/m"))
        second = group.create_task(place.parts.ingest("n", "hf:org/m"))
    assert first.result().model.revision.digest == second.result().model.revision.digest
    # The weights once, their header twice, and the question how long they are.
    assert place.fetched_bytes() <= len(place.weights) + 2 * (128 << 10) + 2


async def test_ingests_that_want_the_same_files_in_another_order_do_not_wait_for_each_other(place: Place) -> None:
    one, two = hashlib.shake_256(b"1").digest(9 << 20), hashlib.shake_256(b"2").digest(9 << 20)
    small = {path: place.files[path] for path in ("config.json", "model.safetensors", "tokenizer.json")}
    # Vocabularies of that size are no small files.
    place.hub.repository("org/a", small | {"vocab.json": one, "vocab.txt": two})
    other = place.weights[:-1] + bytes([place.weights[-1] ^ 1])
    place.hub.repository("org/b", small | {"model.safetensors": other, "vocab.json": two, "vocab.txt": one})
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        first = group.create_task(place.parts.ingest("a", "hf:org/a"))
        second = group.create_task(place.parts.ingest("b", "hf:org/b"))
    for path, task in (("vocab.json", first), ("vocab.txt", second)):
        assert (await place.stored(task.result().model.revision.digest))[path] == one


async def test_files_of_the_same_content_are_one_blob(place: Place) -> None:
    large = hashlib.shake_256(b"1").digest(9 << 20)
    place.hub.repository("org/twins", place.files | {"vocab.json": large, "vocab.txt": large})
    done = await place.parts.ingest("m", "hf:org/twins")
    stored = await place.stored(done.model.revision.digest)
    assert stored["vocab.json"] == stored["vocab.txt"] == large
    assert place.downloads() == []


async def test_old_downloads_go_and_young_ones_only_for_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = place.parts.state.downloads
    directory.mkdir()
    old, young = directory / ("a" * 64), directory / ("b" * 64)
    for path in (old, old.with_name(f"{old.name}.journal"), young):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    os.utime(old.with_name(f"{old.name}.journal"), (0, 0))
    await place.parts.ingest("m", "hf:org/m")
    assert place.downloads() == [young.name]
    place.hub.repository("org/n", place.files | {"model.safetensors": place.weights[:-1] + b"x"})
    refusals = iter([True])

    def require_space(needed_bytes: int) -> None:
        del needed_bytes
        if next(refusals, False):
            raise DiskFull("no room")

    monkeypatch.setattr(place.parts.blobs, "require_space", require_space)
    await place.parts.ingest("n", "hf:org/n")
    assert place.downloads() == []


async def test_a_full_disk_is_told_before_bytes_are_fetched(tmp_path: Path) -> None:
    async with open_place(tmp_path, reserve_bytes=1 << 60) as place:
        with pytest.raises(DiskFull):
            await place.parts.ingest("m", "hf:org/m")
        assert place.fetched_bytes() <= 128 << 10


async def test_a_limit_on_the_size_of_files_is_a_full_disk(place: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull, match="can't hold"):
            await place.parts.ingest("m", "hf:org/m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.parts.files() == set()


async def test_a_hub_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    async with open_place(tmp_path) as place:
        place.proxy.inject(faults.status(503, retry_after=3600, times=100))
        with pytest.raises(Unavailable, match="answered 503") as caught:
            await place.parts.ingest("m", "hf:org/m")
        assert caught.value.reason == "SOURCE_UNAVAILABLE"
        assert caught.value.retry_after_seconds == 3600


async def test_the_command_says_how_far_it_is_and_when_it_will_be_done(
    place: Place, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.proxy.inject(faults.slow_drip(bytes_per_second=600_000, part="/cdn/", times=10_000))
    output = io.StringIO()
    async with serve(place.parts, mesh) as address:

        @asynccontextmanager
        async def open_admin(state: StateDirectory) -> AsyncIterator[Dialer]:
            del state
            async with mesh.dialer(address, "admin-edge") as dialer:
                yield dialer

        monkeypatch.setattr(models_add, "open_admin", open_admin)
        wanted = models_add.Addition(None, "hf:org/m", "main", exclude=("README.md",))
        await models_add.models_add(StateDirectory(place.root), Console(file=output), wanted, is_json=True)
        # Who types no name gets no other model's.
        place.hub.repository("other/m", place.files)
        taken = models_add.Addition(None, "hf:other/m")
        with pytest.raises(AlreadyExists, match="--name") as caught:
            await models_add.models_add(StateDirectory(place.root), Console(file=io.StringIO()), taken)
        assert caught.value.reason == "NAME_TAKEN"
        for wanted in (replace(taken, name="m", aliases=("other",)), models_add.Addition(None, "hf:other/m")):
            await models_add.models_add(StateDirectory(place.root), Console(file=io.StringIO()), wanted)
        assert (await place.parts.store.get_model("other")).revision.source.startswith("hf:other/m@")
    documents = [json.loads(line) for line in output.getvalue().splitlines()]
    done = documents[-1]["done"]
    assert (done["model"], done["license"], done["architecture"]) == ("m", "", "LlamaForCausalLM")
    fetching = [document for document in documents if document.get("phase") == "fetch"]
    assert {document["total_bytes"] for document in fetching} == {len(place.weights)}
    assert any(document["bytes_per_second"] > 0 and document["remaining_seconds"] for document in fetching)
