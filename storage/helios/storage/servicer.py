"""StorageService on the wire: protos in, the session's actions out.

The handler of a stream runs three things: reading the client, the fetch, and itself, which feeds both into the
session and writes all answers. It is a coroutine that writes to the context, not a generator: a generator must not
hold a task group across its yields.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceServicer
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.server import check_peer
from helios.mesh.transfer.progress import TransferProgress
from helios.storage.clock import Clock, steady_clock
from helios.storage.disk_tier import DiskTier
from helios.storage.early.growth import watch_growth
from helios.storage.early.watching import growth_to_proto
from helios.storage.leases import Lease
from helios.storage.manifest import revision_hash
from helios.storage.materializer import Loan, Materializer
from helios.storage.scrubber import ScrubProgress
from helios.storage.session import (
    Action,
    ClientDone,
    Close,
    Event,
    Failed,
    LeaseEnded,
    Lent,
    MaterializeSession,
    Release,
    ReleaseLease,
    Renew,
    RenewLease,
    SendReady,
    StartFetch,
    State,
    Want,
)
from helios.storage.sync.partial import PartialBlobs
from helios.storage.tiers import TierKind

SERVICE_NAME = "helios.api.storage.v1.StorageService"

_PROGRESS_SECONDS = 0.1
"""Ten messages a second: smooth for people, nothing for the agent."""

_QUEUE_SIZE = 16
"""Messages of a client that are read ahead; a faster one is slowed down by flow control."""

_MAX_HOLDER_CHARACTERS = 200
"""It is kept with the lease and written to logs."""

_KINDS = {
    TierKind.MEMORY: pb.TIER_KIND_MEMORY,
    TierKind.NVME: pb.TIER_KIND_NVME,
    TierKind.SSD: pb.TIER_KIND_SSD,
}

Context = grpc.aio.ServicerContext[Any, Any]


class StorageServicer(StorageServiceServicer):
    """Serves one materializer."""

    def __init__(
        self,
        materializer: Materializer,
        *,
        holders: frozenset[str] | None,
        operators: frozenset[str] | None,
        clock: Clock | None = None,
        descriptor_socket: str = "",
        partials: PartialBlobs | None = None,
    ) -> None:
        """Takes the components that may hold, and those that may evict, pin and scrub; None where callers can't be told
        apart (no TLS). Holders take files in memory on the descriptor socket; empty: there is none.
        """
        self._descriptor_socket = descriptor_socket
        self._partials = partials or PartialBlobs()
        self._materializer = materializer
        self._holders = holders
        self._operators = operators
        self._clock = clock or steady_clock()

    async def Materialize(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes as well
        self, request_iterator: AsyncIterator[pb.MaterializeRequest], context: Context
    ) -> None:
        """Runs one stream; the contract has the conversation."""
        self._check(context, self._holders)
        stream = _Stream(self._materializer, context, self._clock, self._descriptor_socket)
        error = await stream.run(request_iterator)
        if error is not None:
            raise error

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        """Drops a revision."""
        self._check(context, self._operators)
        return pb.EvictResponse(freed_bytes=await self._materializer.evict(request.revision))

    async def GetResidency(self, request: pb.GetResidencyRequest, context: Context) -> pb.GetResidencyResponse:
        """Lists what is here."""
        revisions = [
            pb.ResidentRevision(
                revision=r.revision,
                size_bytes=r.size_bytes,
                lease_count=r.lease_count,
                tiers=r.tiers,
                is_pinned=r.is_pinned,
                moving_to=r.moving_to,
            )
            for r in self._materializer.residency()
        ]
        tiers = [tier_to_proto(room.tier) for room in self._materializer.rooms]
        return pb.GetResidencyResponse(revisions=revisions, tiers=tiers)

    async def GetTierStatistics(
        self, request: pb.GetTierStatisticsRequest, context: Context
    ) -> pb.GetTierStatisticsResponse:
        """Says what the tiers did."""
        tiers = [
            statistics_to_proto(room.tier, (await room.tier.disk_room()).free_bytes)
            for room in self._materializer.rooms
        ]
        return pb.GetTierStatisticsResponse(tiers=tiers, miss_count=self._materializer.miss_count)

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        """Has a revision stay."""
        self._check(context, self._operators)
        await self._materializer.pin(request.revision)
        return pb.PinResponse()

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        """Takes a pin back."""
        self._check(context, self._operators)
        await self._materializer.unpin(request.revision)
        return pb.UnpinResponse()

    async def Scrub(self, request: pb.ScrubRequest, context: Context) -> None:  # type: ignore[override]  # as Materialize
        """Scrubs everything now."""
        self._check(context, self._operators)
        limit = request.bytes_per_second if request.HasField("bytes_per_second") else 0
        async with contextlib.aclosing(self._materializer.scrubber.scrub_all(bytes_per_second=limit)) as steps:
            async for progress in steps:
                await context.write(scrub_to_proto(progress))

    async def WatchFetch(  # type: ignore[override]  # as Materialize
        self, request: pb.WatchFetchRequest, context: Context
    ) -> None:
        """Says what is here of a revision that is being fetched."""
        self._check(context, self._holders)
        revision_hash(request.revision)
        find = partial(self._materializer.fetching, request.revision)
        async with contextlib.aclosing(watch_growth(find, self._partials)) as changes:
            async for growth in changes:
                await context.write(growth_to_proto(growth))

    @staticmethod
    def _check(context: Context, allowed: frozenset[str] | None) -> None:
        if allowed is not None:
            check_peer(context, allowed, SERVICE_NAME)


class _Stream:
    """One Materialize call."""

    def __init__(self, materializer: Materializer, context: Context, clock: Clock, descriptor_socket: str) -> None:
        self._materializer = materializer
        self._descriptor_socket = descriptor_socket
        self._context = context
        self._clock = clock
        self._session = MaterializeSession()
        self._events: asyncio.Queue[Event] = asyncio.Queue(_QUEUE_SIZE)
        self._want: Want | None = None
        self._loan: Loan | None = None
        self._lease: Lease | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._shown: TransferProgress | None = None
        self._is_told = False

    async def run(self, requests: AsyncIterator[pb.MaterializeRequest]) -> HeliosError | None:
        """Runs until the session closes; returns the error that ends the call."""
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(requests), name="read materialize stream")
                closing = await self._converse(group)
                reader.cancel()
                if self._fetching is not None:
                    self._fetching.cancel()
        finally:
            await self._take_back()
        return closing.error

    async def _converse(self, group: asyncio.TaskGroup) -> Close:
        """Feeds events to the session and does what it says until it closes."""
        while True:
            for action in self._session.handle(await self._next_event()):
                if isinstance(action, Close):
                    return action
                if isinstance(action, StartFetch):
                    self._want = action.want
                    name = f"materialise {action.want.revision}"
                    self._fetching = group.create_task(self._fetch(action.want), name=name)
                elif (failed := await self._execute(action)) is not None:
                    return failed

    async def _take_back(self) -> None:
        """Ends a lease that was granted while the stream ended: nobody knows its id."""
        if self._loan is not None and not self._is_told and self._want is not None and not self._want.lease_id:
            await self._materializer.release(self._loan.lease.id)

    async def _execute(self, action: Action) -> Close | None:
        """Does what needs no task; an error closes the stream."""
        try:
            if isinstance(action, SendReady):
                assert self._loan is not None
                self._is_told = True
                await self._send(pb.MaterializeResponse(ready=ready_to_proto(self._loan, self._descriptor_socket)))
            elif isinstance(action, RenewLease):
                self._lease = await self._materializer.renew(action.lease_id)
                ends_at = timestamp_to_proto(self._lease.ends_at)
                await self._send(pb.MaterializeResponse(renewed=pb.Renewed(expires_at=ends_at)))
            elif isinstance(action, ReleaseLease):
                await self._materializer.release(action.lease_id)
        except HeliosError as error:
            return Close(error)
        return None

    async def _next_event(self) -> Event:
        """Waits for an event; shows progress meanwhile, and notices the lease's end."""
        while True:
            try:
                async with asyncio.timeout(self._patience_seconds()):
                    return await self._events.get()
            except TimeoutError:
                if self._session.state is State.FETCHING:
                    await self._show_progress()
                elif self._lease is not None and not self._lease.is_alive(self._clock()):
                    return LeaseEnded()

    def _patience_seconds(self) -> float | None:
        if self._session.state is State.FETCHING:
            return _PROGRESS_SECONDS
        if self._lease is not None:
            return max(0.0, (self._lease.ends_at - self._clock()).total_seconds()) + 0.001
        return None

    async def _show_progress(self) -> None:
        assert self._want is not None
        progress = self._materializer.progress(self._want.revision)
        if progress is not None and progress != self._shown:
            self._shown = progress
            await self._send(pb.MaterializeResponse(progress=progress_to_proto(progress)))

    async def _fetch(self, want: Want) -> None:
        try:
            self._loan = await self._materializer.materialize(
                want.revision, holder=want.holder, ttl=want.ttl, lease_id=want.lease_id
            )
        except HeliosError as error:
            await self._events.put(Failed(error))
        else:
            self._lease = self._loan.lease
            await self._events.put(Lent(self._loan.lease.id))

    async def _read(self, requests: AsyncIterator[pb.MaterializeRequest]) -> None:
        async for request in requests:
            await self._events.put(event_from_proto(request))
        await self._events.put(ClientDone())

    async def _send(self, response: pb.MaterializeResponse) -> None:
        await self._context.write(response)


