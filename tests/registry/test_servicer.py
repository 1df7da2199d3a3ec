"""The contract over real mTLS: every call through the client, who may call what, pages, watches, cancelled calls."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import (
    AlreadyExists,
    Conflict,
    DigestMismatch,
    DiskFull,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    RevisionNotFound,
    Unavailable,
)
from helios.mesh.routing import ModelRouting
from helios.mesh.windows import Window
from helios.registry.client import (
    IngestDone,
    IngestProgress,
    ModelDeleted,
    ModelPolicy,
    ModelSnapshot,
    ModelUpserted,
    RegistryClient,
    WatchEvent,
)
from helios.registry.manifest import Manifest
from helios.registry.records import IngestPhase
from helios.registry.wire import manifest_from_proto
from tests.registry import tiny
from tests.registry.support import Mesh, Parts, serve


@pytest.fixture
async def address(parts: Parts, mesh: Mesh) -> AsyncIterator[str]:
    async with serve(parts, mesh) as served:
        yield served


@pytest.fixture
async def client(address: str, mesh: Mesh) -> AsyncIterator[RegistryClient]:
    async with mesh.client(address) as opened:
        yield opened


async def ingest(client: RegistryClient, name: str, source: Path | str, **more: object) -> IngestDone:
    events = [event async for event in client.ingest(name, str(source), **more)]  # type: ignore[arg-type]
    assert all(isinstance(event, IngestProgress) for event in events[:-1])
    assert isinstance(events[-1], IngestDone)
    return events[-1]


async def next_of(events: AsyncGenerator[WatchEvent, None]) -> WatchEvent:
    async with asyncio.timeout(10):
        return await anext(events)


async def test_every_call_of_the_contract(client: RegistryClient, model_directory: Path) -> None:
    done = await ingest(client, "org/m", model_directory, aliases=["x"])
    model = done.model
    assert await client.get_model("org/m") == model
    assert await client.get_model("x") == model
    assert await client.list_models() == (model,)
    assert await client.list_revisions("x") == (model.revision,)

    located = await client.get_manifest(model.revision.digest)
    assert located.revision == model.revision
    assert located.manifest.digest() == model.revision.digest
    for entry in located.manifest.entries:
        hash_ = entry.digest.hash
        blob = Path(located.blob_store_url.removeprefix("file://")) / "sha256" / hash_[:2] / hash_
        assert blob.read_bytes() == (model_directory / entry.path).read_bytes()

    windows = (Window("0 8 * * MON-FRI", 36_000.0, "Europe/Berlin", min_replicas=2),)
    policy = ModelPolicy(1, 3, windows, idle_seconds=60.0, routing=ModelRouting(prefix_weight=0.0))
    planned = await client.update_policy("x", policy, is_dry_run=True)
    assert (planned.policy, planned.version) == (policy, model.version + 1)
    assert (await client.get_model("x")).policy == ModelPolicy()
    assert (await client.update_policy("x", policy)).policy == policy
    assert (await client.get_model("x")).policy == policy
    assert (await client.update_policy("x", ModelPolicy(1, 3))).policy == ModelPolicy(1, 3)
    assert (await client.put_alias("y", "org/m")).aliases == ("x", "y")
    await client.delete_alias("y")
    assert (await client.get_model("org/m")).aliases == ("x",)
    assert await client.delete_model("org/m") == located.manifest.size_bytes
    assert await client.list_models() == ()


async def test_errors_arrive_as_they_were_raised(
    client: RegistryClient, model_directory: Path, gguf_file: Path
) -> None:
    await ingest(client, "m", model_directory, aliases=["x"])
    calls: list[tuple[object, type[HeliosError], str]] = [
        (client.get_model("n"), ModelNotFound, "MODEL_NOT_FOUND"),
        (client.get_model(""), InvalidRequest, "INVALID_REQUEST"),
        (client.delete_model("n"), ModelNotFound, "MODEL_NOT_FOUND"),
        (client.list_revisions("n"), ModelNotFound, "MODEL_NOT_FOUND"),
        (client.get_manifest("sha256:" + "0" * 64), RevisionNotFound, "REVISION_NOT_FOUND"),
        (client.get_manifest("../../etc/passwd"), InvalidRequest, "INVALID_DIGEST"),
        (client.put_alias("m", "m"), AlreadyExists, "MODEL_EXISTS"),
        (client.put_alias("y", "n"), ModelNotFound, "MODEL_NOT_FOUND"),
        (client.put_alias("../y", "m"), InvalidRequest, "INVALID_MODEL_NAME"),
        (client.delete_alias("y"), NotFound, "ALIAS_NOT_FOUND"),
        (client.update_policy("m", ModelPolicy(2, 1)), InvalidRequest, "INVALID_POLICY"),
        (client.update_policy("m", ModelPolicy(2, 1), is_dry_run=True), InvalidRequest, "INVALID_POLICY"),
        (client.update_policy("n", ModelPolicy(1, 1), is_dry_run=True), ModelNotFound, "MODEL_NOT_FOUND"),
        (client.update_policy("m", ModelPolicy(1, 1), expected_version=99, is_dry_run=True), Conflict, "STALE_VERSION"),
        (ingest(client, "a b", model_directory), InvalidRequest, "INVALID_MODEL_NAME"),
        (ingest(client, "n", "/nothing"), InvalidRequest, "INVALID_SOURCE"),
        (ingest(client, "n", model_directory, aliases=["x"]), AlreadyExists, "ALIAS_TAKEN"),
        (ingest(client, "n", gguf_file, expected_sha256="0" * 64), DigestMismatch, "DIGEST_MISMATCH"),
    ]
    for call, kind, reason in calls:
        with pytest.raises(kind) as caught:
            await call  # type: ignore[misc]
        assert caught.value.reason == reason
    assert [model.name for model in await client.list_models()] == ["m"]


async def test_a_source_that_cant_be_taken_is_an_error_before_the_first_message(client: RegistryClient) -> None:
    with pytest.raises(InvalidRequest):
        await anext(client.ingest("n", "/nothing"))


class FullDisk:
    """An ingester whose disk fills up before or after the first bytes."""

    def __init__(self, events: tuple[IngestProgress, ...]) -> None:
        self._events = events

    async def ingest(self, _: object) -> AsyncGenerator[IngestProgress, None]:
        for event in self._events:
            yield event
        raise DiskFull("4 bytes are missing", metadata={"param": "source"})


@pytest.mark.parametrize(
    ("events", "count"),
    [((IngestProgress(IngestPhase.INSPECT),), 0), ((IngestProgress(IngestPhase.STORE, 1, 5),), 2)],
    ids=["before the first message", "after it"],
)
async def test_the_error_of_an_ingest_is_in_band_too_once_there_was_a_message(
    parts: Parts, mesh: Mesh, events: tuple[IngestProgress, ...], count: int
) -> None:
    parts.ingester = FullDisk(events)  # type: ignore[assignment]
    async with serve(parts, mesh) as address, mesh.dialer(address, "admin-edge") as dialer:
        call = dialer.stub(RegistryServiceStub).IngestModel(pb.IngestModelRequest(), timeout=20)
        messages: list[Any] = [await call.read() for _ in range(count)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    if messages:
        assert messages[-1].error == pb.IngestError(
            message="4 bytes are missing", type=DiskFull.openai_type, param="source", code="disk_full"
        )


@pytest.mark.parametrize(
    ("component", "rights"),
    [("admin-edge", "read policy write"), ("proxy", "read policy"), ("storage", "read"), ("worker", ""), ("edge", "")],
)
async def test_who_may_call_what(
    address: str, mesh: Mesh, parts: Parts, model_directory: Path, *, component: str, rights: str
) -> None:
    model = (await parts.ingest("m", model_directory, aliases=("x",))).model
    async with mesh.client(address, component) as other:

        async def is_allowed(call: object) -> bool:
            try:
                await call  # type: ignore[misc]
            except PermissionDenied:
                return False
            except NotFound:
                return True
            return True

        async def watch() -> None:
            async with aclosing(other.watch_models()) as events:
                assert isinstance(await next_of(events), ModelSnapshot)

        for reading in (
            other.get_model("m"),
            other.list_models(),
            other.list_revisions("m"),
            other.get_manifest(model.revision.digest),
            watch(),
        ):
            assert await is_allowed(reading) is ("read" in rights)
        assert await is_allowed(other.update_policy("m", ModelPolicy(1, 1))) is ("policy" in rights)
        for writing in (
            ingest(other, "n", model_directory),
            other.put_alias("y", "m"),
            other.delete_alias("z"),
            other.delete_model("z"),
        ):
            assert await is_allowed(writing) is ("write" in rights)


async def test_a_caller_without_a_certificate_gets_nothing(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await RegistryServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=5)


@pytest.fixture
async def raw(address: str, mesh: Mesh) -> AsyncIterator[Dialer]:
    async with mesh.dialer(address, "admin-edge") as dialer:
        yield dialer


async def test_pages(client: RegistryClient, raw: Dialer, model_directory: Path) -> None:
    for number in range(5):
        await ingest(client, f"m{number}", model_directory)
    stub = raw.stub(RegistryServiceStub)
    names: list[list[str]] = []
    token = ""
    while True:
        page = await stub.ListModels(pb.ListModelsRequest(page_size=2, page_token=token), timeout=5)
        names.append([model.name for model in page.models])
        token = page.next_page_token
        if not token:
            break
    assert names == [["m0", "m1"], ["m2", "m3"], ["m4"]]
    whole = await stub.ListModels(pb.ListModelsRequest(page_size=4_000_000), timeout=5)
    assert len(whole.models) == 5


async def test_pages_of_revisions(client: RegistryClient, raw: Dialer, model_directory: Path) -> None:
    expected: list[str] = []
    for number in range(3):
        (model_directory / "README.md").write_text(str(number))
        expected.insert(0, (await ingest(client, "m", model_directory)).model.revision.digest)
    stub = raw.stub(RegistryServiceStub)
    found: list[str] = []
    token = ""
    while True:
        page = await stub.ListRevisions(pb.ListRevisionsRequest(name="m", page_size=1, page_token=token), timeout=5)
        found += [revision.digest for revision in page.revisions]
        token = page.next_page_token
        if not token:
            break
    assert found == expected


@pytest.mark.parametrize("token", ["x", "!!!!", "bW9kZWxzOg==", "cmV2aXNpb25zOjE=", "/w==", "a" * 5000])
async def test_refuses_page_tokens_of_others(raw: Dialer, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.stub(RegistryServiceStub).ListModels(pb.ListModelsRequest(page_token=token), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("position", ["x", "-1", "9" * 30, "٣"])
async def test_refuses_page_tokens_of_no_revision(
    client: RegistryClient, raw: Dialer, model_directory: Path, position: str
) -> None:
    from helios.registry.pages import make_token  # noqa: PLC0415

    await ingest(client, "m", model_directory)
    request = pb.ListRevisionsRequest(name="m", page_token=make_token("revisions", position))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.stub(RegistryServiceStub).ListRevisions(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_policy_must_be_given(client: RegistryClient, raw: Dialer, model_directory: Path) -> None:
    await ingest(client, "m", model_directory)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.stub(RegistryServiceStub).UpdatePolicy(pb.UpdatePolicyRequest(name="m"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_watch_over_the_wire(parts: Parts, client: RegistryClient, model_directory: Path) -> None:
    async with aclosing(client.watch_models()) as events:
        assert await next_of(events) == ModelSnapshot(())
        model = (await ingest(client, "m", model_directory)).model
        assert await next_of(events) == ModelUpserted(model)
        await client.delete_model("m")
        assert await next_of(events) == ModelDeleted("m")
    async with asyncio.timeout(5):
        while parts.hub.watcher_count:
            await asyncio.sleep(0.01)


async def test_a_watcher_that_lags_too_far_behind_is_sent_away(
    parts: Parts, client: RegistryClient, model_directory: Path
) -> None:
    async with aclosing(client.watch_models()) as events:
        await next_of(events)
        change = ModelUpserted((await ingest(client, "m", model_directory)).model)
        assert await next_of(events) == change
        # More than its queue takes, before the loop can send one.
        for _ in range(300):
            parts.hub.publish(change)
        for _ in range(256):
            assert await next_of(events) == change
        with pytest.raises(Unavailable) as caught:
            await next_of(events)
    assert caught.value.reason == "WATCH_OVERFLOW"


async def test_a_client_that_goes_away_ends_its_ingest(parts: Parts, client: RegistryClient, tmp_path: Path) -> None:
    directory = tiny.write_big(tmp_path / "big", 512 << 20)
    async with aclosing(client.ingest("m", str(directory))) as events:
        async for event in events:
            if isinstance(event, IngestProgress) and event.phase == "store":
                break
    async with asyncio.timeout(10):
        while parts.files() or parts.ingester._flights:
            await asyncio.sleep(0.02)
    assert await client.list_models() == ()


async def test_a_deadline_ends_an_ingest(parts: Parts, client: RegistryClient, tmp_path: Path) -> None:
    directory = tiny.write_big(tmp_path / "big", 512 << 20)
    with pytest.raises(HeliosError):
        async for _ in client.ingest("m", str(directory), timeout_seconds=0.3):
            pass
    async with asyncio.timeout(10):
        while parts.files() or parts.ingester._flights:
            await asyncio.sleep(0.02)
    assert await client.list_models() == ()


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", "", "a//b", "./a"])
def test_a_manifest_with_a_bad_path_is_refused_where_it_is_read(path: str) -> None:
    """A storage agent that meets a hostile registry writes nothing outside its directory."""
    entry = pb.ManifestEntry(
        path=path,
        digest=pb.Digest(algorithm="sha256", hash="a" * 64, size_bytes=1),
        media_type="application/vnd.cncf.model.weight.v1.raw",
    )
    with pytest.raises(InvalidRequest) as caught:
        manifest_from_proto(pb.Manifest(entries=[entry]))
    assert caught.value.reason == "INVALID_MANIFEST"


def test_manifests_with_two_equal_paths_or_other_hashes_are_refused() -> None:
    def entry(path: str, algorithm: str = "sha256") -> pb.ManifestEntry:
        digest = pb.Digest(algorithm=algorithm, hash="a" * 64, size_bytes=1)
        return pb.ManifestEntry(path=path, digest=digest, media_type="application/vnd.cncf.model.weight.v1.raw")

    for entries in ([entry("a"), entry("a")], [entry("a"), entry("a/b")], [entry("a", "md5")], []):
        with pytest.raises(InvalidRequest):
            manifest_from_proto(pb.Manifest(entries=entries))
    assert isinstance(manifest_from_proto(pb.Manifest(entries=[entry("b"), entry("a")])), Manifest)
