"""Manifests: paths that can't leave a directory, one canonical form, one digest."""

import json
from pathlib import PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest
from helios.registry.manifest import MEDIA_CONFIG, MEDIA_WEIGHT, Digest, Entry, Manifest, check_path, check_paths

A, B = Digest("a" * 64, 10), Digest("b" * 64, 20)


def entry(path: str, digest: Digest = A) -> Entry:
    return Entry(path, digest, MEDIA_CONFIG)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd", "../x", "a/../b", "a/..", "..", ".", "./a", "a/./b", "a//b", "a/", "a\\b", "a\0b",
        "a\nb", "a\x7f", "\ud800", "x" * 256, "/".join(["d"] * 600),
    ],
)  # fmt: skip
def test_refuses_paths(path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        entry(path)
    assert caught.value.reason == "INVALID_MANIFEST"


@given(st.text(alphabet="ab./\\\0 ~é", max_size=12))
@example("a/../..")
def test_a_path_stays_below_its_directory(path: str) -> None:
    try:
        check_path(path)
    except InvalidRequest:
        return
    parts = PurePosixPath("/root", path).parts
    assert parts[:2] == ("/", "root")
    assert len(parts) > 2
    assert ".." not in parts
    assert str(PurePosixPath(path)) == path


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"], ["x/y", "z", "x"]])
def test_refuses_paths_that_clash(paths: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_paths(paths)


def test_takes_neighbours() -> None:
    check_paths(["a", "ab", "b/a", "b/b", "a.b"])


@given(st.lists(st.sampled_from(["a", "b", "c/d", "c/e", "f.g"]), unique=True, min_size=1))
def test_the_digest_does_not_depend_on_order(paths: list[str]) -> None:
    forward = Manifest.of(entry(path) for path in paths)
    assert forward.digest() == Manifest.of(entry(path) for path in reversed(paths)).digest()


def test_the_digest_depends_on_everything() -> None:
    base = Manifest.of([entry("a")])
    others = [
        Manifest.of([entry("b")]),
        Manifest.of([entry("a", B)]),
        Manifest.of([entry("a", Digest("a" * 64, 11))]),
        Manifest.of([Entry("a", A, MEDIA_WEIGHT)]),
        Manifest.of([entry("a"), entry("b")]),
    ]
    assert len({manifest.digest() for manifest in [base, *others]}) == 6


def test_the_canonical_form_never_changes() -> None:
    """A change here renames every revision in every registry."""
    manifest = Manifest.of([entry("config.json"), Entry("model.safetensors", B, MEDIA_WEIGHT)])
    assert manifest.digest() == "sha256:a40ff74cf4456b87bfa3b770e8144e35524aa53abab8fb093e7cb98d88e3f1eb"
    document = json.loads(manifest.canonical_json())
    assert document["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert [layer["annotations"]["org.cncf.model.filepath"] for layer in document["layers"]] == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("hash_", "size"), [("A" * 64, 1), ("a" * 63, 1), ("a" * 64 + "\n", 1), ("a" * 64, -1), ("a" * 64, 1 << 60)]
)
def test_refuses_digests(hash_: str, size: int) -> None:
    with pytest.raises(InvalidRequest):
        Digest(hash_, size)


def test_refuses_an_empty_manifest_and_unsorted_entries() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        Manifest(())
    with pytest.raises(InvalidRequest, match="sorted"):
        Manifest((entry("b"), entry("a")))
    with pytest.raises(InvalidRequest, match="16 TiB"):
        Manifest.of([entry("a", Digest("a" * 64, 10 << 40)), entry("b", Digest("b" * 64, 10 << 40))])
