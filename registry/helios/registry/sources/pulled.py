"""A model at a place that is reached by a network: looked at before it is fetched.

    list → choose → probe → fetch

The probe is a directory that looks like the model: small files are there, of each weights file only the header, the
rest a hole of its size. The code that checks a directory of safetensors checks this one too, pickles and missing shards
included, so a model that can't be served is refused after some kilobytes. config.json comes first: an architecture that
the engine does not know costs one request.

What the place names by a hash, and the registry has, is not fetched. A listing whose every file has an identity is
remembered with what it became: pulled again, unchanged, nothing is fetched at all.
"""

import errno
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from helios.mesh.errors import DigestMismatch, DiskFull, InvalidRequest
from helios.registry import offload
from helios.registry.inspection import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    WEIGHT_SUFFIX,
    inspect_model,
    read_index,
    select_weights,
)
from helios.registry.manifest import MAX_ENTRIES, Digest, check_paths
from helios.registry.progress import ProgressLog
from helios.registry.records import IngestPhase
from helios.registry.safetensors_header import LENGTH_BYTES, header_length
from helios.registry.sources.architectures import check_architecture
from helios.registry.sources.conversion import Converter
from helios.registry.sources.directory import media_type, scan_directory
from helios.registry.sources.each import each
from helios.registry.sources.gguf import GGUF_SUFFIX, check_magic, choose_gguf
from helios.registry.sources.patterns import Selection
from helios.registry.sources.remote import Listing, RemoteFile, Repository, fingerprint
from helios.registry.sources.source import FileSet
from helios.registry.sources.unpack import UnpackedFile, Unpacker
from helios.registry.strict_json import malformed, parse_object

# Stands where a converter's version does; raised when another choice of files is made from the same listing.
_CHOICE: Final = "pulled-1"
# Larger ones are fetched in ranges, resumably, like weights.
_SMALL_BYTES: Final = 8 << 20
# config.json and the index are looked into, so they are read whole whatever their size; inspection has their bounds.
_LOOKED_INTO: Final = frozenset({CONFIG, INDEX, ADAPTER_CONFIG})
_MAX_LOOKED_INTO_BYTES: Final = 128 << 20
# Most headers fit the first read.
_HEADER_GUESS_BYTES: Final = 128 << 10
# Requests at a time: several round trips to a far hub overlap, none of its limits is near.
_PARALLEL: Final = 8
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MODULE: Final = re.compile(r"[0-9][^/]*_[^/]*/[^/]+")


class Fetcher(Protocol):
    """Gets bytes for one ingest; what it hands out lasts as long as that."""

    @property
    def at_once(self) -> int:
        """How many files should be fetched at a time."""
        ...

    async def have(self, digest: Digest) -> bool:
        """Returns whether the registry has this blob, which then stays at least until the ingest's end."""
        ...

    async def fetch(
        self, file: RemoteFile, repository: Repository, on_bytes: Callable[[int], None]
    ) -> tuple[Path | None, str]:
        """Returns a file with the bytes, complete and checked, and its sha256. The caller may move the file, which is
        the same one for files of the same content. Those are not fetched at the same time.

        None in its place: the registry has got the blob meanwhile, as ``have`` would say.

        Raises:
            HeliosError: It can't be had; what came is kept for the next try where that makes sense.
        """
        ...

    async def begin(self, files: Iterable[RemoteFile]) -> None:
        """Makes these files this ingest's to fetch; waits for another one that fetches any of them.

        Called once for archives, and then once for all else.

        Raises:
            DiskFull: There is no room for what is missing of them.
        """
        ...

    def require_space(self, needed_bytes: int) -> None:
        """Raises DiskFull unless the disk can take this much, beside what is fetched. Thread-safe."""
        ...


