"""Ingests: whole or not at all, whatever the source, the caller and the disk do."""

import asyncio
import json
import os
import resource
from contextlib import aclosing
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from helios.mesh.errors import (
    AlreadyExists,
    Bug,
    Conflict,
    DeadlineExceeded,
    DigestMismatch,
    DiskFull,
    Draining,
    HeliosError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from helios.registry.records import IngestPhase, IngestProgress, IngestSpec
from helios.registry.wire import profile_from_proto, profile_to_proto
from tests.registry import tiny
from tests.registry.support import Parts, done_of, open_parts


async def assert_nothing_left(parts: Parts) -> None:
    assert parts.files() == set()
    assert await parts.store.list_models() == []
    assert await parts.store.blobs.read() == {}


async def test_a_directory_becomes_a_model(parts: Parts, model_directory: Path) -> None:
    events = [event async for event in parts.ingester.ingest(IngestSpec("m", str(model_directory), ("x",)))]
    done = done_of(events)
    progress = [event for event in events if isinstance(event, IngestProgress)]
    assert list(dict.fromkeys(event.phase for event in progress)) == [
        IngestPhase.INSPECT,
        IngestPhase.STORE,
        IngestPhase.COMMIT,
    ]
    size = sum(path.stat().st_size for path in model_directory.iterdir())
    assert IngestProgress(IngestPhase.STORE, size, size) in progress
    assert done.new_bytes == size
    assert done.model.aliases == ("x",)
    assert done.model.revision.source == f"dir:{model_directory}"
    located = await parts.catalog.locate(done.model.revision.digest)
    assert {entry.path: parts.directory.path(entry.digest.hash).read_bytes() for entry in located.manifest.entries} == {
        path.name: path.read_bytes() for path in model_directory.iterdir()
    }
    assert located.blob_store_url == parts.state.blobs.as_uri()


async def test_the_same_bytes_give_the_same_revision_and_no_new_blobs(parts: Parts, tmp_path: Path) -> None:
    first = await parts.ingest("m", tiny.write_model(tmp_path / "one"))
    files = parts.files()
    again = await parts.ingest("m", tmp_path / "one")
    other = await parts.ingest("n", tiny.write_model(tmp_path / "two"))
    assert again.model == first.model
    assert other.model.revision == first.model.revision
    assert (again.new_bytes, other.new_bytes) == (0, 0)
    assert parts.files() == files


async def test_a_changed_directory_is_a_new_revision_that_shares_blobs(parts: Parts, tmp_path: Path) -> None:
    directory = tiny.write_model(tmp_path / "m")
    first = await parts.ingest("m", directory)
    (directory / "generation_config.json").write_text("{}")
    second = await parts.ingest("m", directory)
    assert second.model.revision.digest != first.model.revision.digest
    assert second.new_bytes == 2
    found = await parts.store.list_revisions("m", before=None, limit=9)
    assert [revision.digest for _, revision in found] == [second.model.revision.digest, first.model.revision.digest]


async def test_shards_are_one_model(parts: Parts, tmp_path: Path) -> None:
    done = await parts.ingest("m", tiny.write_sharded(tmp_path / "m"))
    manifest, _ = await parts.store.get_manifest(done.model.revision.digest)
    assert sum(entry.path.startswith("model-0") for entry in manifest.entries) == 2


async def test_leaves_out_what_is_not_the_model(parts: Parts, model_directory: Path) -> None:
    (model_directory / "pytorch_model.bin").write_bytes(b"pickle")
    (model_directory / "modeling_x.py").write_text("import os")
    (model_directory / "consolidated.safetensors").write_bytes(b"another copy")
    (model_directory / "onnx").mkdir()
    (model_directory / "LICENSE").write_text("Apache-2.0")
    done = await parts.ingest("m", model_directory)
    manifest, _ = await parts.store.get_manifest(done.model.revision.digest)
    assert [entry.path for entry in manifest.entries] == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def remove(name: str) -> object:
    return lambda directory: (directory / name).unlink()


def replace(name: str, content: bytes) -> object:
    return lambda directory: (directory / name).write_bytes(content)


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lie_about_a_shape(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [tiny.HIDDEN * 1000]
    document = json.dumps(header).encode()
    path.write_bytes(len(document).to_bytes(8, "little") + document + content[8 + length :])


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside.json"
    (directory / "config.json").rename(outside)
    (directory / "config.json").symlink_to(outside)


def dangling_link(directory: Path) -> None:
    (directory / "generation_config.json").symlink_to(directory / "nothing")


def fifo(directory: Path) -> None:
    os.mkfifo(directory / "generation_config.json")


def index_of_missing_shard(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "config.json is missing"),
        (remove("model.safetensors"), "no \\*.safetensors"),
        (remove("tokenizer.json"), "tokenizer is missing"),
        (replace("config.json", b"{"), "config.json is not valid JSON"),
        (replace("config.json", b"[]"), "not an object"),
        (replace("config.json", b'{"architectures": ["X"]}'), "num_hidden_layers"),
        (replace("config.json", b" " * (9 << 20)), "larger than 8 MiB"),
        (replace("model.safetensors", b""), "cut short"),
        (cut_weights, "cut short"),
        (lie_about_a_shape, "lies about its size"),
        (only_pickles, "pickles"),
        (link_out, "leads out of the directory"),
        (dangling_link, "leads nowhere"),
        (fifo, "not a regular file"),
        (index_of_missing_shard, "model-00001-of-00001.safetensors is missing"),
    ],
)
async def test_a_bad_directory_is_refused_and_leaves_nothing(
    parts: Parts, model_directory: Path, spoil: object, message: str
) -> None:
    assert callable(spoil)
    spoil(model_directory)
    with pytest.raises(InvalidRequest, match=message):
        await parts.ingest("m", model_directory)
    await assert_nothing_left(parts)


