"""A directory as one file, the same bytes for the same content: names in order, no times, no owners, no links.

One file rather than many: a compiler leaves hundreds of small ones, and each blob costs the storage agent an fsync and
a row. What is unpacked came from another machine: nothing but plain files below the target is written.
"""

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final

from helios.mesh.errors import Corrupted

MAX_FILES: Final = 100_000
"""Ten times what a GPU's kernels of all batch sizes take."""

_MODE: Final = 0o644


def pack(directory: Path, target: Path, is_wanted: Callable[[PurePosixPath], bool]) -> None:
    """Writes the plain files below ``directory`` to a tar file; links and what is not wanted are left out. Blocks."""
    with tarfile.open(target, "x", format=tarfile.PAX_FORMAT) as archive:
        for path, _ in files_below(directory):
            if not is_wanted(path):
                continue
            member = tarfile.TarInfo(str(path))
            with (directory / path).open("rb") as file:
                member.size = os.fstat(file.fileno()).st_size
                member.mode = _MODE
                archive.addfile(member, file)


def unpack(source: Path, directory: Path, check: Callable[[], None] = lambda: None) -> None:
    """Writes the files of a tar file below ``directory``, which is empty. Blocks.

    Args:
        source: The file.
        directory: Where they go.
        check: Called between files; what it raises ends the work.

    Raises:
        Corrupted: It is no tar file, or holds something else than plain files with paths below it.
        OSError: The disk refuses.
    """
    if not source.is_file():
        raise Corrupted(f"the artifact has no file {source.name}")
    limit = source.stat().st_size
    try:
        with tarfile.open(source, "r:") as archive:
            for count, member in enumerate(archive):
                check()
                _write(archive, member, directory, limit)
                if count >= MAX_FILES:
                    raise Corrupted(f"an archive has more than {MAX_FILES} files")
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise Corrupted(f"an archive can't be read: {error}") from error


def files_below(directory: Path) -> list[tuple[PurePosixPath, os.stat_result]]:
    """Returns the plain files below a directory by path, with what is known of them; links are not followed."""
    found = []
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                # Somebody's temporary file.
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((PurePosixPath(path.relative_to(directory)), status))
    return sorted(found, key=lambda entry: entry[0].parts)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, directory: Path, limit: int) -> None:
    path = PurePosixPath(member.name)
    is_plain = member.type == tarfile.REGTYPE and not member.issparse()
    if not is_plain or path.is_absolute() or ".." in path.parts or not path.parts or "\0" in member.name:
        raise Corrupted(f"an archive holds something else than plain files: {member.name[:200]!r}")
    if member.size > limit:
        raise Corrupted("a file of an archive is larger than the archive")
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    with target.open("xb") as file:
        while data := source.read(1 << 20):
            file.write(data)
