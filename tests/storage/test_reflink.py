"""Chunks that two blobs have in common lie on the disk once, where the file system can: on a real XFS, and without."""

import errno
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3

from helios.mesh.transfer.engine import Downloader
from helios.storage.chunk_index import ChunkIndex
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import BlobReader, RangedBlob
from helios.storage.manifest import Digest
from helios.storage.reflink import Copy, share_copies
from helios.storage.verified_source import LocalFirst, VerifiedSource
from tests.storage.harness import ROOT, digest_of
from tests.storage.test_chunks import Bytes

CHUNK = 1 << 20
HEADER = 100
"""Tensors begin behind it, which is no multiple of a block: a block at each end of what is copied is not shared."""

BASE = random.Random(5).randbytes(HEADER + 8 * CHUNK)
TUNED = BASE[: HEADER + 2 * CHUNK] + random.Random(6).randbytes(CHUNK) + BASE[HEADER + 3 * CHUNK :]
MKFS = ROOT / "build" / "debian" / "sbin" / "mkfs.xfs"
XFS_BYTES = 320 << 20
"""About the least that mkfs.xfs makes; the file has holes."""

Ioctl = Callable[[int, int, bytearray], int]


def may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN, bit 21."""
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> 21 & 1)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A new XFS on a loop device. The other tests need none: they play back what the kernel answers."""
    if not may_mount() or not Path("/dev/loop-control").exists():
        pytest.skip("it takes the right to mount (CAP_SYS_ADMIN), and loop devices")
    assert MKFS.exists(), "make debian unpacks it, on which make test depends"
    image, place = tmp_path / "image", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(XFS_BYTES)
    libraries = MKFS.parents[1] / "usr" / "lib" / "x86_64-linux-gnu"
    subprocess.run([MKFS, "-q", image], check=True, env={"LD_LIBRARY_PATH": str(libraries)}, timeout=60)
    place.mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", image, place], check=False, capture_output=True, timeout=60)
    assert not mounted.returncode, mounted.stderr.decode()
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


def index_of(content: bytes) -> ChunkIndex:
    ends = [0, *range(HEADER, len(content) + 1, CHUNK)]
    pieces = [content[start:end] for start, end in pairwise(ends)]
    return ChunkIndex(len(content), [(len(piece), blake3(piece).digest()) for piece in pieces])


class Remote:
    """A store across a network that has one blob; what the base has is copied."""

    def __init__(self, base: Path | None) -> None:
        index, of_base = index_of(TUNED if base else BASE), index_of(BASE)
        copies = {chunk.blake3: (base, chunk.offset) for chunk in of_base.chunks} if base else {}
        self.remote = Bytes(TUNED if base else BASE)
        self._local = LocalFirst(VerifiedSource(self.remote, index), index, copies)
        self._lengths = index.lengths

    def ranged(self, digest: Digest) -> RangedBlob:
        counts: Callable[[], Mapping[str, int]] = lambda: {"node": self._local.copied_bytes}  # noqa: E731 - typed
        return RangedBlob(self._local, self._lengths, counts, copied=self._local.copied)

    def open(self, digest: Digest) -> BlobReader:
        raise NotImplementedError

    def linkable_path(self, digest: Digest) -> Path | None:
        return None


async def fetch_both(root: Path) -> DiskTier:
    """Fetches the base, then the fine-tune; returns the tier, closed."""
    async with DiskTier(root, fetch_thread_count=1, downloader=Downloader()) as tier:
        await tier.fetch(Remote(None), digest_of(BASE), lambda _: None)
        base = tier.store.blob_path(digest_of(BASE).hash)
        await tier.fetch(Remote(base), digest_of(TUNED), lambda _: None)
        assert tier.store.blob_path(digest_of(TUNED).hash).read_bytes() == TUNED
        assert base.read_bytes() == BASE
    return tier


def used_bytes(place: Path) -> int:
    os.sync()
    state = os.statvfs(place)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.slow
