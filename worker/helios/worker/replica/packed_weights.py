"""Weights as one engine wants them on one kind of machine: files that a replica maps instead of making its own copy.

An ordinary load copies the checkpoint into the engine's tensors, which are fused and then packed for the processor. All
of that is private memory, the same in every replica of the model, and made anew by each. An artifact holds the result:
a directory named by the digest of all that it depends on (``PackedInputs``), with

    manifest.json   what lies where in the other file, and what it was made from
    weights.bin     the tensors, each at the beginning of a page
    verified.json   inode, size and time of the file whose digest was checked

It can always be made again from the revision, so it is deleted freely, and whatever is wrong with it means an ordinary
load. A digest takes longer to compute than the load that it would protect (0.2 s for 270 MB, and it would read all of
the file): so it is computed when an artifact is made, from the bytes that lie under its name, and a start only looks
whether the file is still that one. Files are read-only; blobs of the storage agent are believed in the same way.

A model that can't be had like this leaves an artifact without weights, which says why, so that nobody tries again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from helios.mesh.errors import Corrupted, DiskFull, Unsupported
from helios.worker.replica.compile_cache import CacheDirectory, is_at, set_aside, use_existing

# Grows when what an artifact means changes, or what can be had as one.
_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.bin"
_VERIFIED: Final = "verified.json"
_NEW: Final = "new-"
PAGE_BYTES: Final = 4096
"""Tensors begin at pages, so that none shares its last one with a neighbour that is written to."""
_CHUNK_BYTES: Final = 8 << 20
# Of a range that is asked for in advance the kernel reads this much for sure, and drops the rest without a word: it is
# the usual `read_ahead_kb` of a disk. Source: force_page_cache_ra in linux/mm/readahead.c.
_READ_AHEAD_BYTES: Final = 128 << 10
# What is in memory is there in large pieces, which were read together.
_LOOK_BYTES: Final = 2 << 20
# A cache does not take the disk's last tenth.
_FREE_RATIO: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInputs:
    """What packed weights depend on.

    Attributes:
        revision: Digest of the model's revision.
        flags: The engine's arguments that decide which tensors a model has, parallel layout included; JSON values.
        engine_version: Of vLLM.
        torch_version: Of torch, with its build, and so of the library that packs.
        driver: Version of the device's driver and of its runtime; empty on a CPU.
        architecture: What computes with them: a GPU's name and capability, or a processor's instruction sets.
    """

    revision: str
    flags: Mapping[str, Any]
    engine_version: str
    torch_version: str
    driver: str
    architecture: str

    @property
    def key(self) -> str:
        """Their digest: 64 hexadecimal digits, the artifact's name. The order of flags is nothing."""
        document = {"packed-weights": _VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTensor:
    """A parameter or buffer as the engine's module holds it when a checkpoint is loaded. Sizes and strides in items."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A layer's matrix in the form that products are computed from. ``layout`` numbers ``PackedManifest.layouts``."""

    layer: str
    dtype: str
    shape: tuple[int, ...]
    layout: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedManifest:
    """What an artifact holds.

    Attributes:
        inputs: What it was made from and for, in words.
        skeleton: Digest of names, shapes, types and strides of the model that the tensors belong to.
        tensors: What is assigned as it is.
        matrices: What is packed.
        layouts: Descriptions of packed forms, in the words of the library that made them; base64.
        size_bytes: Of the file with the weights.
        sha256: Of the file with the weights.
        refusal: Why there are no weights; empty where there are.
    """

    inputs: Mapping[str, Any]
    skeleton: str = ""
    tensors: tuple[PlainTensor, ...] = ()
    matrices: tuple[PackedMatrix, ...] = ()
    layouts: tuple[str, ...] = ()
    size_bytes: int = 0
    sha256: str = ""
    refusal: str = ""

    def to_json(self) -> str:
        """Returns it as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what ``to_json`` wrote. Raises Corrupted for anything else, and where something lies outside."""
        try:
            values = json.loads(text)
            for name, kind in (("tensors", PlainTensor), ("matrices", PackedMatrix)):
                values[name] = tuple(kind(**_with_tuples(entry)) for entry in values[name])
            values["layouts"] = tuple(values["layouts"])
            manifest = cls(**values)
            pieces: list[PlainTensor | PackedMatrix] = [*manifest.tensors, *manifest.matrices]
            is_inside = all(0 <= piece.offset <= manifest.size_bytes - piece.size_bytes for piece in pieces)
            is_known = all(0 <= matrix.layout < len(manifest.layouts) for matrix in manifest.matrices)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupted(f"not a manifest of packed weights: {error}") from error
        if not is_inside or not is_known:
            raise Corrupted("a manifest of packed weights names what is not there")
        return manifest


def find(root: str, inputs: PackedInputs) -> CacheDirectory | None:
    """Takes the artifact for these inputs into use, or returns None where there is none.

    Raises:
        Unsupported: There will not be one, because the model can't be had like this.
        Corrupted: There is one that is not what was verified.
    """
    taken = use_existing(Path(root) / inputs.key)
    if taken is None:
        return None
    try:
        _check(taken.path)
    except BaseException:
        taken.release()
        raise
    return taken


def read_ahead(directory: Path) -> None:
    """Has the kernel read what is not in memory of an artifact's weights, while the engine is made.

    Waits for nothing but room in the disk's queue. Raises OSError where the file can't be opened.
    """
    with (directory / WEIGHTS).open("rb", buffering=0) as file:
        descriptor = file.fileno()
        for start in range(0, os.fstat(descriptor).st_size, _LOOK_BYTES):
            if not _is_in_memory(descriptor, start):
                for offset in range(start, start + _LOOK_BYTES, _READ_AHEAD_BYTES):
                    os.posix_fadvise(descriptor, offset, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def read_manifest(directory: Path) -> PackedManifest:
    """Reads an artifact's manifest. Raises Corrupted."""
    try:
        return PackedManifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Corrupted(f"a manifest of packed weights can't be read: {error}") from error


def verify(directory: Path) -> None:
    """Computes the digest of an artifact's weights and remembers the file that has it. Raises Corrupted.

    For whoever brings an artifact to the node; it blocks as long as the file takes to read.
    """
    manifest = read_manifest(directory)
    digest = hashlib.sha256()
    with (directory / WEIGHTS).open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != manifest.sha256:
        raise Corrupted("packed weights are not those of their manifest")
    (directory / _VERIFIED).write_text(json.dumps(identity), encoding="utf-8")


def drop(root: str, inputs: PackedInputs) -> None:
    """Removes the artifact for these inputs. What is mapped of it stays readable for those who have it."""
    with contextlib.suppress(FileNotFoundError):
        # Who tidies may be at it already.
        shutil.rmtree(set_aside(Path(root) / inputs.key), ignore_errors=True)


def has_room(root: str, wanted_bytes: int) -> bool:
    """Returns whether so much can be written and leaves the disk's last tenth; makes ``root``."""
    Path(root).mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(root)
    return disk.free - wanted_bytes >= disk.total * _FREE_RATIO


class ArtifactWriter:
    """Writes one artifact. It appears whole, by one rename, or not at all; what is left by a crash goes with the next.

    A context manager: leaving it without ``publish`` removes what was written. One process at a time writes for the
    same inputs. Blocks.
    """

    def __init__(self, root: str, inputs: PackedInputs) -> None:
        self._inputs = inputs
        self._path = Path(root) / inputs.key
        self._new = self._path.with_name(f"{_NEW}{self._path.name}")
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> Self:
        """Raises BlockingIOError where another process writes the same, or did a moment ago."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._new.mkdir(exist_ok=True)
        self._lock = os.open(self._new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise
        if not is_at(self._new, self._lock):
            os.close(self._lock)
            raise BlockingIOError(errno.EAGAIN, "it was finished or removed meanwhile", str(self._new))
        for left in self._new.iterdir():
            left.unlink()
        self._file = (self._new / WEIGHTS).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        # Once it has its final name, this one may be another process's.
        if is_at(self._new, self._lock):
            shutil.rmtree(self._new, ignore_errors=True)
        os.close(self._lock)

    def append(self, data: memoryview) -> int:
        """Writes bytes to the beginning of a page; returns their offset."""
        if not has_room(str(self._path.parent), data.nbytes):
            raise DiskFull(f"packed weights would take the last tenth of the disk of {self._path.parent}")
        self._write(bytes(-self._offset % PAGE_BYTES))
        offset = self._offset
        for start in range(0, data.nbytes, _CHUNK_BYTES):
            self._write(data[start : start + _CHUNK_BYTES])
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
        os.fchmod(self._file.fileno(), 0o444)
        path = self._new / MANIFEST
        path.write_text(manifest.to_json(), encoding="utf-8")
        if not manifest.refusal:
            verify(self._new)
        for name in (path, self._new):
            _sync(name)
        drop(str(self._path.parent), self._inputs)
        # Still in use, so that nobody tidies it away, but a start that wants it has no reason to wait.
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._new.rename(self._path)
        _sync(self._path.parent)
        return self._path

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._offset += len(data)


def _is_in_memory(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        # It would block, or the filesystem can't say.
        return False


def _check(directory: Path) -> None:
    manifest = read_manifest(directory)
    if manifest.refusal:
        raise Unsupported(manifest.refusal)
    try:
        file = (directory / WEIGHTS).stat()
        verified = json.loads((directory / _VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Corrupted(f"packed weights can't be read: {error}") from error
    if verified != _identity(file) or file.st_size != manifest.size_bytes:
        raise Corrupted("packed weights are not the file that was verified")


def _identity(file: os.stat_result) -> dict[str, int]:
    return {"inode": file.st_ino, "size_bytes": file.st_size, "modified_ns": file.st_mtime_ns}


def _with_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