class PulledSource:
    """A model of a repository; ``source.Source``."""

    def __init__(
        self,
        text: str,
        repository: Repository,
        fetcher: Fetcher,
        converter: Converter,
        *,
        selection: Selection,
        is_any_architecture: bool = False,
    ) -> None:
        """Takes the place and what may be taken of it.

        Args:
            text: What the user wrote, for messages.
            repository: The place.
            fetcher: Gets large files.
            converter: For a GGUF file.
            selection: Which files.
            is_any_architecture: The model is for an engine that knows others than the default one.
        """
        self._text = text
        self._repository = repository
        self._fetcher = fetcher
        self._converter = converter
        self._selection = selection
        self._is_any_architecture = is_any_architecture
        self._files: tuple[RemoteFile, ...] = ()
        self._gguf: RemoteFile | None = None
        self._fetched: Path | None = None
        self._sums: dict[str, str] = {}
        self.origin = text
        self.is_file = False

    async def fingerprint(self, expected_sha256: str, progress: ProgressLog) -> tuple[str, str] | None:
        """Lists the place; returns what stands for its content, where the place names that."""
        progress.begin(IngestPhase.INSPECT)
        listing = await self._repository.list_files()
        self.origin = listing.origin
        self._files = choose(listing, self._selection, self._text)
        self._gguf = _only_gguf(self._files, self._text)
        self.is_file = self._gguf is not None
        if self._gguf is not None and self._gguf.packing:
            raise malformed(f"{self._text} packs {self._gguf.path} in an archive; a GGUF file is taken as it is only")
        if self._gguf is not None:
            return await self._gguf_fingerprint(self._gguf, expected_sha256, progress)
        stands_for = fingerprint(self._files)
        return (stands_for, choice_of(is_any_architecture=self._is_any_architecture)) if stands_for else None

    async def files(self, workspace: Path, progress: ProgressLog) -> FileSet:
        """Probes the model, then fetches what the registry does not have."""
        if self._gguf is not None:
            return await self._convert(self._gguf, workspace, progress)
        probe, unpacked = workspace / "probe", dict[str, UnpackedFile]()
        probe.mkdir()
        if packed := [file for file in self._files if file.packing]:
            unpacked = await self._unpack(packed, workspace / "unpacked", progress)
            self._files = tuple(file for file in self._files if not file.packing)
            check_paths([*unpacked, *(file.path for file in self._files)])
        try:
            await offload.run(lambda stop: _lay_out(probe, unpacked.values(), stop))
            holes = await self._probe(probe, unpacked)
            found = await offload.run(partial(_check_probe, probe))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # A hole takes no room, but no limit lets a file be larger than it.
            raise DiskFull(f"the registry's disk can't hold the files of {self._text}: {error.strerror}") from error
        remote = {file.path: file for file in self._files}
        known = {file.path: await self._known(remote[file.path]) for file in found.files if file.path in holes}
        missing = [remote[path] for path, digest in known.items() if digest is None]
        await self._fetcher.begin(missing)
        progress.begin(IngestPhase.FETCH, sum(file.size_bytes for file in missing))
        places: dict[str, Path] = {}
        sums = self._sums | {path: file.sha256 for path, file in unpacked.items()}

        async def fetch(same: list[RemoteFile]) -> None:
            # Files of the same content are one download.
            location, sha256 = await self._fetcher.fetch(same[0], self._repository, progress.advance)
            progress.advance(sum(file.size_bytes for file in same[1:]))
            for file in same:
                if location is None:
                    known[file.path] = Digest(sha256, file.size_bytes)
                else:
                    places[file.path], sums[file.path] = location, sha256

        await each(_by_content(missing), fetch, at_once=self._fetcher.at_once)
        files = tuple(
            replace(
                entry,
                location=places.get(entry.path, entry.location),
                known=known.get(entry.path),
                sha256=sums.get(entry.path, ""),
            )
            for entry in found.files
        )
        return FileSet(files, is_owned=True, ignored=found.ignored)

    async def _unpack(
        self, packed: list[RemoteFile], directory: Path, progress: ProgressLog
    ) -> dict[str, UnpackedFile]:
        directory.mkdir()
        await self._fetcher.begin(packed)
        total_bytes = sum(file.size_bytes for file in packed)
        progress.begin(IngestPhase.FETCH, total_bytes)
        archives: dict[Path, RemoteFile] = {}

        async def fetch(same: list[RemoteFile]) -> None:
            location, _ = await self._fetcher.fetch(same[0], self._repository, progress.advance)
            assert location is not None, "an archive never becomes a blob"
            archives[location] = same[0]

        await each(_by_content(packed), fetch, at_once=self._fetcher.at_once)
        progress.begin(IngestPhase.CONVERT, total_bytes)
        unpacker = Unpacker(directory, self._selection.takes, self._fetcher.require_space, progress.advance)
        for location, file in sorted(archives.items(), key=lambda item: item[1].path):
            what = f"{file.path} of {self._text}"
            try:
                await offload.run(partial(unpacker.unpack, location, file.packing, what))
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise DiskFull(f"the registry's disk can't hold the files of {self._text}") from error
        return unpacker.files

    async def _known(self, file: RemoteFile) -> Digest | None:
        if not file.sha256:
            return None
        digest = Digest(file.sha256, file.size_bytes)
        return digest if await self._fetcher.have(digest) else None

    async def _gguf_fingerprint(self, file: RemoteFile, expected_sha256: str, progress: ProgressLog) -> tuple[str, str]:
        check_magic(await self._repository.read(file, 0, min(8, file.size_bytes)), file.path)
        sha256 = file.sha256
        if not sha256:
            sha256 = await self._fetch_gguf(file, progress)
        if expected_sha256 and sha256 != expected_sha256:
            raise DigestMismatch(
                f"{file.path} has sha256 {sha256}, expected {expected_sha256}",
                metadata={"expected": expected_sha256, "found": sha256},
            )
        return sha256, self._converter.version

    async def _convert(self, file: RemoteFile, workspace: Path, progress: ProgressLog) -> FileSet:
        if self._fetched is None:
            await self._fetch_gguf(file, progress)
        # transformers goes by the name's end. Not moved: a conversion that fails does not cost the download.
        model, output = workspace / f"model{GGUF_SUFFIX}", workspace / "converted"
        assert self._fetched is not None, "a GGUF file never becomes a blob"
        model.hardlink_to(self._fetched)
        output.mkdir()
        progress.begin(IngestPhase.CONVERT)
        await self._converter.convert(model, output, progress)
        return await offload.run(lambda _: scan_directory(output, is_owned=True))

    async def _fetch_gguf(self, file: RemoteFile, progress: ProgressLog) -> str:
        await self._fetcher.begin([file])
        progress.begin(IngestPhase.FETCH, file.size_bytes)
        self._fetched, sha256 = await self._fetcher.fetch(file, self._repository, progress.advance)
        return sha256

    async def _probe(self, probe: Path, unpacked: Mapping[str, UnpackedFile]) -> set[str]:
        """Makes the directory that looks like the model; returns the paths whose bytes are not there."""
        files = [file for file in self._files if "/" not in file.path or _MODULE.fullmatch(file.path)]
        if len(files) > MAX_ENTRIES:
            raise malformed(f"{self._text} has more than {MAX_ENTRIES} files at its top")
        by_path = {file.path: file for file in files}
        if (config := by_path.get(CONFIG)) is not None:
            content = await self._read(config)
            await offload.run(lambda _: _write(probe / CONFIG, content))
        if config is not None or CONFIG in unpacked:
            document = parse_object(await offload.run(lambda _: _config_of(probe)), CONFIG)
            check_architecture(document, self._text, is_any=self._is_any_architecture)
        whole = [file for file in files if file.path != CONFIG and _is_read_whole(file)]
        await each(whole, lambda file: self._take(file, probe), at_once=_PARALLEL)
        holes = [file for file in files if file.path != CONFIG and not _is_read_whole(file)]
        await offload.run(lambda stop: _make_holes(probe, holes, stop))
        await each(_weights(probe, by_path, unpacked), lambda file: self._take_header(file, probe), at_once=_PARALLEL)
        return {file.path for file in holes}

    async def _take(self, file: RemoteFile, probe: Path) -> None:
        content = await self._read(file)
        await offload.run(lambda _: _write(probe / file.path, content))

    async def _read(self, file: RemoteFile) -> bytes:
        if file.size_bytes > _MAX_LOOKED_INTO_BYTES:
            raise malformed(f"{file.path} is larger than {_MAX_LOOKED_INTO_BYTES >> 20} MiB")
        content = file.check(await self._repository.read(file, 0, file.size_bytes))
        self._sums[file.path] = hashlib.sha256(content).hexdigest()
        return content

    async def _take_header(self, file: RemoteFile, probe: Path) -> None:
        """Puts the header of a weights file into its hole; the file itself is read once more when it is fetched."""
        begin = await self._repository.read(file, 0, min(_HEADER_GUESS_BYTES, file.size_bytes))
        end = LENGTH_BYTES + header_length(begin[:LENGTH_BYTES], file.size_bytes, file.path)
        if end > len(begin):
            begin += await self._repository.read(file, len(begin), end - len(begin))
        await offload.run(lambda _: _overwrite(probe / file.path, begin[:end]))


