"""Artifacts: what is taken, what stays, what goes, and that nothing is left of an upload that failed."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.api.registry.v1 import artifact_service_pb2 as pb
from helios.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from helios.mesh.errors import (
    DeadlineExceeded,
    DigestMismatch,
    DiskFull,
    HeliosError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    RevisionNotFound,
)
from helios.mesh.status import error_from_rpc
from helios.registry import metrics
from helios.registry.artifacts import MAX_INPUTS_BYTES, Artifact, NewArtifact, Use, plan_eviction
from helios.registry.client import ArtifactClient, Manifest
from helios.registry.manifest import MEDIA_ARTIFACT, MEDIA_WEIGHT, Digest, Entry
from helios.registry.settings import ArtifactSettings
from tests.registry import tiny
from tests.registry.support import Mesh, Parts, open_parts, serve

KIND = "compile-cache"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def inputs_of(number: int) -> str:
    return json.dumps({"flags": {"number": number}})


def key_of(inputs: str) -> str:
    return hashlib.sha256(inputs.encode()).hexdigest()


def new_artifact(revision: str, files: dict[str, bytes], number: int = 1, **changes: Any) -> NewArtifact:
    inputs = inputs_of(number)
    entries = [
        Entry(path, Digest(hashlib.sha256(data).hexdigest(), len(data)), MEDIA_ARTIFACT) for path, data in files.items()
    ]
    values: dict[str, Any] = {
        "kind": KIND,
        "key": key_of(inputs),
        "inputs": inputs,
        "revision": revision,
        "producer": "node-a",
        "manifest": Manifest.of(entries),
    }
    return NewArtifact(**(values | changes))


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def put(parts: Parts, revision: str, data: bytes, number: int = 1) -> Artifact:
    stored, _ = await parts.uploads.put(new_artifact(revision, {"a.tar": data}, number), stream(data))
    return stored


@pytest.fixture
async def revision(parts: Parts, model_directory: Path) -> str:
    return (await parts.ingest("m", model_directory)).model.revision.digest


async def test_an_artifact_is_stored_once_and_found_by_its_name(parts: Parts, mesh: Mesh, tmp_path: Path) -> None:
    model = (await parts.ingest("m", tiny.write_model(tmp_path / "model"))).model
    files = {"b/big.bin": tmp_path / "big", "a.txt": tmp_path / "small", "twin.txt": tmp_path / "small"}
    (tmp_path / "big").write_bytes(b"x" * (2 << 20) + b"y")
    (tmp_path / "small").write_bytes(b"small")
    async with serve(parts, mesh) as address, mesh.artifacts(address) as client:
        assert await client.find(KIND, key_of(inputs_of(1))) is None
        put: dict[str, Any] = {
            "kind": KIND,
            "inputs": inputs_of(1),
            "revision": model.revision.digest,
            "timeout_seconds": 20,
        }
        stored, is_new = await client.put(producer="node-a", files=files, **put)
        assert is_new
        assert (stored.size_bytes, stored.producer) == ((2 << 20) + 1 + 2 * 5, "node-a")
        # Another worker made it too: the first one stays, also where the bytes differ.
        (tmp_path / "other").write_bytes(b"other")
        again, is_new = await client.put(producer="node-b", files={"a.txt": tmp_path / "other"}, **put)
        assert (again, is_new) == (stored, False)
        assert await client.find(KIND, stored.key) == stored
        async with mesh.client(address) as registry:
            located = await registry.get_manifest(stored.digest)
        assert located.revision is None
        for entry in located.manifest.entries:
            assert parts.directory.path(entry.digest.hash).read_bytes() == files[entry.path].read_bytes()
    assert metrics.ARTIFACT_BYTES._value.get() == stored.size_bytes


async def test_uploads_of_one_name_at_once_leave_one(parts: Parts, revision: str) -> None:
    before = parts.files()
    first, second = await asyncio.gather(put(parts, revision, b"one" * 1000), put(parts, revision, b"two" * 1000))  # noqa: TID251
    assert first == second
    assert len(parts.files() - before) == 1


async def test_a_fleet_that_asks_at_once_gets_what_it_asks_for(
    parts: Parts, mesh: Mesh, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one's use is noted, for none was for a while, and models change meanwhile: SQLite has one writer."""
    monkeypatch.setattr("helios.registry.uploads.USE_STEP", timedelta(microseconds=-1))
    keys = [(await put(parts, revision, b"%d" % number, number)).key for number in range(4)]
    async with serve(parts, mesh) as address, mesh.artifacts(address) as client, asyncio.TaskGroup() as group:
        asked = [group.create_task(client.find(KIND, key)) for key in keys * 6]
        for number in range(6):
            group.create_task(parts.catalog.put_alias(f"alias{number}", "m"))
    found = [task.result() for task in asked]
    assert [one.key for one in found if one is not None] == keys * 6
    assert all(one is not None and one.used_at >= one.created_at for one in found)


