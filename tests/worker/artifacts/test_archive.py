"""A directory as one file: the same bytes for the same content, and nothing but plain files out of it."""

import io
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import Corrupted
from helios.worker.artifacts.archive import files_below, pack, unpack
from helios.worker.artifacts.shelf import Cancelled, CompileShelf
from helios.worker.replica.artifact_directory import PROVEN, mark_proven

NAMES = st.text("ab.-_é", min_size=1, max_size=4).filter(lambda name: name not in {".", ".."})
KEY = "a" * 64


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): (directory / path).read_bytes() for path, _ in files_below(directory)}


@given(files=st.dictionaries(st.tuples(NAMES, NAMES), st.binary(max_size=3000), max_size=6))
def test_what_is_packed_is_what_comes_out(
    tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, str], bytes]
) -> None:
    root = tmp_path_factory.mktemp("round")
    source = write(root / "source", {f"{parent}/{name}": data for (parent, name), data in files.items()})
    source.mkdir(exist_ok=True)
    pack(source, root / "x.tar", lambda _: True)
    (root / "target").mkdir()
    unpack(root / "x.tar", root / "target")
    assert contents(root / "target") == contents(source)


def test_the_same_content_is_the_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    files = {"z/1.so": b"code", "a.py": b"text", "m/deep/er": b""}
    first = write(tmp_path / "first", files)
    second = write(tmp_path / "elsewhere" / "second", dict(reversed(files.items())))
    for path, _ in files_below(second):
        os.utime(second / path, (1, 1))
        (second / path).chmod(0o700)
    pack(first, tmp_path / "1.tar", lambda _: True)
    pack(second, tmp_path / "2.tar", lambda _: True)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "1.tar").read_bytes()


def test_links_are_not_followed(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"plain": b"x"})
    (tmp_path / "secret").write_bytes(b"key")
    (source / "link").symlink_to(tmp_path / "secret")
    (source / "directory").symlink_to(tmp_path)
    pack(source, tmp_path / "x.tar", lambda _: True)
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames() == ["plain"]


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("/tmp/absolute", size=1),
        member("../outside", size=1),
        member("a/../../outside", size=1),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard", type=tarfile.LNKTYPE, linkname="plain"),
        member("device", type=tarfile.CHRTYPE),
        member("pipe", type=tarfile.FIFOTYPE),
        member("directory", type=tarfile.DIRTYPE),
        member(".", size=1),
    ],
    ids=lambda info: info.name,
)
def test_what_is_no_plain_file_below_is_refused(tmp_path: Path, info: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member("plain", size=1), io.BytesIO(b"x"))
        archive.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "target").mkdir()
    with pytest.raises(Corrupted):
        unpack(tmp_path / "x.tar", tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar", "target"}


@pytest.mark.parametrize("damage", [lambda data: data[:700], lambda data: b"\0" * 3 + data, lambda _: b"not a tar"])
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pack(write(tmp_path / "source", {"a": b"x" * 2000}), tmp_path / "x.tar", lambda _: True)
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    (tmp_path / "target").mkdir()
    with pytest.raises(Corrupted):
        unpack(tmp_path / "x.tar", tmp_path / "target")


def make_artifact(directory: Path, files: dict[str, bytes]) -> Path:
    pack(write(directory / "made", files), directory / "files.tar", lambda _: True)
    return directory


def test_a_directory_appears_whole_and_without_anybodys_mark(tmp_path: Path) -> None:
    shelf = CompileShelf(tmp_path / "compiled")
    files = make_artifact(tmp_path, {"cache/model": b"code", PROVEN: b""})
    state = shelf.install(KEY, files, threading.Event())
    assert contents(tmp_path / "compiled" / KEY) == {"cache/model": b"code"}
    assert shelf.state(KEY) == state
    mark_proven(tmp_path / "compiled" / KEY)
    write(tmp_path / "compiled" / KEY, {"cache/x.lock": b""})
    assert shelf.state(KEY) == state
    (tmp_path / "out").mkdir()
    packed = shelf.pack(KEY, tmp_path / "out")
    with tarfile.open(packed["files.tar"]) as archive:
        assert archive.getnames() == ["cache/model"]
    write(tmp_path / "compiled" / KEY, {"cache/model": b"kode"})
    assert shelf.state(KEY) != state


def test_an_installation_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    shelf = CompileShelf(tmp_path / "compiled")
    files = make_artifact(tmp_path, {"a": b"1"})
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        shelf.install(KEY, files, stop)
    with pytest.raises(Corrupted):
        shelf.install(KEY, tmp_path / "nowhere", threading.Event())
    assert list((tmp_path / "compiled").iterdir()) == []
    shelf.install(KEY, files, threading.Event())
    # What is there stays as it is.
    with pytest.raises(OSError, match=KEY):
        shelf.install(KEY, files, threading.Event())
    assert [path.name for path in (tmp_path / "compiled").iterdir()] == [KEY]


def test_tritons_groups_name_their_files_where_they_are_now(tmp_path: Path) -> None:
    manager = triton_manager(tmp_path / "elsewhere" / "triton" / "ABC")
    put = manager.put(b"cubin", "kernel.cubin")
    manager.put_group("kernel.json", {"kernel.cubin": put})
    files = make_artifact(tmp_path, {})
    (files / "files.tar").unlink()
    pack(tmp_path / "elsewhere", files / "files.tar", lambda path: path.suffix != ".lock")
    shelf = CompileShelf(tmp_path / "compiled")
    shelf.install(KEY, files, threading.Event())
    shutil.rmtree(tmp_path / "elsewhere")
    moved = triton_manager(tmp_path / "compiled" / KEY / "triton" / "ABC")
    found = moved.get_group("kernel.json")
    assert Path(found["kernel.cubin"]).read_bytes() == b"cubin"
    bad = make_artifact(tmp_path / "bad", {"__grp__x.json": b"[]"})
    with pytest.raises(Corrupted):
        shelf.install("b" * 64, bad, threading.Event())


def triton_manager(directory: Path) -> Any:
    """Triton's own keeper of files, on a directory."""
    cache = pytest.importorskip("triton.runtime.cache")
    manager = cache.FileCacheManager.__new__(cache.FileCacheManager)
    manager.cache_dir, manager.lock_path = str(directory), str(directory / "lock")
    directory.mkdir(parents=True, exist_ok=True)
    return manager


def test_what_a_killed_worker_left_is_swept(tmp_path: Path) -> None:
    shelf = CompileShelf(tmp_path)
    write(tmp_path, {"new-0123/half": b"x", f"{KEY}/whole": b"x"})
    shelf.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
