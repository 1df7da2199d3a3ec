"""The journal of uploads: what a crash leaves of it is a journal of an earlier moment."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.registry.upload_journal import Part, Upload, UploadJournal, parse_journal

HASH = "ab" * 32
UPLOAD = Upload("s3://bucket/blobs", "sha256/ab/x", "upload-1", 8 << 20)


def write(journal: UploadJournal, parts: int) -> None:
    with journal.open(HASH) as file:
        file.begin(UPLOAD)
        for number in range(1, parts + 1):
            file.note(number, Part(f"{number:064x}", f'"tag-{number}"'))


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    assert journal.read(HASH) is None
    write(journal, 3)
    found = journal.read(HASH)
    assert found is not None
    assert (found.store, found.key, found.upload, found.part_bytes) == (
        UPLOAD.store,
        UPLOAD.key,
        UPLOAD.upload,
        UPLOAD.part_bytes,
    )
    assert found.parts == {number: Part(f"{number:064x}", f'"tag-{number}"') for number in (1, 2, 3)}
    assert journal.uploads() == {"upload-1"}


def test_beginning_anew_forgets_the_parts(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    write(journal, 3)
    write(journal, 1)
    found = journal.read(HASH)
    assert found is not None
    assert set(found.parts) == {1}


@given(cut=st.integers(0, 600))
def test_a_torn_end_costs_one_line(tmp_path_factory: object, cut: int) -> None:
    del tmp_path_factory
    lines = [
        b'{"store":"s3://b","key":"k","upload":"u","part_bytes":10}\n',
        *(b'{"part":%d,"sha256":"%064x","tag":"t%d"}\n' % (number, number, number) for number in range(1, 5)),
    ]
    content = b"".join(lines)[:cut]
    whole = content.count(b"\n")
    found = parse_journal(content)
    assert (found is None) == (whole == 0)
    assert found is None or sorted(found.parts) == list(range(1, whole))


@pytest.mark.parametrize("torn", [b'{"part":3,"sha', bytes(90)], ids=["half a line", "room without bytes"])
def test_what_is_noted_after_a_torn_end_is_read(tmp_path: Path, torn: bytes) -> None:
    journal = UploadJournal(tmp_path)
    write(journal, 2)
    with (tmp_path / f"{HASH}.jsonl").open("ab") as file:
        file.write(torn)
    with journal.open(HASH) as opened:
        opened.note(4, Part("4" * 64, '"tag-4"'))
    found = journal.read(HASH)
    assert found is not None
    assert set(found.parts) == {1, 2, 4}


@given(content=st.binary(max_size=200))
def test_nothing_breaks_it(content: bytes) -> None:
    parse_journal(content)


def test_says_what_nobody_works_on(tmp_path: Path) -> None:
    journal = UploadJournal(tmp_path / "uploads")
    write(journal, 1)
    now = datetime.now(UTC)
    assert [hash_ for hash_, _ in journal.stale(before=now + timedelta(seconds=5))] == [HASH]
    assert list(journal.stale(before=now - timedelta(minutes=5))) == []
    journal.remove(HASH)
    assert list(journal.stale(before=now + timedelta(seconds=5))) == []
