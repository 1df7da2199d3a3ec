"""Manifests: what is refused, and that both components mean the same digest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import DigestMismatch, InvalidRequest
from helios.registry import manifest as registry
from helios.storage.manifest import Digest, ManifestEntry, check_path, make_manifest, manifest_digest

HASH = "0123456789abcdef" * 4


def entry(path: str, hash_: str = HASH, size_bytes: int = 1) -> ManifestEntry:
    return ManifestEntry(path, Digest(hash_, size_bytes), registry.MEDIA_WEIGHT)


def make(*entries: ManifestEntry) -> None:
    listed = sorted(entries, key=lambda e: e.path)
    make_manifest(manifest_digest(listed), listed)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry("a"), entry("a")],
        [entry("a"), entry("a/b")],
        [entry("a/b/c"), entry("a/b")],
        [entry("a", size_bytes=1), entry("b", size_bytes=2)],
        [entry("a", size_bytes=-1)],
        [entry("a", "0" * 63)],
        [entry("a", "../" + "0" * 61)],
        [entry("a", HASH.upper())],
        [entry(f"{number}") for number in range(10_001)],
    ],
    ids=["empty", "twice", "file and directory", "nested", "two sizes", "negative", "short", "path", "case", "many"],
)
def test_refuses(entries: list[ManifestEntry]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        make(*entries)
    assert raised.value.reason == "INVALID_MANIFEST"


def test_refuses_the_manifest_of_another_revision() -> None:
    with pytest.raises(DigestMismatch):
        make_manifest("sha256:" + "0" * 64, [entry("a")])


@pytest.mark.parametrize(
    "revision", ["", "sha256:", "sha512:" + HASH, HASH, "sha256:" + HASH + "0", f"sha256:{HASH}\n"]
)
def test_refuses_what_is_no_revision(revision: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        make_manifest(revision, [entry("a")])
    assert raised.value.reason == "INVALID_REVISION"


@given(st.text(st.sampled_from("ab/.\\\0\n é"), max_size=12))
def test_an_accepted_path_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except InvalidRequest:
        return
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/"))
    assert "\0" not in path


@given(
    st.dictionaries(
        st.text(st.sampled_from("abé. _"), min_size=1, max_size=8).filter(lambda path: path not in {".", ".."}),
        st.tuples(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(0, 1 << 40)),
        min_size=1,
        max_size=4,
    )
)
def test_storage_and_registry_name_a_revision_alike(files: dict[str, tuple[str, int]]) -> None:
    ours = [entry(path, hash_, size) for path, (hash_, size) in sorted(files.items())]
    theirs = registry.Manifest.of(
        registry.Entry(e.path, registry.Digest(e.digest.hash, e.digest.size_bytes), e.media_type) for e in ours
    )
    assert manifest_digest(ours) == theirs.digest()
