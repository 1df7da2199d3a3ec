"""The loader's side: files that grow, mapped once, and tensors in the order in which their bytes are verified.

    async with lend_early(dialer, client, revision, holder="…", load=load) as (lent, loaded):
        ...

`load` runs beside the fetch and reads what is here of the files; its result is given with the lease and not before, and
only if it read the very files that are lent: the file on its way gets its final name by a rename, so that it is the
same inode. Where it is another one, or a fetch began anew, `load` runs again on what is lent. What fails the fetch ends
the load.
"""

import asyncio
import json
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc.aio
import structlog

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import Corrupted
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.spans import Spans
from helios.storage.client import Lent, StorageClient

log = structlog.get_logger()
T = TypeVar("T")

_LENGTH_BYTES: Final = 8
"""A safetensors file begins with the length of its header, little-endian."""

_MAX_HEADER_BYTES: Final = 100_000_000
"""As the safetensors library has it."""

_RETRY_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor whose bytes are here: a view of the mapped file, nothing copied; `dtype` as safetensors says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(slots=True)
class _File:
    mapped: mmap.mmap | bytes
    identity: tuple[int, int]
    spans: Spans = field(default_factory=Spans)


class EarlyFiles:
    """Files of one revision that may not be whole. Used on one event loop; its maps live as long as views of them."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._changed = asyncio.Event()
        self._lent: Path | None = None
        self.is_lost = False

    async def read(self, path: str, start: int, end: int) -> memoryview:
        """Waits until a range of a file is here and verified; returns a view of it.

        Raises:
            Corrupted: EARLY_BYTES_LOST, when what was read before does not count any more; BAD_SAFETENSORS, when the
                file has no such range.
            OSError: The revision, which is lent, has no such file.
        """
        while True:
            if self.is_lost:
                raise Corrupted("the fetch began anew; what was read does not count", reason="EARLY_BYTES_LOST")
            if self._lent is not None and path not in self._files:
                self._open(path, self._lent / path)
            file = self._files.get(path)
            if file is not None and end > len(file.mapped):
                raise Corrupted(f"{path} ends before what it says it has", reason="BAD_SAFETENSORS")
            if file is not None and (self._lent is not None or file.spans.covers(start, end)):
                return memoryview(file.mapped)[start:end]
            self._changed.clear()
            await self._changed.wait()

    async def tensors(self, path: str) -> AsyncIterator[Tensor]:
        """Yields the tensors of a safetensors file in the order of their bytes, each as soon as it is here.

        Raises:
            Corrupted: EARLY_BYTES_LOST; BAD_SAFETENSORS.
        """
        length = int.from_bytes(await self.read(path, 0, _LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise Corrupted(f"{path} is no safetensors file", reason="BAD_SAFETENSORS")
        base = _LENGTH_BYTES + length
        header = _parse(path, bytes(await self.read(path, _LENGTH_BYTES, base)))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, end = entry["data_offsets"]
            data = await self.read(path, base + start, base + end)
            yield Tensor(name, entry["dtype"], tuple(entry["shape"]), data)

    def take(self, files: list[pb.GrowingFile]) -> None:
        """Takes what the agent says is here."""
        for told in files:
            file = self._files.get(told.path) or self._open(told.path, Path(told.file))
            if file is None:
                continue
            spans = Spans((span.offset, span.offset + span.length) for span in told.spans)
            self.is_lost = self.is_lost or not all(spans.covers(*before) for before in file.spans)
            file.spans = spans
        self._changed.set()

    def complete(self, directory: Path) -> bool:
        """Takes that the revision is lent; returns whether all that was mapped are the very files that are."""
        for path, file in self._files.items():
            status = (directory / path).stat()
            self.is_lost = self.is_lost or file.identity != (status.st_dev, status.st_ino)
        self._lent = directory
        self._changed.set()
        return not self.is_lost

    def _open(self, path: str, place: Path) -> _File | None:
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if self._lent is not None:
                raise
            # It has another name by now, which the next message says.
            return None
        try:
            status = os.fstat(descriptor)
            # Nothing can't be mapped.
            mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ) if status.st_size else b""
        finally:
            os.close(descriptor)
        file = self._files[path] = _File(mapped, (status.st_dev, status.st_ino))
        return file


@asynccontextmanager
async def lend_early(
    dialer: Dialer,
    client: StorageClient,
    revision: str,
    *,
    holder: str,
    load: Callable[[EarlyFiles], Awaitable[T]],
) -> AsyncIterator[tuple[Lent, T]]:
    """Lends a revision for the block, with what `load` made of it; the load begins before all bytes are here.

    Raises:
        HeliosError: As `StorageClient.materialize`; the load is ended then. What `load` raises.
    """
    early = EarlyFiles()
    failures: list[BaseException] = []
    try:
        async with task_scope() as group:
            watching = group.create_task(_watch(dialer, revision, early), name=f"watch {revision}")
            loading = group.create_task(_attempt(load, early, failures), name=f"load {revision}")
            async with client.materialize(revision, holder=holder) as lent:
                is_same = early.complete(Path(lent.path))
                watching.cancel()
                loaded = await loading if is_same else None
                if loaded is None:
                    loading.cancel()
                    log.warning("loaded again: other files are lent than were read", revision=revision)
                    whole = EarlyFiles()
                    whole.complete(Path(lent.path))
                    loaded = (await load(whole),)
                yield lent, loaded[0]
    except BaseExceptionGroup:
        # Of a task. A group that the caller's block raises is the caller's.
        if failures:
            raise failures[0] from None
        raise


async def _attempt(
    load: Callable[[EarlyFiles], Awaitable[T]], early: EarlyFiles, failures: list[BaseException]
) -> tuple[T] | None:
    """What a load made; None where the bytes that it read do not count. What it raises, but a cancellation, is kept."""
    try:
        return (await load(early),)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if isinstance(error, Corrupted) and early.is_lost:
            return None
        failures.append(error)
        raise


async def _watch(dialer: Dialer, revision: str, early: EarlyFiles) -> None:
    """Follows the fetch until it is cancelled; without news the load waits for the lease, as any other."""
    while True:
        call = dialer.stub(StorageServiceStub).WatchFetch(pb.WatchFetchRequest(revision=revision))
        try:
            async for answer in call:
                early.take(list(answer.files))
        except grpc.aio.AioRpcError as error:
            log.debug("no word of the fetch", revision=revision, code=str(error.code()))
        finally:
            call.cancel()
        await asyncio.sleep(_RETRY_SECONDS)


def _parse(path: str, header: bytes) -> dict[str, dict[str, Any]]:
    try:
        parsed = json.loads(header)
        parsed.pop("__metadata__", None)
        if all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in parsed.values()):
            return dict(parsed)
    except (ValueError, AttributeError, TypeError) as error:
        raise Corrupted(f"{path} is no safetensors file", reason="BAD_SAFETENSORS") from error
    raise Corrupted(f"{path} is no safetensors file", reason="BAD_SAFETENSORS")