@pytest.mark.parametrize(
    "source",
    [
        "", "relative/path", "/nothing/here", "/dev/null", "/etc/passwd", "embedded:unknown", "embedded:", "a\0b",
        "ftp://example.com/model", "/" + "x" * 5000, "embedded:../../etc",
    ],
)  # fmt: skip
async def test_refuses_sources(parts: Parts, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await parts.ingest("m", source)
    assert caught.value.reason == "INVALID_SOURCE"
    await assert_nothing_left(parts)


@pytest.mark.parametrize("name", ["", "../m", "a b"])
async def test_refuses_names(parts: Parts, model_directory: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await parts.ingest(name, model_directory)
    assert caught.value.reason == "INVALID_MODEL_NAME"


async def test_what_is_not_the_expected_revision_leaves_nothing(parts: Parts, model_directory: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await parts.ingest("m", model_directory, expected_sha256="xyz")
    assert caught.value.reason == "INVALID_DIGEST"
    before = parts.files()
    with pytest.raises(DigestMismatch):
        await parts.ingest("m", model_directory, expected_sha256="a" * 64)
    assert parts.files() == before
    digest = (await parts.ingest("m", model_directory)).model.revision.digest
    for expected in (digest, digest.removeprefix("sha256:").upper()):
        again = await parts.ingest("n", model_directory, expected_sha256=expected)
        assert again.model.revision.digest == digest
    with pytest.raises(DigestMismatch):
        await parts.ingest("n", model_directory, expected_sha256="a" * 64)
    assert (await parts.store.get_model("n")).revision.digest == digest


async def test_an_alias_that_is_taken_is_refused_before_any_work(parts: Parts, model_directory: Path) -> None:
    await parts.ingest("m", model_directory, aliases=("x",))
    for name, aliases in (("x", ()), ("n", ("x",)), ("n", ("m",))):
        with pytest.raises(AlreadyExists) as caught:
            await parts.ingest(name, "/nothing/here", aliases=aliases)
        assert caught.value.reason == "ALIAS_TAKEN"


async def test_a_full_disk_leaves_nothing(parts: Parts, tmp_path: Path) -> None:
    directory = tiny.write_big(tmp_path / "big", 4 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull):
            await parts.ingest("m", directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await assert_nothing_left(parts)


async def test_too_little_space_is_seen_before_anything_is_stored(tmp_path: Path, model_directory: Path) -> None:
    async with open_parts(tmp_path / "r", reserve_bytes=1 << 60) as parts:
        with pytest.raises(DiskFull, match="kept free"):
            await parts.ingest("m", model_directory)
        await assert_nothing_left(parts)


async def test_a_failed_ingest_keeps_what_others_use(parts: Parts, model_directory: Path) -> None:
    await parts.ingest("m", model_directory)
    files = parts.files()
    (model_directory / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest):
        await parts.ingest("n", model_directory)
    assert parts.files() == files


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_caller_that_leaves_while_storing_leaves_nothing(parts: Parts, tmp_path: Path) -> None:
    directory = tiny.write_big(tmp_path / "big", 256 << 20)
    async with aclosing(parts.ingester.ingest(IngestSpec("m", str(directory)))) as events:
        async for event in events:
            if isinstance(event, IngestProgress) and event.phase is IngestPhase.STORE:
                break
    await assert_nothing_left(parts)
    # Nothing of it stands in the way of the next one.
    assert (await parts.ingest("m", directory)).model.name == "m"


async def test_a_caller_that_leaves_at_once_leaves_nothing(parts: Parts, model_directory: Path) -> None:
    async def ingest() -> None:
        await parts.ingest("m", model_directory)

    for turns in range(12):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ingest(), name="ingest")
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        assert await parts.store.list_models() == []
    await assert_nothing_left(parts)


async def test_two_callers_share_one_ingest_and_one_may_leave(parts: Parts, tmp_path: Path) -> None:
    directory = tiny.write_big(tmp_path / "big", 128 << 20)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(parts.ingest("m", directory), name="first")
        second = group.create_task(parts.ingest("m", directory), name="second")
        third = group.create_task(parts.ingest("m", directory), name="third")
        await until(parts.files)
        third.cancel()
    assert first.result() is second.result()
    assert third.cancelled()


async def test_another_source_under_a_name_that_is_being_ingested_is_refused(tmp_path: Path, gguf_file: Path) -> None:
    async with open_parts(tmp_path / "r", convert_module="tests.registry.slow_converter") as parts:
        source = tmp_path / "a.gguf"
        source.write_bytes(gguf_file.read_bytes())
        async with aclosing(parts.ingester.ingest(IngestSpec("m", str(source)))) as events:
            await anext(events)
            with pytest.raises(Conflict) as caught:
                await parts.ingest("m", "/somewhere/else")
            assert caught.value.reason == "INGEST_RUNNING"


async def test_ingests_are_bounded(tmp_path: Path, gguf_file: Path) -> None:
    async with open_parts(tmp_path / "r", convert_module="tests.registry.slow_converter", max_concurrent=1) as parts:
        source = tmp_path / "a.gguf"
        source.write_bytes(gguf_file.read_bytes())
        async with aclosing(parts.ingester.ingest(IngestSpec("m", str(source)))) as events:
            await anext(events)
            with pytest.raises(Overloaded) as caught:
                await parts.ingest("n", source)
        assert caught.value.retry_after_seconds


# The last is how node, which Azurite runs in, calls itself.
SHARED_SERVERS = ("weed", "postgres", "setpriv", "MainThread")


def converters() -> list[psutil.Process]:
    """This process's converters and their children; it also has servers that other tests share."""
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if child.name() not in SHARED_SERVERS]


async def test_leaving_during_a_conversion_kills_its_whole_process_group(tmp_path: Path, gguf_file: Path) -> None:
    source = tmp_path / "slow.gguf"
    source.write_bytes(gguf_file.read_bytes())
    pids = source.with_suffix(".pids")
    async with open_parts(tmp_path / "r", convert_module="tests.registry.slow_converter") as parts:
        async with aclosing(parts.ingester.ingest(IngestSpec("m", str(source)))) as events:
            async for _ in events:
                if pids.exists() and pids.read_text():
                    break
                if not converters():
                    continue
                await until(lambda: pids.exists() and pids.read_text())
                break
        assert converters() == []
        grandchild = json.loads(pids.read_text())[0]
        await until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie")
        await assert_nothing_left(parts)


async def test_a_conversion_that_takes_too_long_is_killed(tmp_path: Path, gguf_file: Path) -> None:
    source = tmp_path / "slow.gguf"
    source.write_bytes(gguf_file.read_bytes())
    async with open_parts(
        tmp_path / "r", convert_module="tests.registry.slow_converter", convert_timeout_seconds=1.0
    ) as parts:
        with pytest.raises(DeadlineExceeded) as caught:
            await parts.ingest("m", source)
        assert caught.value.reason == "CONVERSION_TIMEOUT"
        assert converters() == []
        await assert_nothing_left(parts)


@pytest.mark.parametrize(
    ("name", "error"),
    [("killed", Unavailable), ("crashed", Bug), ("garbage", Bug), ("too-big", DiskFull), ("empty", InvalidRequest)],
)
async def test_a_converter_that_fails(tmp_path: Path, gguf_file: Path, name: str, error: type[HeliosError]) -> None:
    source = tmp_path / f"{name}.gguf"
    source.write_bytes(gguf_file.read_bytes())
    async with open_parts(tmp_path / "r", convert_module="tests.registry.broken_converter") as parts:
        with pytest.raises(error):
            await parts.ingest("m", source)
        await assert_nothing_left(parts)


async def test_stopping_the_registry_ends_its_ingests(tmp_path: Path, gguf_file: Path) -> None:
    source = tmp_path / "slow.gguf"
    source.write_bytes(gguf_file.read_bytes())
    caught: list[HeliosError] = []

    async def ingest(parts: Parts) -> None:
        try:
            await parts.ingest("m", source)
        except Draining as error:
            caught.append(error)

    slow = open_parts(tmp_path / "r", convert_module="tests.registry.slow_converter")
    async with asyncio.TaskGroup() as group, slow as parts:
        group.create_task(ingest(parts), name="ingest")
        await until(lambda: source.with_suffix(".pids").exists())
    assert len(caught) == 1
    assert converters() == []
    assert parts.files() == set()


async def test_an_expected_digest_that_differs_stops_before_the_conversion(parts: Parts, gguf_file: Path) -> None:
    with pytest.raises(DigestMismatch) as caught:
        await parts.ingest("m", gguf_file, expected_sha256="0" * 64)
    assert caught.value.metadata["found"] == tiny.sha256(gguf_file)
    await assert_nothing_left(parts)


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"GGUF\x01\0\0\0", b"GGUF\0\0\0\x03", b"PK\x03\x04" * 10])
async def test_what_is_no_gguf_is_refused_at_once(parts: Parts, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="GGUF"):
        await parts.ingest("m", path)
    await assert_nothing_left(parts)


