"""Notes of unfinished uploads, which end no push; and a blob whose target wants chunks that no memory bears."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from helios.registry.manifest import Digest
from helios.registry.push.journal import PushJournal
from helios.registry.push.target import OciTarget, Upload
from helios.registry.push.upload import BlobUpload
from helios.registry.sources.web import Body

CHUNK = 1_000
CONTENT = bytes(range(256)) * 16
BLOB = Digest("ab" * 32, len(CONTENT))


def open_journal(directory: Path, keep_seconds: float = 3600) -> PushJournal:
    journal = PushJournal(directory, keep_seconds=keep_seconds)
    journal.open()
    return journal


class Target(OciTarget):
    """Takes what is sent; notes how it came."""

    def __init__(self, min_chunk_bytes: int) -> None:
        self.min_chunk_bytes = min_chunk_bytes
        self.chunks: list[int] = []
        self.content = b""
        self.is_streamed = False

    @property
    def name(self) -> str:
        return "host/repository"

    async def begin(self, digest: Digest, mount: str) -> Upload | None:
        return Upload("place", 0, self.min_chunk_bytes)

    async def send(self, upload: Upload, chunk: Body, length: int) -> Upload:
        self._take(chunk)
        self.chunks.append(length)
        return Upload("place", upload.offset + length, self.min_chunk_bytes)

    async def finish(self, upload: Upload, digest: Digest, rest: Body | None, length: int) -> None:
        self._take(rest)

    def _take(self, body: Body | None) -> None:
        if callable(body):
            with body() as file:
                self.is_streamed = isinstance(file, io.BufferedReader)
                self.content += file.read()


async def send(target: Target, journal: PushJournal, directory: Path) -> int:
    path = directory / "blob"
    path.write_bytes(CONTENT)

    def open_blob() -> BinaryIO:
        return path.open("rb")

    upload = BlobUpload(target, BLOB, open_blob, journal, chunk_bytes=CHUNK, on_bytes=lambda _: None)
    return await upload.run("")


async def test_a_least_chunk_is_kept_and_one_beyond_memory_becomes_one_piece(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "pushes")
    patient, greedy = Target(3 * CHUNK), Target(65 << 20)
    for target in (patient, greedy):
        assert await send(target, journal, tmp_path) == len(CONTENT)
        assert target.content == CONTENT
    assert patient.chunks == [3 * CHUNK, len(CONTENT) - 3 * CHUNK]
    assert greedy.chunks == []
    assert greedy.is_streamed


async def test_a_disk_that_takes_no_notes_ends_no_push(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "pushes")
    # What stands where the directory was lets nobody write, whoever runs this.
    (tmp_path / "pushes").rmdir()
    (tmp_path / "pushes").write_bytes(b"")
    target = Target(0)
    assert await send(target, journal, tmp_path) == len(CONTENT)
    assert (target.content, len(target.chunks)) == (CONTENT, 5)


def test_what_is_too_old_is_forgotten_while_the_registry_runs(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "pushes")
    journal.note("host/old", BLOB, "there")
    (old,) = (tmp_path / "pushes").iterdir()
    os.utime(old, (0, 0))
    journal.note("host/new", BLOB, "here")
    journal.tidy()
    assert (journal.recall("host/old", BLOB), journal.recall("host/new", BLOB)) == ("", "here")