async def test_an_artifact_goes_with_its_revision(parts: Parts, model_directory: Path, tmp_path: Path) -> None:
    other = (await parts.ingest("other", tiny.write_model(tmp_path / "other", seed=7))).model.revision.digest
    kept = await put(parts, other, b"kept", 2)
    before = parts.files()
    digest = (await parts.ingest("m", model_directory)).model.revision.digest
    await put(parts, digest, b"gone", 1)
    # The same bytes under two names are one blob.
    await put(parts, digest, b"kept", 3)
    await parts.catalog.delete_model("m")
    assert parts.files() == before
    assert await parts.uploads.store.list_page(revision="", after=("", ""), limit=9) == [kept]
    assert (await parts.catalog.locate(kept.digest)).manifest.size_bytes == 4


async def test_a_full_quota_drops_what_was_used_longest_ago(tmp_path: Path, model_directory: Path) -> None:
    settings = ArtifactSettings(quota_bytes=250, max_bytes=200)
    async with open_parts(tmp_path / "registry", artifacts=settings) as parts:
        revision = (await parts.ingest("m", model_directory)).model.revision.digest
        empty = parts.files()
        old, new = await put(parts, revision, b"1" * 100, 1), await put(parts, revision, b"2" * 100, 2)
        # Used again, later than the other one.
        await parts.uploads.use(KIND, old.key, new.created_at + timedelta(hours=1))
        third = await put(parts, revision, b"3" * 100, 3)
        left = await parts.uploads.store.list_page(revision=revision, after=("", ""), limit=9)
        assert {one.key for one in left} == {old.key, third.key}
        assert len(parts.files() - empty) == 2
        with pytest.raises(QuotaExceeded) as refused:
            await put(parts, revision, b"4" * 201, 4)
        assert refused.value.reason == "ARTIFACT_TOO_LARGE"


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ((b"123", b"45"), InvalidRequest),
        ((b"12345", b"6789"), InvalidRequest),
        ((b"12345678",), None),
        ((b"1234", b"", b"5678"), InvalidRequest),
        ((b"12345679",), DigestMismatch),
        ((), InvalidRequest),
    ],
)
async def test_an_upload_is_all_or_nothing(
    parts: Parts, revision: str, chunks: tuple[bytes, ...], error: type[HeliosError] | None
) -> None:
    before = parts.files()
    new = new_artifact(revision, {"a": b"1234567", "b": b"8"})
    if error is None:
        await parts.uploads.put(new, stream(*chunks))
        assert len(parts.files() - before) == 2
        return
    with pytest.raises(error):
        await parts.uploads.put(new, stream(*chunks))
    assert parts.files() == before
    assert await parts.uploads.store.find(KIND, new.key) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "0" * 64},
        {"key": "not-a-key"},
        {"kind": "../x"},
        {"kind": ""},
        {"inputs": "[]", "key": key_of("[]")},
        {"inputs": "{", "key": key_of("{")},
        {"inputs": "[" * 5000, "key": key_of("[" * 5000)},
        {"inputs": " " * MAX_INPUTS_BYTES + "{}", "key": key_of(" " * MAX_INPUTS_BYTES + "{}")},
        {"producer": "x" * 201},
        {"manifest": Manifest.of([Entry("a", Digest("0" * 64, 1), MEDIA_WEIGHT)])},
    ],
)
def test_what_is_not_what_its_key_says_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        new_artifact("sha256:" + "0" * 64, {"a": b"x"}, **changes).check()
    assert refused.value.reason == "INVALID_ARTIFACT"


