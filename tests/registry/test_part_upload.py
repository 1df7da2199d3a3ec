"""Uploads in parts: whatever ends them and however often, what is completed is the file, and no part is sent twice."""

import hashlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.mesh.errors import Conflict, Unavailable
from helios.registry.manifest import Digest
from helios.registry.offload import Stop
from helios.registry.part_upload import MAX_PARTS, PartUploader, Unfinished, UploadGone, UploadLimits
from helios.registry.upload_journal import Upload, UploadJournal

KEY = "sha256/ab/abc"
URL = "s3://bucket/blobs"


@dataclass
class FakeParts:
    """A store's uploads in memory; the calls named in ``crashes`` (by their number, from 0) end the process instead."""

    crashes: set[int] = field(default_factory=set)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    call_count: int = 0
    begun_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def begin(self, key: str) -> str:
        self._call()
        name = f"upload-{len(self.uploads)}"
        self.uploads[name] = {}
        return name

    def put_part(self, upload: Upload, number: int, data: bytes, sha256: str) -> str:
        self._call()
        self._upload(upload)[number] = data
        self.sent.append(number)
        return f"{number}:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"

    def complete(self, upload: Upload, tags: Mapping[int, str]) -> None:
        self._call()
        parts = self._upload(upload)
        for number, tag in tags.items():
            assert tag == f"{number}:{hashlib.md5(parts[number], usedforsecurity=False).hexdigest()}"
        self.objects.setdefault(upload.key, b"".join(parts[number] for number in sorted(tags)))
        del self.uploads[upload.upload]

    def abort(self, upload: Upload) -> None:
        self.uploads.pop(upload.upload, None)

    def unfinished(self) -> Iterator[Unfinished]:
        return iter([Unfinished(KEY, name, self.begun_at) for name in self.uploads])

    def close(self) -> None:
        """Has nothing to close."""

    def _upload(self, upload: Upload) -> dict[int, bytes]:
        if upload.upload not in self.uploads:
            raise UploadGone("gone")
        return self.uploads[upload.upload]

    def _call(self) -> None:
        number, self.call_count = self.call_count, self.call_count + 1
        if number in self.crashes:
            raise Unavailable("the store is gone")


def uploader(parts: FakeParts, directory: Path, part_bytes: int = 10) -> PartUploader:
    # One at a time: which parts were sent is then the same in every run.
    return PartUploader(URL, parts, UploadJournal(directory / "uploads"), UploadLimits(part_bytes, 1))


def make_file(directory: Path, size_bytes: int, seed: int = 0) -> tuple[Path, Digest]:
    content = random.Random(seed).randbytes(size_bytes)
    path = directory / "file"
    path.write_bytes(content)
    return path, Digest(hashlib.sha256(content).hexdigest(), size_bytes)


@settings(max_examples=100)
@given(size_bytes=st.integers(1, 95), crashes=st.sets(st.integers(0, 25), max_size=8), part_bytes=st.integers(5, 20))
def test_crashes_cost_no_part_that_was_noted(size_bytes: int, crashes: set[int], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        path, digest = make_file(directory, size_bytes)
        parts = FakeParts(crashes)
        for attempt in range(len(crashes) + 1):
            # A new process: all it knows is the journal.
            try:
                uploader(parts, directory, part_bytes).upload(path, digest, KEY, lambda _: None, Stop())
                break
            except Unavailable:
                assert KEY not in parts.objects
                assert attempt < len(crashes)
        assert parts.objects[KEY] == path.read_bytes()
        assert len(parts.sent) == len(set(parts.sent)) == -(-size_bytes // part_bytes)
        assert list((directory / "uploads").iterdir()) == []


def test_progress_counts_each_byte_once(tmp_path: Path) -> None:
    path, digest = make_file(tmp_path, 55)
    parts = FakeParts({3})
    with pytest.raises(Unavailable):
        uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    counts: list[int] = []
    uploader(parts, tmp_path).upload(path, digest, KEY, counts.append, Stop())
    assert sum(counts) == 55


def test_a_file_that_is_another_is_not_completed(tmp_path: Path) -> None:
    path, digest = make_file(tmp_path, 55)
    path.write_bytes(b"another" * 8)
    parts = FakeParts()
    with pytest.raises(Conflict) as caught:
        uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    assert caught.value.reason == "SOURCE_CHANGED"
    assert (parts.objects, parts.uploads) == ({}, {})


def test_a_part_that_changed_since_is_sent_again(tmp_path: Path) -> None:
    path, _ = make_file(tmp_path, 55)
    parts = FakeParts({5})
    final = bytearray(path.read_bytes())
    final[12] ^= 1
    digest = Digest(hashlib.sha256(final).hexdigest(), 55)
    with pytest.raises(Unavailable):
        uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    path.write_bytes(final)
    uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    assert parts.objects[KEY] == final
    assert parts.sent.count(2) == 2


def test_an_upload_that_the_store_forgot_begins_anew(tmp_path: Path) -> None:
    path, digest = make_file(tmp_path, 55)
    parts = FakeParts({4})
    with pytest.raises(Unavailable):
        uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    parts.uploads.clear()
    with pytest.raises(UploadGone):
        uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    uploader(parts, tmp_path).upload(path, digest, KEY, lambda _: None, Stop())
    assert parts.objects[KEY] == path.read_bytes()


def test_sweeps_what_was_left_and_nothing_younger(tmp_path: Path) -> None:
    path, digest = make_file(tmp_path, 55)
    parts = FakeParts({4})
    sweeping = uploader(parts, tmp_path)
    with pytest.raises(Unavailable):
        sweeping.upload(path, digest, KEY, lambda _: None, Stop())
    parts.uploads["stray"] = {}
    now = datetime.now(UTC)
    assert sweeping.sweep(before=now - timedelta(hours=1), is_dry_run=False) == 0
    assert sweeping.sweep(before=now + timedelta(seconds=5), is_dry_run=True) == 2
    assert len(parts.uploads) == 2
    assert sweeping.sweep(before=now + timedelta(seconds=5), is_dry_run=False) == 2
    assert parts.uploads == {}
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_large_blob_has_large_parts() -> None:
    limits = UploadLimits(16 << 20, 4)
    assert limits.part_bytes_of(100 << 30) == 16 << 20
    for size_bytes in (1 << 40, 5 << 40, (5 << 40) + 1):
        part_bytes = limits.part_bytes_of(size_bytes)
        assert -(-size_bytes // part_bytes) <= MAX_PARTS
        assert part_bytes % (1 << 20) == 0
