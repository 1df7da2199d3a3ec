"""The holder's side of WatchFetch: what is here of a revision on its way, part of the client."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceStub
from helios.mesh.calls import messages_of
from helios.mesh.channel import Dialer
from helios.mesh.errors import Unavailable


@dataclass(frozen=True, slots=True)
class GrowingFile:
    """A file of a revision: its path there, where its bytes are now, its size when whole, what is here and verified.

    `generation` is another one each time that its fetch begins anew, 0 when it is whole.
    """

    path: str
    place: str
    size_bytes: int
    spans: tuple[tuple[int, int], ...]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Growth:
    """What is here of a revision, and the paths of the files of which nothing is."""

    files: tuple[GrowingFile, ...]
    awaited_paths: tuple[str, ...] = ()


async def watch_fetch(dialer: Dialer, revision: str) -> AsyncGenerator[Growth, None]:
    """Yields what is here of a revision whenever that changes, while it is fetched; the caller ends it.

    Raises:
        HeliosError: What the agent answered; Unavailable when the stream broke. What was told before does not count
            any more then: another agent may write to the same files.
    """
    call = dialer.stub(StorageServiceStub).WatchFetch(pb.WatchFetchRequest(revision=revision))
    async with aclosing(messages_of(call)) as answers:
        async for answer in answers:
            yield Growth(tuple(map(_file_from_proto, answer.files)), tuple(answer.awaited_paths))
    raise Unavailable("the storage agent ended the watch of a fetch")


def growth_to_proto(growth: Growth) -> pb.WatchFetchResponse:
    """Writes what is here of a revision."""
    return pb.WatchFetchResponse(files=map(_file_to_proto, growth.files), awaited_paths=growth.awaited_paths)


def _file_to_proto(file: GrowingFile) -> pb.GrowingFile:
    spans = (pb.VerifiedSpan(offset=start, length=end - start) for start, end in file.spans)
    return pb.GrowingFile(
        path=file.path, file=file.place, size_bytes=file.size_bytes, spans=spans, generation=file.generation
    )


def _file_from_proto(file: pb.GrowingFile) -> GrowingFile:
    spans = tuple((span.offset, span.offset + span.length) for span in file.spans)
    return GrowingFile(file.path, file.file, file.size_bytes, spans, file.generation)
