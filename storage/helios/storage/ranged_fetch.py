"""Blobs that come over a network, by the mesh's transfer engine, into files that a crash does not cost.

    <root>/partial/<hash>             what came so far
    <root>/partial/<hash>.journal     which parts of it, with their hashes

They are not swept at start, as everything else unfinished is: the next fetch of the blob goes on with them, as long as
it cuts the blob in the same way and the source has the same ETag (peers, and all that is verified by an index, have
none). What nobody has gone on with for a day goes with the next fetch, and at once where its room is needed.
"""

import errno
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from helios.mesh.file_system import FileSystem, make_durable_directory
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import Priority
from helios.mesh.transfer.order import Guide, Transfer, Transferred, Wanted
from helios.mesh.transfer.progress import TransferProgress
from helios.mesh.transfer.source import RangeSource
from helios.storage.manifest import Digest

log = structlog.get_logger()

_KEEP_SECONDS: Final = 86_400.0
"""A day: over a night's outage of the object store, not for ever."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class PartialFiles:
    """The unfinished files of one tier. Blocking; for one process; one fetch of a blob at a time."""

    def __init__(self, root: Path, files: FileSystem) -> None:
        self._directory = root / "partial"
        self._files = files
        self._in_use: set[str] = set()

    @contextmanager
    def fetch(  # noqa: PLR0913 - one for each thing that a transfer is told
        self,
        downloader: Downloader,
        source: RangeSource,
        digest: Digest,
        *,
        priority: Callable[[], Priority],
        check: Callable[[], None],
        on_progress: Callable[[TransferProgress], None],
        part_lengths: tuple[int, ...] = (),
        part_hashes: tuple[bytes, ...] = (),
        guide: Guide | None = None,
    ) -> Iterator[tuple[Path, Transferred]]:
        """Fetches a blob, or what is missing of it; gives a file that is whole, verified and synced, the caller's to
        rename within the block: afterwards it may go.

        Raises:
            HeliosError: As `Downloader.fetch`.
            OSError: No room, or the disk fails.
        """
        make_durable_directory(self._files, self._directory)
        self.tidy(_KEEP_SECONDS)
        target = self._directory / digest.hash
        order = Transfer(
            source,
            target,
            Wanted(digest.size_bytes, digest.hash, part_lengths, part_hashes),
            priority=priority,
            check=check,
            on_progress=on_progress,
            guide=guide,
        )
        self._in_use.add(digest.hash)
        try:
            try:
                fetched = downloader.fetch(order)
            except OSError as error:
                # Others' beginnings are worth less than this blob.
                if error.errno not in _NO_ROOM or not self.tidy(0.0):
                    raise
                fetched = downloader.fetch(order)
            yield target, fetched
        finally:
            self._in_use.discard(digest.hash)

    def held_bytes(self, digest: Digest) -> int:
        """What the unfinished file of a blob has of the disk already: all of its room, once it was begun."""
        try:
            return (self._directory / digest.hash).lstat().st_blocks * 512
        except OSError:
            return 0

    def tidy(self, age_seconds: float, *, keep: Collection[str] = ()) -> int:
        """Removes what nobody has gone on with for so long, but for blobs to keep; returns how many files went."""
        # The file system's times are of the wall clock.
        before = time.time() - age_seconds  # noqa: TID251
        count = 0
        with suppress(FileNotFoundError):
            for path in list(self._directory.iterdir()):
                hash_ = path.name.partition(".")[0]
                if hash_ not in self._in_use and hash_ not in keep and path.lstat().st_mtime <= before:
                    self._files.remove(path)
                    count += 1
        if count:
            log.info("unfinished fetches removed", files=count)
        return count