async def test_an_artifact_of_no_revision_is_refused(parts: Parts) -> None:
    with pytest.raises(RevisionNotFound):
        await put(parts, "sha256:" + "0" * 64, b"x")


async def test_a_revision_that_goes_during_the_upload_takes_it_with_it(parts: Parts, revision: str) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"12"
        await parts.catalog.delete_model("m")
        yield b"34"

    with pytest.raises(RevisionNotFound):
        await parts.uploads.put(new_artifact(revision, {"a": b"1234"}), slow())
    assert parts.files() == set()


async def test_an_upload_that_breaks_off_or_hangs_leaves_nothing(tmp_path: Path, model_directory: Path) -> None:
    settings = ArtifactSettings(upload_seconds=0.2, max_concurrent=1)
    async with open_parts(tmp_path / "registry", artifacts=settings) as parts:
        revision = (await parts.ingest("m", model_directory)).model.revision.digest
        before = parts.files()
        is_reading = asyncio.Event()

        async def hang() -> AsyncIterator[bytes]:
            yield b"12"
            is_reading.set()
            await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(parts.uploads.put(new_artifact(revision, {"a": b"1234"}), hang()))
            await is_reading.wait()
            with pytest.raises(Overloaded):
                await put(parts, revision, b"other", 2)
            task.cancel()
        assert parts.files() == before
        with pytest.raises(DeadlineExceeded):
            await parts.uploads.put(new_artifact(revision, {"a": b"1234"}), hang())
        assert parts.files() == before
        await put(parts, revision, b"other", 2)


async def test_a_disk_that_is_too_full_is_said_before_a_byte_is_read(tmp_path: Path, model_directory: Path) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    async with open_parts(tmp_path / "registry") as parts:
        revision = (await parts.ingest("m", model_directory)).model.revision.digest
    async with open_parts(tmp_path / "registry", reserve_bytes=1 << 60) as parts:
        with pytest.raises(DiskFull):
            await parts.uploads.put(new_artifact(revision, {"a": b"1234"}), never())


async def test_artifacts_outlive_a_restart_and_what_a_crash_left_does_not(
    tmp_path: Path, model_directory: Path
) -> None:
    async with open_parts(tmp_path / "registry") as parts:
        revision = (await parts.ingest("m", model_directory)).model.revision.digest
        stored = await put(parts, revision, b"kept")
        stray = parts.directory.path("f" * 64)
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_bytes(b"left by a crash")
    async with open_parts(tmp_path / "registry") as parts:
        assert await parts.uploads.store.get(KIND, stored.key) == stored
        assert (await parts.catalog.locate(stored.digest)).manifest.size_bytes == 4
        assert not stray.exists()


async def test_deleting_is_idempotent_and_hits_only_what_is_meant(parts: Parts, revision: str) -> None:
    empty = parts.files()
    stored = await put(parts, revision, b"12345")
    assert await parts.uploads.delete(KIND, stored.key, digest="sha256:" + "0" * 64) == 0
    assert await parts.uploads.store.find(KIND, stored.key) == stored
    assert await parts.uploads.delete(KIND, stored.key, digest=stored.digest) == 5
    assert await parts.uploads.delete(KIND, stored.key) == 0
    assert parts.files() == empty
    with pytest.raises(NotFound):
        await parts.uploads.store.get(KIND, stored.key)