def event_from_proto(request: pb.MaterializeRequest) -> Event:
    """Reads a message; one that says nothing, or something new, is like no want."""
    match request.WhichOneof("message"):
        case "want":
            want = request.want
            ttl = _ttl_from_proto(want.ttl) if want.HasField("ttl") else None
            return Want(want.revision, ttl, want.lease_id, want.holder[:_MAX_HOLDER_CHARACTERS])
        case "renew":
            return Renew()
        case "release":
            return Release()
    return Failed(InvalidRequest("the message is empty, or of a newer version", reason="WANT_EXPECTED"))


def _ttl_from_proto(ttl: Duration) -> timedelta:
    try:
        return ttl.ToTimedelta()
    except OverflowError:
        # Out of bounds, which is said where bounds are checked.
        return timedelta.max


def ready_to_proto(loan: Loan, descriptor_socket: str) -> pb.Ready:
    """Writes a loan."""
    return pb.Ready(
        lease_id=loan.lease.id,
        path=str(loan.path),
        expires_at=timestamp_to_proto(loan.lease.ends_at),
        fetched_bytes=loan.fetched_bytes,
        descriptor_socket=descriptor_socket if loan.is_sealed else "",
    )


def timestamp_to_proto(moment: datetime) -> Timestamp:
    """Writes a moment."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def tier_to_proto(tier: DiskTier) -> pb.Tier:
    """Writes what a tier has."""
    return pb.Tier(
        name=tier.name,
        used_bytes=tier.inventory.used_bytes,
        capacity_bytes=tier.options.capacity_bytes,
        kind=_KINDS[tier.options.kind],
    )


def statistics_to_proto(tier: DiskTier, free_bytes: int) -> pb.TierStatistics:
    """Writes what a tier did."""
    counted = tier.statistics
    return pb.TierStatistics(
        tier=tier_to_proto(tier),
        free_bytes=free_bytes,
        hit_count=counted.hit_count,
        hit_bytes=counted.hit_bytes,
        written_bytes=counted.written_bytes,
        promoted_count=counted.promoted_count,
        demoted_count=counted.demoted_count,
        evicted_count=counted.evicted_count,
        evicted_bytes=counted.evicted_bytes,
        queue_seconds=counted.queue_seconds,
        queued_count=counted.queued_count,
        read_bytes_per_second=counted.read.bytes_per_second,
        write_bytes_per_second=counted.write.bytes_per_second,
        scrubbed_bytes=counted.scrubbed_bytes,
        corrupt_count=counted.corrupt_count,
        shared_bytes=counted.shared_bytes,
    )


def progress_to_proto(progress: TransferProgress) -> pb.Progress:
    """How far a fetch is, on the wire."""
    message = pb.Progress(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        bytes_per_second=progress.bytes_per_second,
    )
    if progress.remaining_seconds is not None:
        message.remaining.FromNanoseconds(round(progress.remaining_seconds * 1e9))
    return message


def scrub_to_proto(progress: ScrubProgress) -> pb.ScrubResponse:
    """Writes how far a scrub is."""
    corrupt = [
        pb.CorruptBlob(hash=found.blob.hash, tier=found.tier, is_lent=found.is_lent, is_healed=found.is_healed)
        for found in progress.found
    ]
    return pb.ScrubResponse(done_bytes=progress.done_bytes, total_bytes=progress.total_bytes, corrupt=corrupt)
