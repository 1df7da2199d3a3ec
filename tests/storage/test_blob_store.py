"""The disk tier after crashes: whatever is found at start, what is kept is right and complete."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from helios.mesh.errors import DigestMismatch, PreconditionFailed, Unavailable, Unsupported
from helios.storage.blob_store import BlobStore
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import DirectorySource
from helios.storage.manifest import Manifest, make_manifest, manifest_digest
from helios.storage.sources import BlobLocation, Sources
from tests.storage.harness import digest_of, entry_of, files_below, make_shelf

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ONE, OTHER = b"one" * 1000, b"other" * 1000


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, scratch_path: Path) -> Path:
    """Of a tier on a disk, and of one in memory: all that follows is true of both."""
    return (tmp_path if request.param == "disk" else scratch_path) / "tier"


def tier(root: Path) -> DiskTier:
    return DiskTier(root, fetch_thread_count=1, is_link_allowed=False)


def manifest_of(**files: bytes) -> Manifest:
    entries = [entry_of(path, content) for path, content in sorted(files.items())]
    return make_manifest(manifest_digest(entries), entries)


async def fill(root: Path, manifest: Manifest, *contents: bytes) -> Path:
    """Makes a revision resident, and closes the tier again."""
    shelf = make_shelf(root.parent / "shelf")
    async with tier(root) as disk:
        for content in contents:
            shelf.put(content)
            await disk.fetch(DirectorySource(shelf.base), digest_of(content), lambda _: None)
        await disk.add_revision(manifest, NOW)
        return disk.view_path(manifest.revision)


async def test_residency_survives_a_restart(root: Path) -> None:
    manifest = manifest_of(a=ONE, b=OTHER)
    await fill(root, manifest, ONE, OTHER)
    async with tier(root) as disk:
        (resident,) = disk.inventory.revisions()
        assert resident.manifest == manifest
        assert resident.last_used_at == NOW
        assert disk.inventory.used_bytes == len(ONE) + len(OTHER)
        assert disk.inventory.strays() == []


async def test_sweeps_what_is_unfinished(root: Path) -> None:
    await fill(root, manifest_of(a=ONE), ONE)
    (root / "tmp" / "blob").write_bytes(b"half")
    (root / "tmp" / "view" / "deep").mkdir(parents=True)
    (root / "views" / ("0" * 64)).mkdir()
    async with tier(root) as disk:
        assert not list((root / "tmp").iterdir())
        assert [path.name for path in (root / "views").iterdir()] == [disk.inventory.revisions()[0].revision[7:]]


async def test_drops_a_blob_whose_size_differs_and_with_it_its_revision(root: Path) -> None:
    manifest = manifest_of(a=ONE, b=OTHER)
    await fill(root, manifest, ONE, OTHER)
    blob = root / "blobs" / "sha256" / digest_of(ONE).hash[:2] / digest_of(ONE).hash
    blob.chmod(0o644)
    os.truncate(blob, 5)
    async with tier(root) as disk:
        assert not blob.exists()
        assert disk.inventory.revisions() == []
        assert not list((root / "views").iterdir())
        assert disk.inventory.blobs() == [digest_of(OTHER)]


async def test_adopts_a_leftover_that_is_right_and_drops_one_that_is_not(root: Path) -> None:
    async with tier(root):
        pass
    for content, name in ((ONE, digest_of(ONE).hash), (b"wrong", digest_of(OTHER).hash), (OTHER, "not a hash")):
        path = root / "blobs" / "sha256" / name[:2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    async with tier(root) as disk:
        assert disk.inventory.blobs() == [digest_of(ONE)]
        assert files_below(root / "blobs") == {f"sha256/{digest_of(ONE).hash[:2]}/{digest_of(ONE).hash}"}
        assert disk.inventory.strays() == [digest_of(ONE)]
    async with tier(root) as disk:
        assert disk.inventory.blobs() == [digest_of(ONE)]


async def test_rebuilds_a_view_that_is_missing_or_altered(root: Path) -> None:
    view = await fill(root, manifest_of(a=ONE, b=OTHER), ONE, OTHER)
    (view / "a").unlink()
    (view / "a").write_bytes(b"planted")
    async with tier(root):
        assert (view / "a").read_bytes() == ONE
    for path in view.iterdir():
        path.unlink()
    view.rmdir()
    async with tier(root):
        assert (view / "b").read_bytes() == OTHER


async def test_a_damaged_index_is_rebuilt_from_the_blobs(root: Path) -> None:
    await fill(root, manifest_of(a=ONE), ONE)
    for path in root.glob("index.db*"):
        path.unlink()
    (root / "index.db").write_bytes(b"not a database" * 1000)
    async with tier(root) as disk:
        assert disk.inventory.blobs() == [digest_of(ONE)]
        assert disk.inventory.revisions() == []
        assert not list((root / "views").iterdir())


async def test_one_agent_has_a_root(root: Path) -> None:
    async with tier(root):
        with pytest.raises(PreconditionFailed) as raised:
            async with tier(root):
                pytest.fail("two agents on one root")
        assert raised.value.reason == "ROOT_IN_USE"
    async with tier(root):
        pass


def test_a_commit_of_other_bytes_leaves_nothing(root: Path) -> None:
    store = BlobStore(root)
    store.open()
    try:
        temporary = store.new_temporary()
        temporary.write_bytes(ONE)
        with pytest.raises(DigestMismatch):
            store.commit(temporary, digest_of(OTHER), digest_of(ONE).hash)
        assert files_below(root) == {"lock"}
    finally:
        store.close()


async def test_a_source_that_is_a_symbolic_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    shelf = make_shelf(tmp_path / "shelf")
    secret = tmp_path / "secret"
    secret.write_bytes(ONE)
    path = shelf.blob_path(digest_of(ONE))
    path.parent.mkdir(parents=True)
    path.symlink_to(secret)
    async with tier(root) as disk:
        with pytest.raises(Unavailable, match="can't be read"):
            await disk.fetch(DirectorySource(shelf.base), digest_of(ONE), lambda _: None)
        assert not files_below(root / "blobs")


def test_a_scheme_that_is_not_spoken_is_refused() -> None:
    with pytest.raises(Unsupported):
        Sources().open([BlobLocation("ftp://host/blobs")])
