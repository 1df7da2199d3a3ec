"""A file system whose power fails: it knows what has reached the disk, and makes the disk as it may be found after.

Operations happen for real, in a real directory; beside that it keeps what is durable: the names of each directory as
they were when that directory was synced last, the bytes and mode of each file as they were when that file was. Before
each operation, and after the last, the power may fail. POSIX promises nothing about what was not synced, so each of
these is tried:

- nothing of it reached the disk;
- all names did and no bytes: files have their size and are full of zeros (blocks allocated, never written);
- all of it did, which is what SIGKILL leaves;
- the names of one directory did and those of no other, for each directory that has changed;
- all names and the bytes of one file, for each file that was written to: a journal without what it tells of.

States that look alike are kept once, so what was promised has to be on the disk, too: in files called `index.db`, which
are always as they were written.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helios.mesh.file_system import LocalFileSystem

Names = dict[str, int]


@dataclass
class _File:
    """What is durable of a file; `descriptor` keeps its number from being given to another."""

    descriptor: int
    content: bytes | None = None
    mode: int = 0o600


@dataclass
class _Directory:
    descriptor: int
    names: Names = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """A disk after a power failure: before which operation, what of the rest got there, and where it is."""

    operation: str
    survived: str
    root: Path


class PowerCutFileSystem(LocalFileSystem):
    """Records below `root`; crash states are written below `states`. Made when `root` is there and durable."""

    def __init__(self, root: Path, states: Path) -> None:
        self.root = root
        self._states = states
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {}
        self._seen: set[str] = set()
        # Fetches and the tier's own thread work at once; each operation is before or after each other one.
        self._lock = threading.RLock()
        self.operation_count = 0
        self.cuts: list[Cut] = []
        self._look(root)
        self._directory(root).names = self._names_now(root)

    def make_durable(self) -> None:
        """Takes everything that is there for synced."""
        self._look(self.root)
        for path in (self.root, *self.root.rglob("*")):
            if path.is_dir():
                self._directory(path).names = self._names_now(path)
            elif not _is_index(path):
                known = self._files[path.stat().st_ino]
                known.content, known.mode = _read(known.descriptor), stat.S_IMODE(path.stat().st_mode)

    def close(self) -> None:
        """Notes the last states, and lets go of all files."""
        self._cut("the end")
        for file in self._files.values():
            os.close(file.descriptor)
        for directory in self._directories.values():
            os.close(directory.descriptor)

    def sync_file(self, descriptor: int) -> None:
        """Also what `os.fsync` is for code that writes without the port."""
        with self._lock:
            self._cut("sync file")
            state = os.fstat(descriptor)
            self._look(self.root)
            known = self._files[state.st_ino]
            known.content = _read(known.descriptor)
            known.mode = stat.S_IMODE(state.st_mode)

    def sync_directory(self, directory: Path) -> None:
        with self._lock:
            self._cut(f"sync {self._label(directory)}")
            if directory == self.root or self.root in directory.parents:
                self._directory(directory).names = self._names_now(directory)

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            self._cut(f"rename {self._label(source)} to {self._label(target)}")
            super().rename(source, target)

    def link(self, source: Path, target: Path, *, symbolic: bool = False) -> None:
        with self._lock:
            self._cut(f"link {self._label(target)}")
            super().link(source, target, symbolic=symbolic)

    def remove(self, path: Path) -> None:
        with self._lock:
            self._cut(f"remove {self._label(path)}")
            super().remove(path)

    def make_directory(self, path: Path) -> None:
        with self._lock:
            self._cut(f"make {self._label(path)}")
            super().make_directory(path)

    def _cut(self, operation: str) -> None:
        """Writes each disk that may be found if the power fails now."""
        self._look(self.root)
        self.operation_count += 1
        changed = [
            path
            for path in (self.root, *self.root.rglob("*"))
            if path.is_dir() and self._directory(path).names != self._names_now(path)
        ]
        every = set(self.root.rglob("*")) | {self.root}
        dirty = {inode for inode, file in self._files.items() if file.content != _read(file.descriptor)}
        self._write(operation, "nothing", set(), written=set())
        self._write(operation, "names without bytes", every, written=set())
        self._write(operation, "everything", every, written=set(self._files))
        for path in changed:
            self._write(operation, f"names of {self._label(path)}", {path}, written=set())
        for inode in sorted(dirty):
            self._write(operation, "names, and the bytes of one file", every, written={inode})

    def _write(self, operation: str, survived: str, fresh: set[Path], *, written: set[int]) -> None:
        """Writes one disk: names as they are now for `fresh` directories and durable for others."""
        paths = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*")) if not path.is_symlink()}
        listing = list(self._tree(self.root.stat().st_ino, Path(), paths, fresh, written))
        indexes = {name.name: name.read_bytes() for name in self.root.glob("index.db*") if name.suffix != ".db-shm"}
        identity = hashlib.sha256(repr((listing, indexes)).encode()).hexdigest()
        if identity in self._seen:
            return
        self._seen.add(identity)
        target = self._states / f"{len(self._seen):04}"
        target.mkdir(parents=True)
        made: dict[int, Path] = {}
        for relative, inode, content, mode in listing:
            path = target / relative
            if content is None:
                path.mkdir(exist_ok=True)
            elif inode in made:
                path.hardlink_to(made[inode])
            else:
                path.write_bytes(content)
                path.chmod(mode)
                made[inode] = path
        for name, content in indexes.items():
            (target / name).write_bytes(content)
        self.cuts.append(Cut(operation, survived, target))

    def _tree(
        self, inode: int, relative: Path, paths: dict[int, Path], fresh: set[Path], written: set[int]
    ) -> Iterator[tuple[Path, int, bytes | None, int]]:
        yield relative, inode, None, 0
        path = paths.get(inode)
        names = self._names_now(path) if path is not None and path in fresh else self._directories[inode].names
        for name, child in sorted(names.items()):
            if child in self._directories:
                yield from self._tree(child, relative / name, paths, fresh, written)
                continue
            known = self._files[child]
            now = _read(known.descriptor)
            if child in written:
                yield relative / name, child, now, stat.S_IMODE(os.fstat(known.descriptor).st_mode)
            else:
                yield relative / name, child, bytes(len(now)) if known.content is None else known.content, known.mode

    def _look(self, directory: Path) -> None:
        """Gets to know what was made since."""
        self._directory(directory)
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                self._look(path)
            elif not _is_index(path):
                inode = path.stat().st_ino
                if inode not in self._files:
                    self._files[inode] = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def _directory(self, path: Path) -> _Directory:
        inode = path.stat().st_ino
        if inode not in self._directories:
            self._directories[inode] = _Directory(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return self._directories[inode]

    @staticmethod
    def _names_now(path: Path) -> Names:
        return {child.name: child.stat().st_ino for child in path.iterdir() if not _is_index(child)}

    def _label(self, path: Path) -> str:
        """A path without what is random in it."""
        relative = path.relative_to(self.root) if self.root in path.parents else Path(path.name)
        return "/".join(part if len(part) < 32 else part[:6] for part in relative.parts)


def _is_index(path: Path) -> bool:
    """SQLite has power cuts of its own; the index is given as it is, or as it was before."""
    return path.name.startswith("index.db")


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
