"""Garbage collection: the plan, the collector on a registry, and the call."""

import asyncio
import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from helios.cli.models_gc import describe
from helios.mesh.errors import Conflict, InvalidRequest, PermissionDenied, PreconditionFailed, Unavailable
from helios.registry.collection import CollectionReport, StoredBlob, plan_collection
from helios.registry.object_store import ObjectStore, key_of
from helios.registry.ownership import Claim
from helios.registry.part_upload import UploadLimits
from tests.registry.support import Mesh, Parts, open_parts, serve

NOW = datetime(2026, 1, 1, tzinfo=UTC)
hashes = st.sampled_from([f"{number:064x}" for number in range(6)])


@given(
    stored=st.dictionaries(hashes, st.tuples(st.integers(0, 3), st.integers(-10, 100))),
    reachable=st.dictionaries(hashes, st.integers(0, 3)),
    grace=st.integers(0, 50),
)
def test_everything_is_in_one_part_of_the_plan(
    stored: dict[str, tuple[int, int]], reachable: dict[str, int], grace: int
) -> None:
    blobs = [StoredBlob(value, size, NOW - timedelta(seconds=age)) for value, (size, age) in stored.items()]
    plan = plan_collection(blobs, reachable, now=NOW, grace=timedelta(seconds=grace))
    doomed, young = {blob.hash for blob in plan.doomed}, {blob.hash for blob in plan.young}
    assert doomed | young == stored.keys() - reachable.keys()
    assert not doomed & young
    assert all(stored[value][1] >= grace for value in doomed)
    assert all(stored[value][1] < grace for value in young)
    assert plan.whole == {
        value: size for value, size in reachable.items() if value in stored and stored[value][0] == size
    }


async def stray(parts: Parts, content: bytes) -> str:
    """Stores a blob that nothing refers to, as a crashed ingest leaves it."""
    value = hashlib.sha256(content).hexdigest()
    path = parts.directory.path(value)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return value


async def test_collects_what_nothing_refers_to(parts: Parts, model_directory: Path) -> None:
    done = await parts.ingest("model", model_directory)
    kept = {entry.digest.hash for entry in (await parts.catalog.locate(done.model.revision.digest)).manifest.entries}
    value = await stray(parts, b"left by a crash")

    young = await parts.collector.collect()
    assert (young.removed_count, young.spared_count, young.spared_bytes) == (0, 1, 15)
    dry = await parts.collector.collect(is_dry_run=True, grace=timedelta(0))
    assert (dry.removed_count, dry.removed_bytes) == (1, 15)
    assert parts.directory.size(value) == 15

    report = await parts.collector.collect(grace=timedelta(0))
    assert report == CollectionReport(1, 15, 0, 0, len(kept), done.model.revision.size_bytes, 0, ())
    assert {blob.hash for blob in parts.directory.scan()} == kept


async def test_of_a_shared_store_goes_what_was_free_for_long(parts: Parts, model_directory: Path) -> None:
    parts.blobs.is_shared = True
    await parts.ingest("model", model_directory)
    for blob in parts.directory.scan():
        os.utime(parts.directory.path(blob.hash), (0, 0))
    # Another registry may be ingesting a model with the same files.
    assert await parts.catalog.delete_model("model") == 0
    first = await parts.collector.collect(grace=timedelta(seconds=0.2))
    assert first.removed_count == 0
    assert first.spared_count == len(list(parts.directory.scan())) > 0
    await asyncio.sleep(0.2)
    assert (await parts.collector.collect(grace=timedelta(seconds=0.2))).removed_count == first.spared_count


@given(age=st.integers(0, 100), free=st.integers(0, 100), grace=st.integers(0, 100))
def test_the_later_moment_counts(age: int, free: int, grace: int) -> None:
    blob = StoredBlob("a", 1, NOW - timedelta(seconds=age))
    since = {"a": NOW - timedelta(seconds=free)}
    plan = plan_collection([blob], {}, now=NOW, grace=timedelta(seconds=grace), free_since=since)
    assert (plan.doomed == (blob,)) == (min(age, free) >= grace)
    unseen = plan_collection([blob], {}, now=NOW, grace=timedelta(seconds=grace), free_since={})
    assert (unseen.doomed == (blob,)) == (grace == 0)


async def test_a_collector_whose_store_was_taken_over_deletes_nothing(parts: Parts, model_directory: Path) -> None:
    await parts.ingest("model", model_directory)
    await stray(parts, b"left by a crash")
    before = parts.files()
    claim = Claim(parts.directory, await parts.store.blobs.owner())
    claim.require(NOW)
    parts.blobs._require_ownership = lambda: claim.require(NOW)
    parts.directory.replace_owner(b'{"database": "another", "since": "today"}')
    with pytest.raises(PreconditionFailed, match="another"):
        await parts.collector.collect(grace=timedelta(0))
    assert await parts.catalog.delete_model("model") == 0
    assert before <= parts.files()