async def test_a_fine_tune_takes_the_room_of_what_differs(xfs: Path) -> None:
    before = used_bytes(xfs)
    tier = await fetch_both(xfs / "tier")
    saved_bytes = tier.statistics.shared_bytes
    # Seven of eight chunks, in two runs.
    assert 7 * CHUNK - 4 * 4096 <= saved_bytes <= 7 * CHUNK
    taken_bytes = used_bytes(xfs) - before
    assert taken_bytes < len(BASE) + len(TUNED) - saved_bytes + (1 << 20), "the index and directories take a little"


async def test_where_the_file_system_can_not_it_is_a_copy(tmp_path: Path) -> None:
    tier = await fetch_both(tmp_path / "tier")
    assert tier.statistics.written_bytes["node"] == len(TUNED) - CHUNK


class Kernel:
    """Answers as a kernel does: errors for the call, a status for the range, a count of what it shared."""

    def __init__(self, *, error: int = 0, status: int = 0, most_bytes: int = 1 << 40) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._error, self._status, self._most_bytes = error, status, most_bytes

    def __call__(self, descriptor: int, request: int, content: bytearray) -> int:
        assert request == 0xC0189436
        source_at, length, count, _, _, _, at, _, _, _ = struct.unpack("=QQHHI qQQiI", content)
        assert count == 1
        self.asked.append((source_at, at, length))
        if self._error:
            raise OSError(self._error, "refused")
        struct.pack_into("=Qi", content, 40, 0 if self._status else min(length, self._most_bytes), self._status)
        return 0


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(b"content")
    return tmp_path / "source", tmp_path / "target"


@pytest.mark.parametrize(
    ("offset", "source_offset", "length", "asked"),
    [
        (0, 0, 8192, [(0, 0, 8192)]),
        (100, 4196, 8192, [(8192, 4096, 4096)]),
        (100, 100, 4096, []),
        (0, 100, 1 << 20, []),
        (0, 0, (16 << 20) + 4096, [(0, 0, 16 << 20), (16 << 20, 16 << 20, 4096)]),
    ],
)
def test_whole_blocks_are_shared_that_lie_alike(
    files: tuple[Path, Path], offset: int, source_offset: int, length: int, asked: list[tuple[int, int, int]]
) -> None:
    kernel = Kernel()
    source, target = files
    saved_bytes = share_copies(target, [Copy(offset, length, source, source_offset)], ioctl=kernel)
    assert kernel.asked == asked
    assert saved_bytes == sum(each for _, _, each in asked)


def test_a_kernel_that_shares_less_is_asked_for_the_rest(files: tuple[Path, Path]) -> None:
    kernel = Kernel(most_bytes=4096)
    assert share_copies(files[1], [Copy(0, 12288, files[0], 0)], ioctl=kernel) == 12288
    assert [length for _, _, length in kernel.asked] == [12288, 8192, 4096]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.EIO])
def test_a_refusal_ends_it_and_costs_nothing(files: tuple[Path, Path], error: int) -> None:
    for kernel in (Kernel(error=error), Kernel(status=-error)):
        assert share_copies(files[1], [Copy(0, 8192, files[0], 0)] * 3, ioctl=kernel) == 0
        assert len(kernel.asked) == 1


def test_parts_that_follow_each_other_are_shared_as_one(files: tuple[Path, Path]) -> None:
    kernel = Kernel()
    source, target = files
    parts = [Copy(4196, 4096, source, 4196), Copy(100, 4096, source, 100), Copy(20000, 4096, source, 0)]
    assert share_copies(target, parts, ioctl=kernel) == 4096
    assert kernel.asked == [(4096, 4096, 4096)]


def test_a_source_elsewhere_does_not_keep_the_others_from_sharing(files: tuple[Path, Path]) -> None:
    kernel = Kernel(error=errno.EXDEV)
    assert share_copies(files[1], [Copy(0, 8192, files[0], 0)] * 3, ioctl=kernel) == 0
    assert len(kernel.asked) == 3


def test_bytes_that_differ_and_sources_that_are_gone_are_left_alone(files: tuple[Path, Path]) -> None:
    source, target = files
    assert share_copies(target, [Copy(0, 8192, source, 0)], ioctl=Kernel(status=1)) == 0
    assert share_copies(target, [Copy(0, 8192, source.with_name("gone"), 0)], ioctl=Kernel()) == 0
    assert target.read_bytes() == b"content"