def write_adapter(directory: Path, **changes: object) -> Path:
    """Writes a LoRA adapter of the tiny model as PEFT does."""
    directory.mkdir()
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"]
    save_file({name: np.ones((2, 32), np.float32) for name in names}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "r": 2} | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


async def test_an_adapter_is_a_model_of_its_own_kind(parts: Parts, tmp_path: Path) -> None:
    done = await parts.ingest("pirate-lora", write_adapter(tmp_path / "adapter"))
    profile = done.model.revision.profile
    assert (profile.architecture, profile.base_model, profile.weights_bytes) == ("LoraAdapter", "org/tiny", 512)
    assert profile_from_proto(profile_to_proto(profile)) == profile
    located = await parts.catalog.locate(done.model.revision.digest)
    assert [entry.path for entry in located.manifest.entries] == ["adapter_config.json", "adapter_model.safetensors"]
    again = await parts.store.get_model("pirate-lora")
    assert again.revision.profile == profile


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "not 'LORA'"),
        ({"base_model_name_or_path": ""}, "for which model"),
        ({"r": 0}, "'r'"),
    ],
)
async def test_a_bad_adapter_is_refused(parts: Parts, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await parts.ingest("bad", write_adapter(tmp_path / "adapter", **changes))
    assert parts.files() == set()