def choose(listing: Listing, selection: Selection, text: str) -> tuple[RemoteFile, ...]:
    """Returns the files of a place that patterns leave. Raises InvalidRequest (INVALID_PATTERN, UNSUPPORTED_FORMAT)."""
    chosen = tuple(file for file in listing.files if selection.takes(file.path))
    if listing.files and not chosen:
        raise InvalidRequest(
            f"none of the {len(listing.files)} files of {text} is left by the patterns",
            reason="INVALID_PATTERN",
            metadata={"param": "include"},
        )
    if len({file.path for file in chosen}) != len(chosen):
        raise malformed(f"{text} lists a file twice")
    return chosen


def choice_of(*, is_any_architecture: bool) -> str:
    """Returns what stands beside a listing's fingerprint where what was made of it is remembered."""
    # What was taken for an engine without a list was not held to one.
    return f"{_CHOICE}-any" if is_any_architecture else _CHOICE


def _is_read_whole(file: RemoteFile) -> bool:
    if file.path in _LOOKED_INTO:
        return True
    is_small = file.size_bytes <= _SMALL_BYTES and not file.path.endswith(WEIGHT_SUFFIX)
    return is_small and media_type(file.path.rpartition("/")[2]) is not None


def _only_gguf(files: Iterable[RemoteFile], text: str) -> RemoteFile | None:
    """Returns the GGUF file where that is what the files come down to. Raises InvalidRequest for several."""
    names = {file.path: file for file in files}
    found = sorted(name for name in names if name.lower().endswith(GGUF_SUFFIX))
    if not found or any(name.endswith(WEIGHT_SUFFIX) and "/" not in name for name in names):
        return None
    return names[choose_gguf({name: names[name].size_bytes for name in found}, text, "choose one with --include")]


