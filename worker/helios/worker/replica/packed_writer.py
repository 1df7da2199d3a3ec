"""How an artifact of packed weights comes to its directory: written here, or brought from another node.

It appears whole, by one rename, or not at all; what is left by a crash goes with the next one of the name. One process
at a time makes an artifact of a name. Everything here blocks.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from helios.mesh.errors import Corrupted, DiskFull
from helios.worker.replica.artifact_directory import drop, hold_alone, is_at, share
from helios.worker.replica.packed_weights import (
    CHUNK_BYTES,
    MANIFEST,
    PAGE_BYTES,
    WEIGHTS,
    PackedInputs,
    PackedManifest,
    PackedMatrix,
    PlainTensor,
    read_manifest,
    verify,
)

_NEW: Final = "new-"
_READ_ONLY: Final = 0o444
# A cache does not take the disk's last tenth.
_FREE_RATIO: Final = 0.1


def has_room(root: str, wanted_bytes: int) -> bool:
    """Returns whether so much can be written and leaves the disk's last tenth; makes ``root``."""
    Path(root).mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(root)
    return disk.free - wanted_bytes >= disk.total * _FREE_RATIO


class ArtifactWriter:
    """Writes one artifact. A context manager: leaving it without ``publish`` removes what was written."""

    def __init__(self, root: str, inputs: PackedInputs) -> None:
        self._inputs = inputs
        self._root = root
        self._unfinished = _Unfinished(Path(root) / inputs.key)
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> Self:
        """Raises BlockingIOError where another process makes the same, or did a moment ago."""
        directory = self._unfinished.__enter__()
        self._file = (directory / WEIGHTS).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # On a full disk it fails once more: what it held back can't be written.
            self._file.close()
        finally:
            self._unfinished.__exit__(kind, error, trace)

    def append(self, data: memoryview) -> int:
        """Writes bytes to the beginning of a page; returns their offset."""
        if not has_room(self._root, data.nbytes):
            raise DiskFull(f"packed weights would take the last tenth of the disk of {self._root}")
        self._write(bytes(-self._offset % PAGE_BYTES))
        offset = self._offset
        for start in range(0, data.nbytes, CHUNK_BYTES):
            self._write(data[start : start + CHUNK_BYTES])
        return offset

    def publish(
        self,
        skeleton: str,
        tensors: tuple[PlainTensor, ...],
        matrices: tuple[PackedMatrix, ...],
        layouts: tuple[str, ...],
    ) -> Path:
        """Gives it its name; what had that name goes. Raises Corrupted where the file is not what was written."""
        self._write(bytes(-self._offset % PAGE_BYTES))
        return self._publish(
            PackedManifest(
                inputs=asdict(self._inputs),
                skeleton=skeleton,
                tensors=tensors,
                matrices=matrices,
                layouts=layouts,
                size_bytes=self._offset,
                sha256=self._digest.hexdigest(),
            )
        )

    def refuse(self, why: str) -> Path:
        """Leaves an artifact without weights, which says why."""
        os.ftruncate(self._file.fileno(), 0)
        return self._publish(PackedManifest(inputs=asdict(self._inputs), refusal=why))

    def _publish(self, manifest: PackedManifest) -> Path:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.fchmod(self._file.fileno(), _READ_ONLY)
        return self._unfinished.publish(manifest)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._offset += len(data)


def bring_in(root: str, key: str, files: Path, check: Callable[[], None] = lambda: None) -> Path:
    """Makes an artifact of what another node made; returns its directory.

    Its weights are linked where that can be, so that the node has their bytes once, else copied.

    Args:
        root: Where artifacts are.
        key: Its name; there is none of this name.
        files: Directory with its files, which nobody writes to.
        check: Called over and over; what it raises ends the work, and nothing is left.

    Raises:
        Corrupted: It is none of this name, or is damaged.
        DiskFull: A copy would take the disk's last tenth.
        OSError: The disk refuses, or another process makes the same.
    """
    manifest = read_manifest(files)
    try:
        is_named_right = PackedInputs(**manifest.inputs).key == key
    except TypeError:
        is_named_right = False
    if not is_named_right or manifest.refusal:
        raise Corrupted("packed weights from elsewhere are not what their name says")
    unfinished = _Unfinished(Path(root) / key)
    with unfinished as directory:
        # Of a tier that can't link, what is lent are symbolic links; of one in memory they lead to no name at all.
        source = files / WEIGHTS
        resolved = source.resolve()
        _place(resolved if resolved.exists() else source, directory / WEIGHTS, check)
        return unfinished.publish(manifest, check)


class _Unfinished:
    """A directory that gets an artifact's name when it is whole; leaving it before removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f"{_NEW}{path.name}")

    def __enter__(self) -> Path:
        self._new.parent.mkdir(parents=True, exist_ok=True)
        self._new.mkdir(exist_ok=True)
        lock = hold_alone(self._new)
        if lock is None:
            raise BlockingIOError(errno.EAGAIN, "another process makes it, or did a moment ago", str(self._new))
        self._lock = lock
        for left in self._new.iterdir():
            left.unlink()
        return self._new

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Once it has its final name, this one may be another process's.
        if is_at(self._new, self._lock):
            shutil.rmtree(self._new, ignore_errors=True)
        os.close(self._lock)

    def publish(self, manifest: PackedManifest, check: Callable[[], None] = lambda: None) -> Path:
        path = self._new / MANIFEST
        path.write_text(manifest.to_json(), encoding="utf-8")
        if not manifest.refusal:
            verify(self._new, check)
        for name in (path, self._new):
            _sync(name)
        drop(self._path)
        # Still in use, so that nobody tidies it away, but a start that wants it has no reason to wait.
        share(self._lock)
        self._new.rename(self._path)
        _sync(self._path.parent)
        return self._path


def _place(source: Path, target: Path, check: Callable[[], None]) -> None:
    if not source.is_file():
        raise Corrupted("packed weights from elsewhere have no weights")
    if _is_immutable(source) and not source.is_symlink():
        # Another file system, or another user's file: the copy says what is wrong, if anything is.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    if not has_room(str(target.parent), source.stat().st_size):
        raise DiskFull(f"packed weights would take the last tenth of the disk of {target.parent}")
    with source.open("rb") as file, target.open("xb", buffering=0) as copy:
        while data := file.read(CHUNK_BYTES):
            check()
            view = memoryview(data)
            while view:
                view = view[copy.write(view) :]
        os.fsync(copy.fileno())
        os.fchmod(copy.fileno(), _READ_ONLY)


def _is_immutable(path: Path) -> bool:
    status = path.stat()
    return stat.S_ISREG(status.st_mode) and not status.st_mode & 0o222


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
