"""Weights as one engine wants them on one kind of machine: files that a replica maps instead of making its own copy.

An ordinary load copies the checkpoint into the engine's tensors, which are fused and then packed for the processor. All
of that is private memory, the same in every replica of the model, and made anew by each. An artifact holds the result:
a directory named by the digest of all that it depends on (``PackedInputs``), with

    manifest.json   what lies where in the other file, and what it was made from
    weights.bin     the tensors, each at the beginning of a page
    verified.json   inode, size and time of the file whose digest was checked
    helios-tried-…  a start mapped it, one file a replica (and ``helios-proven``: one ended well)
    helios-unfit    a start found that it is not of such a model

It can always be made again from the revision, so it is deleted freely, and whatever is wrong with it means an ordinary
load. A digest takes longer to compute than the load that it would protect (0.2 s for 270 MB, and it would read all of
the file): so it is computed when an artifact is made, from the bytes that lie under its name, and a start only looks
whether the file is still that one. Files are read-only; blobs of the storage agent are believed in the same way.

A model that can't be had like this leaves an artifact without weights, which says why, so that nobody tries again.

What a library reads as it stands may be what a start dies of, above all where another node made it. So one that was
tried, and proved by nobody, is not mapped again: it is made anew (``has_failed``).
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from helios.mesh.errors import Corrupted, HeliosError, Unsupported
from helios.worker.replica.artifact_directory import PROVEN, ArtifactDirectory, is_in_use, use_existing

# Grows when what an artifact means changes, or what can be had as one.
_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.bin"
_VERIFIED: Final = "verified.json"
_TRIED: Final = "helios-tried-"
_UNFIT: Final = "helios-unfit"
PAGE_BYTES: Final = 4096
"""Tensors begin at pages, so that none shares its last one with a neighbour that is written to."""
CHUNK_BYTES: Final = 8 << 20
"""What is read at a time of a file with weights."""
# Of a range that is asked for in advance the kernel reads this much for sure, and drops the rest without a word: it is
# the usual `read_ahead_kb` of a disk. Source: force_page_cache_ra in linux/mm/readahead.c.
_READ_AHEAD_BYTES: Final = 128 << 10
# What is in memory is there in large pieces, which were read together.
_LOOK_BYTES: Final = 2 << 20
# Of models of a hundred billion parameters it is below 1 MiB.
_MAX_MANIFEST_BYTES: Final = 16 << 20


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
    def document(self) -> str:
        """All of them as JSON, the same text for the same inputs: what people read, and what the key is made of."""
        return json.dumps({"packed-weights": _VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @property
    def key(self) -> str:
        """Their digest: 64 hexadecimal digits, the artifact's name. The order of flags is nothing."""
        return hashlib.sha256(self.document.encode()).hexdigest()


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
            is_known &= isinstance(manifest.inputs, dict)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupted(f"not a manifest of packed weights: {error}") from error
        if not is_inside or not is_known:
            raise Corrupted("a manifest of packed weights names what is not there")
        return manifest


def find(root: str, inputs: PackedInputs) -> ArtifactDirectory | None:
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


def begin_trial(directory: Path, replica_id: str) -> None:
    """Notes that a start maps an artifact. What becomes of it is said by ``mark_proven``, ``end_trials`` or nobody."""
    if not (directory / PROVEN).exists():
        # A disk without room for a name is no reason against a start.
        with contextlib.suppress(OSError):
            (directory / _trial(replica_id)).touch()


def end_trials(root: Path, replica_id: str) -> None:
    """Takes it back: the replica ended as it was told, proven or not, and so says nothing of what it mapped."""
    for path in root.glob(f"*/{_trial(replica_id)}"):
        with contextlib.suppress(OSError):
            path.unlink()


def mark_unfit(directory: Path) -> None:
    """Notes that an artifact is not of the model that its name says. Raises OSError."""
    (directory / _UNFIT).touch()


def is_unfit(directory: Path) -> bool:
    """Returns whether a start found that."""
    return (directory / _UNFIT).exists()


def has_failed(directory: Path) -> bool:
    """Returns whether one is to be made anew: it is unfit, or no start with it went well and none is under way."""
    if is_unfit(directory):
        return True
    is_tried = any(directory.glob(f"{_TRIED}*"))
    return is_tried and not (directory / PROVEN).exists() and not is_in_use(directory)


def find_proven(root: Path, revision: str) -> Path | None:
    """Returns the artifact of a revision that a start is most likely to map: the one proven and used last."""
    found = []
    # By their whole names: what is being made, or removed, has another one.
    for path in root.glob("[0-9a-f]" * 64):
        # What is tidied away meanwhile is none.
        with contextlib.suppress(OSError, HeliosError):
            if (path / PROVEN).exists() and not is_unfit(path) and _revision_of(path) == revision:
                _check(path)
                found.append((path.stat().st_mtime, path))
    return max(found)[1] if found else None


def read_manifest(directory: Path) -> PackedManifest:
    """Reads an artifact's manifest. Raises Corrupted."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Corrupted(f"a manifest of packed weights can't be read: {error}") from error
    if len(text) > _MAX_MANIFEST_BYTES:
        raise Corrupted("a manifest of packed weights is too large")
    return PackedManifest.from_json(text)


def verify(directory: Path, check: Callable[[], None] = lambda: None) -> None:
    """Computes the digest of an artifact's weights and remembers the file that has it. Raises Corrupted.

    For whoever brings an artifact to the node; it blocks as long as the file takes to read. ``check`` is called between
    pieces of it; what it raises ends the work.
    """
    manifest = read_manifest(directory)
    digest = hashlib.sha256()
    with (directory / WEIGHTS).open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            check()
    if digest.hexdigest() != manifest.sha256 or identity["size_bytes"] != manifest.size_bytes:
        raise Corrupted("packed weights are not those of their manifest")
    (directory / _VERIFIED).write_text(json.dumps(identity), encoding="utf-8")


def _trial(replica_id: str) -> str:
    return f"{_TRIED}{hashlib.sha256(replica_id.encode()).hexdigest()[:16]}"


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


def _revision_of(directory: Path) -> str:
    manifest = (directory / MANIFEST).stat()
    return _read_revision(directory, manifest.st_ino, manifest.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _read_revision(directory: Path, inode: int, modified_ns: int) -> str:
    """Reads a manifest's revision, once for each file."""
    del inode, modified_ns
    return str(read_manifest(directory).inputs.get("revision"))


def _identity(file: os.stat_result) -> dict[str, int]:
    return {"inode": file.st_ino, "size_bytes": file.st_size, "modified_ns": file.st_mtime_ns}


def _with_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