def _weights(probe: Path, files: dict[str, RemoteFile], here: Collection[str]) -> list[RemoteFile]:
    """Returns the weights files that are the model, as the scan of the directory will choose them, and are not here."""
    names = {name for name in (*files, *here) if "/" not in name}
    if CONFIG not in names and ADAPTER_CONFIG in names:
        return [files[ADAPTER_WEIGHTS]] if ADAPTER_WEIGHTS in files else []
    if not any(name.endswith(WEIGHT_SUFFIX) for name in names):
        return []
    index = read_index(probe / INDEX) if INDEX in names else None
    return [files[name] for name in sorted(select_weights(names, index)) if name in files]


def _check_probe(probe: Path, stop: offload.Stop) -> FileSet:
    found = scan_directory(probe, is_owned=True)
    stop.check()
    inspect_model({file.path: file.location for file in found.files})
    return found


def _by_content(files: Iterable[RemoteFile]) -> list[list[RemoteFile]]:
    """Returns files in groups of the same content, the smallest first: what is done early can't be lost any more, and
    the largest one, which is fetched in ranges, needs no company to fill the line.
    """
    groups: dict[tuple[str, int], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.size_bytes):
        groups.setdefault((file.identity or file.place, file.size_bytes), []).append(file)
    return list(groups.values())


def _lay_out(probe: Path, files: Iterable[UnpackedFile], stop: offload.Stop) -> None:
    """Moves what was unpacked to where it belongs."""
    for file in files:
        stop.check()
        location = probe / file.path
        location.parent.mkdir(parents=True, exist_ok=True)
        file.location.rename(location)


def _config_of(probe: Path) -> bytes:
    location = probe / CONFIG
    if location.stat().st_size > _MAX_LOOKED_INTO_BYTES:
        raise malformed(f"{CONFIG} is larger than {_MAX_LOOKED_INTO_BYTES >> 20} MiB")
    return location.read_bytes()


def _write(location: Path, content: bytes) -> None:
    location.parent.mkdir(exist_ok=True)
    location.write_bytes(content)


def _make_holes(probe: Path, files: Iterable[RemoteFile], stop: offload.Stop) -> None:
    for file in files:
        stop.check()
        location = probe / file.path
        location.parent.mkdir(exist_ok=True)
        with location.open("xb") as hole:
            hole.truncate(file.size_bytes)


def _overwrite(location: Path, content: bytes) -> None:
    with location.open("r+b") as file:
        file.write(content)
