"""Archives as a stream: what the standard library writes is read the same, what it could be tricked with is refused."""

import io
import tarfile
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from helios.mesh.errors import InvalidRequest
from helios.registry.sources.tar_stream import TarReader

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
files = st.dictionaries(paths, st.binary(max_size=1500), max_size=4)


def write(contents: dict[str, bytes], format_: int, **more: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for path, content in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            for name, value in more.items():
                setattr(member, name, value)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def dribbling(archive: bytes, most: int) -> Callable[[int], bytes]:
    """Reads less than it is asked for."""
    stream = io.BytesIO(archive)
    return lambda count: stream.read(min(count, most))


def read(archive: bytes, most: int = 1 << 20) -> list[tuple[str, bytes]]:
    reader = TarReader(dribbling(archive, most), "m.tar")
    return [(member.path, b"".join(reader.content(700))) for member in reader.members()]


def read_by_the_library(archive: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as opened:
        found = []
        for member in opened:
            if member.isdir():
                continue
            content = opened.extractfile(member)
            assert content is not None
            found.append((member.name, content.read()))
        return found


@settings(deadline=None, max_examples=60)
@given(contents=files, format_=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), most=st.integers(1, 2000))
def test_what_the_library_writes_is_read_the_same(contents: dict[str, bytes], format_: int, most: int) -> None:
    assert read(write(contents, format_), most) == list(contents.items())


@settings(deadline=None, max_examples=300)
@given(
    contents=st.dictionaries(st.sampled_from(["a", "b/c", "d" * 130, "é"]), st.binary(max_size=600), max_size=3),
    format_=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    damage=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=3)), max_size=3),
    cut=st.none() | st.integers(0, 4000),
    is_resealed=st.booleans(),
)
def test_what_is_taken_the_library_reads_the_same(
    contents: dict[str, bytes],
    format_: int,
    damage: list[tuple[int, bytes]],
    cut: int | None,
    is_resealed: bool,
) -> None:
    archive = bytearray(write(contents, format_))
    for place, value in damage:
        archive[place : place + len(value)] = value
        if is_resealed and place + len(value) <= len(archive):
            # A hostile header has the right checksum.
            start = place // 512 * 512
            archive[start + 148 : start + 156] = b" " * 8
            archive[start + 148 : start + 156] = b"%06o\0 " % sum(archive[start : start + 512])
    taken = bytes(archive[:cut])
    try:
        found = read(taken)
    except InvalidRequest:
        return
    assert found == read_by_the_library(taken)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_directories_are_nothing_and_large_numbers_are_read(format_: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        directory = tarfile.TarInfo("d/")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        archive.addfile(tarfile.TarInfo("d/file"))
    assert read(buffer.getvalue()) == [("d/file", b"")]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "no plain file"),
        (tarfile.LNKTYPE, "no plain file"),
        (tarfile.CHRTYPE, "no plain file"),
        (tarfile.FIFOTYPE, "no plain file"),
        (tarfile.GNUTYPE_SPARSE, "no plain file"),
        (tarfile.CONTTYPE, "no plain file"),
        (b"M", "no plain file"),
    ],
)
def test_what_is_no_plain_file_is_refused(kind: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read(write({"x": b""}, tarfile.GNU_FORMAT, type=kind, linkname="/etc/passwd"))


def test_sparse_files_by_pax_are_refused() -> None:
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    with pytest.raises(InvalidRequest, match="no plain file"):
        read(write({"x": b"1\n0\n5\n"}, tarfile.PAX_FORMAT, pax_headers=sparse))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_that_would_fill_the_memory_is_refused_before_it_is_read(kind: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 40
    asked = 0

    def endless(count: int) -> bytes:
        nonlocal asked
        asked += count
        return header.tobuf(tarfile.GNU_FORMAT)[asked - count : asked] if asked <= 512 else b"x" * count

    with pytest.raises(InvalidRequest, match="a header of"):
        list(TarReader(endless, "m.tar").members())
    assert asked <= 512


def test_a_header_as_full_as_it_may_be_is_read() -> None:
    records = b"5 a=\n" * ((1 << 20) // 5 - 3) + b"11 path=ab\n"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    archive = header.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)
    assert read(archive + write({"x": b"content"}, tarfile.GNU_FORMAT)) == [("ab", b"content")]


def test_a_size_in_a_global_header_is_refused() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"size": "5"}) as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(InvalidRequest, match="global header"):
        read(buffer.getvalue())


def test_an_archive_that_is_cut_off_or_goes_on_is_refused() -> None:
    archive = write({"x": b"content"}, tarfile.GNU_FORMAT)
    for broken in (archive[:100], archive[:515], archive[:1024], archive[:1536], b"", archive + b"more"):
        with pytest.raises(InvalidRequest):
            read(broken)