async def test_a_collector_whose_store_was_taken_over_leaves_its_uploads(parts: Parts) -> None:
    claim = Claim(parts.directory, await parts.store.blobs.owner())
    parts.blobs._require_ownership = lambda: claim.require(NOW)
    parts.directory.replace_owner(b'{"database": "another", "since": "today"}')
    upload = parts.state.blobs / "tmp" / "an upload of the new owner"
    upload.write_bytes(b"half")
    os.utime(upload, (0, 0))
    assert (await parts.collector.collect(is_dry_run=True)).unfinished_count == 1
    with pytest.raises(PreconditionFailed, match="another"):
        await parts.collector.collect()
    assert upload.exists()


async def test_says_what_is_missing(parts: Parts, model_directory: Path) -> None:
    done = await parts.ingest("model", model_directory)
    entry = (await parts.catalog.locate(done.model.revision.digest)).manifest.entries[0]
    parts.directory.path(entry.digest.hash).unlink()
    report = await parts.collector.collect()
    assert (report.missing, report.missing_count) == ((entry.digest.hash,), 1)


async def test_what_an_ingest_holds_stays_whatever_the_grace(parts: Parts, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"being ingested")
    with parts.blobs.hold() as hold:
        digest = (await hold.put(source, on_bytes=lambda _: None)).digest
        for is_dry_run in (True, False):
            report = await parts.collector.collect(is_dry_run=is_dry_run, grace=timedelta(0))
            assert (report.removed_count, report.spared_count) == (0, 1)
        assert parts.directory.size(digest.hash) == digest.size_bytes
    assert (await parts.collector.collect(grace=timedelta(0))).removed_count == 1


class Flaky(MemoryStore):
    """A bucket that can be asked to fail."""

    is_down = False

    def delete(self, paths: str | Sequence[str]) -> None:
        if self.is_down:
            raise Unavailable("down", reason="BLOB_STORE_UNAVAILABLE")
        super().delete(paths)


async def test_a_model_is_deleted_though_its_bucket_fails(tmp_path: Path, model_directory: Path) -> None:
    bucket = Flaky()
    store = ObjectStore(bucket, url="s3://bucket", options={}, limits=UploadLimits(5 << 20, 2))
    async with open_parts(tmp_path / "registry", blob_store=store) as parts:
        done = await parts.ingest("model", model_directory)
        located = await parts.catalog.locate(done.model.revision.digest)
        assert located.blob_store_url == "s3://bucket"
        entries = located.manifest.entries
        assert (
            bytes(bucket.get(key_of(entries[0].digest.hash)).bytes())
            == (model_directory / entries[0].path).read_bytes()
        )
        bucket.is_down = True
        assert await parts.catalog.delete_model("model") == 0
        with pytest.raises(Unavailable):
            await parts.collector.collect(grace=timedelta(0))
        bucket.is_down = False
        report = await parts.collector.collect(grace=timedelta(0))
        assert report.removed_bytes == done.model.revision.size_bytes
        assert list(store.scan()) == []


async def test_a_failed_ingest_leaves_nothing_in_a_bucket(tmp_path: Path, model_directory: Path) -> None:
    store = ObjectStore(MemoryStore(), url="s3://bucket", options={}, limits=UploadLimits(5 << 20, 2))
    async with open_parts(tmp_path / "registry", blob_store=store) as parts:
        (model_directory / "config.json").write_text("{}")
        with pytest.raises(InvalidRequest):
            await parts.ingest("model", model_directory)
        assert list(store.scan()) == []


async def test_people_collect_over_the_wire(parts: Parts, mesh: Mesh) -> None:
    await stray(parts, b"left by a crash")
    async with serve(parts, mesh) as address:
        async with mesh.client(address) as client:
            dry = await client.collect_blobs(is_dry_run=True, grace=timedelta(0))
            assert (dry.removed_count, dry.removed_bytes) == (1, 15)
            assert (await client.collect_blobs()).removed_count == 0
            assert (await client.collect_blobs(grace=timedelta(0))).removed_count == 1
            with pytest.raises(InvalidRequest):
                await client.collect_blobs(grace=timedelta(seconds=-1))
            async with parts.collector._running:
                with pytest.raises(Conflict) as caught:
                    await client.collect_blobs()
            assert caught.value.reason == "COLLECTION_RUNNING"
        async with mesh.client(address, "storage") as client:
            with pytest.raises(PermissionDenied):
                await client.collect_blobs()


def test_the_report_in_words() -> None:
    report = CollectionReport(2, 3 << 20, 1, 10, 4, 5 << 30, 1, ("ab" * 32,), 1)
    assert describe(report, is_dry_run=True) == [
        "2 blob(s), 3.0 MiB, and 1 unfinished upload(s) would be removed",
        "4 blob(s), 5.0 GiB, are in use; 1, 10 B, are young or being ingested",
        "1 blob(s) are MISSING (abababababab…): add their models again",
    ]