async def test_pages_have_all_artifacts_once(parts: Parts, mesh: Mesh, revision: str) -> None:
    stored = [await put(parts, revision, str(number).encode(), number) for number in range(5)]
    async with serve(parts, mesh) as address, mesh.dialer(address, "admin-edge") as dialer:
        stub = dialer.stub(ArtifactServiceStub)
        found, token = [], ""
        while True:
            request = pb.ListArtifactsRequest(revision=revision, page_size=2, page_token=token)
            page = await stub.ListArtifacts(request, timeout=5)
            found += [one.key for one in page.artifacts]
            token = page.next_page_token
            if not token:
                break
        assert found == sorted(one.key for one in stored)
        request = pb.ListArtifactsRequest(page_token="nonsense")
        with refused(InvalidRequest):
            await stub.ListArtifacts(request, timeout=5)
        none = await stub.ListArtifacts(pb.ListArtifactsRequest(revision="sha256:" + "0" * 64), timeout=5)
        assert not none.artifacts


async def test_only_workers_publish_and_only_they_and_people_are_let_in(
    parts: Parts, mesh: Mesh, revision: str
) -> None:
    stored = await put(parts, revision, b"x")
    before = await parts.uploads.store.get(KIND, stored.key)
    async with serve(parts, mesh) as address:
        async with mesh.artifacts(address, "admin-edge") as person:
            assert (await person.list_artifacts(revision=revision))[0] == stored
            with pytest.raises(PermissionDenied):
                await publish(person, revision, model_file=__file__)
            assert (await person.find(KIND, stored.key)) == before
        for component in ("storage", "proxy", "edge"):
            async with mesh.artifacts(address, component) as stranger:
                with pytest.raises(PermissionDenied):
                    await stranger.find(KIND, stored.key)
        async with mesh.artifacts(address, "worker") as worker:
            with pytest.raises(PermissionDenied):
                await worker.delete(KIND, stored.key, digest="")
            assert await worker.delete(KIND, stored.key, digest=stored.digest) == 1


async def publish(client: ArtifactClient, revision: str, *, model_file: str) -> None:
    files = {"a": Path(model_file)}
    await client.put(kind=KIND, inputs=inputs_of(9), revision=revision, producer="x", files=files, timeout_seconds=10)


async def test_a_stream_without_a_header_is_refused(parts: Parts, mesh: Mesh) -> None:
    async def requests() -> AsyncIterator[pb.PutArtifactRequest]:
        yield pb.PutArtifactRequest(data=b"x")

    async with serve(parts, mesh) as address, mesh.dialer(address, "worker") as dialer:
        with refused(InvalidRequest):
            await dialer.stub(ArtifactServiceStub).PutArtifact(requests(), timeout=5)


@contextlib.contextmanager
def refused(kind: type[HeliosError]) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        yield
    assert isinstance(error_from_rpc(raised.value), kind)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20),
    needed=st.integers(0, 100),
    slack=st.integers(0, 200),
    count=st.integers(1, 20),
)
def test_eviction_makes_room_with_the_oldest_and_takes_no_more(
    sizes: list[tuple[int, int]], needed: int, slack: int, count: int
) -> None:
    uses = [Use(KIND, str(number), size, EPOCH + timedelta(days=age)) for number, (size, age) in enumerate(sizes)]
    quota = needed + slack
    going = plan_eviction(uses, needed_bytes=needed, quota_bytes=quota, max_count=count)
    gone = [use for use in uses if (use.kind, use.key) in going]
    left = [use for use in uses if use not in gone]
    assert sum(use.size_bytes for use in left) + needed <= quota
    assert len(left) < count
    assert all(old.used_at <= young.used_at for old in gone for young in left)
    if gone:
        last = max(gone, key=lambda use: (use.used_at, use.kind, use.key))
        is_too_much = sum(use.size_bytes for use in left) + last.size_bytes + needed > quota
        assert is_too_much or len(left) + 1 == count
