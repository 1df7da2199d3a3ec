"""The typed client of a storage agent: borrow a revision, keep the lease, give it back.

    async with client.materialize(revision, holder="worker-1") as lent:
        start_replica(lent.path)
        await lent.wait_lost()

While the block runs the lease is renewed at a third of its time to live. A stream that breaks, or an agent that
restarts, is met with a new stream that resumes the lease by its id until the time to live is over; only then is the
lease lost, which `lost` and `wait_lost` tell. What a lost lease means for running replicas is the caller's decision:
files that are mapped stay readable, but the agent may give their room away.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio
import structlog

from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceStub
from helios.mesh.calls import answer_of, messages_of
from helios.mesh.channel import Dialer
from helios.mesh.errors import Bug, Corrupted, HeliosError, PreconditionFailed, Unavailable
from helios.mesh.requests import StreamRequests
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.progress import TransferProgress
from helios.storage.early.watching import Growth, watch_fetch
from helios.storage.sealed_views import SealedViews

log = structlog.get_logger()

Stream = grpc.aio.StreamStreamCall[pb.MaterializeRequest, pb.MaterializeResponse]

_UNARY_TIMEOUT_SECONDS = 30.0
"""Evict unlinks some files, GetResidency answers from memory."""

_RELEASE_TIMEOUT_SECONDS = 5.0
"""A release that can't be delivered is not waited for: the lease ends by itself."""

_RETRY_CAP_SECONDS = 1.0
"""An agent that restarts is met within a second; with full jitter, so that holders do not come back at one instant."""

_MAX_REQUESTS = 4
"""A want or a release, and a renewal only after the answer to the one before."""


class LeaseLost(Unavailable):
    """The lease ended and could not be resumed; materialise the revision again."""

    default_reason = "LEASE_LOST"


@dataclass(frozen=True, slots=True)
class ResidentRevision:
    """A revision on the node; `tiers` that have it whole, the fastest first, `moving_to` empty while it is at rest."""

    revision: str
    size_bytes: int
    lease_count: int
    tiers: tuple[str, ...] = ()
    is_pinned: bool = False
    moving_to: str = ""


@dataclass(frozen=True, slots=True)
class Tier:
    """A place for blobs; `capacity_bytes` 0 means as much as the disk."""

    name: str
    used_bytes: int
    capacity_bytes: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """What one tier has and did since the agent started; the contract says what each count is."""

    tier: Tier
    free_bytes: int
    hit_count: int
    hit_bytes: int
    written_bytes: Mapping[str, int]
    promoted_count: int
    demoted_count: int
    evicted_count: Mapping[str, int]
    evicted_bytes: Mapping[str, int]
    queue_seconds: float
    queued_count: int
    read_bytes_per_second: float
    write_bytes_per_second: float
    scrubbed_bytes: int
    corrupt_count: int
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """What the tiers of a node did, the fastest first; `miss_count` are revisions that no tier had."""

    tiers: tuple[TierStatistics, ...]
    miss_count: int


@dataclass(frozen=True, slots=True)
class CorruptBlob:
    """A blob that a scrub found bad: mended by a good copy (`is_healed`), or gone."""

    hash: str
    tier: str
    is_lent: bool
    is_healed: bool


@dataclass(frozen=True, slots=True)
class ScrubProgress:
    """How far a scrub is."""

    done_bytes: int
    total_bytes: int
    corrupt: tuple[CorruptBlob, ...]


@dataclass(frozen=True, slots=True)
class Residency:
    """What is on the node."""

    revisions: tuple[ResidentRevision, ...]
    tiers: tuple[Tier, ...]


class Lent:
    """A revision that is lent, for as long as the `materialize` block runs.

    `path` is the directory with the revision's files; only an agent that was given another root while it was down
    changes it. `lost` is set once, when the lease ended without being released. `keep` may be set to leave the lease
    to its end (for a holder that hands `lease_id` to its successor). Of a revision in memory `path` shows files that
    this process holds open, for as long as the block runs.
    """

    def __init__(self, ready: pb.Ready, *, keep: bool) -> None:
        self.path = ready.path
        self.descriptor_socket = ""
        self.lease_id = ready.lease_id
        self.fetched_bytes = ready.fetched_bytes
        self.keep = keep
        self.lost = asyncio.Event()
        self.error: LeaseLost | None = None
        self.expires_at: datetime = ready.expires_at.ToDatetime(tzinfo=UTC)

    def check(self) -> None:
        """Raises LeaseLost when the lease is lost."""
        if self.error is not None:
            raise self.error

    async def wait_lost(self) -> None:
        """Waits until the lease is lost, and raises LeaseLost; returns never."""
        await self.lost.wait()
        self.check()


class StorageClient:
    """Calls a storage agent through a dialer, which the caller opens and closes."""

    def __init__(self, dialer: Dialer, *, sealed_directory: Path | None = None) -> None:
        """Takes the directory below which files in memory are shown to processes of this user, this client's alone.

        None: they are read by the agent's own descriptors, which end with the agent, and on this machine only.
        """
        self._dialer = dialer
        self._views = SealedViews(sealed_directory) if sealed_directory is not None else None

    @asynccontextmanager
    async def materialize(
        self,
        revision: str,
        *,
        holder: str,
        ttl_seconds: float = 60.0,
        lease_id: str | None = None,
        on_progress: Callable[[TransferProgress], None] | None = None,
        keep: bool = False,
    ) -> AsyncIterator[Lent]:
        """Brings a revision to the node and lends it for the block.

        An agent that can't be reached is retried for `ttl_seconds`. The block's end releases the lease unless `keep`.
        `on_progress` is called on the event loop, at most ten times a second.

        Raises:
            HeliosError: What the agent answered: RevisionNotFound, NotFound (LEASE_NOT_FOUND, when `lease_id` was
                given), InvalidRequest, DigestMismatch, DiskFull, Unavailable (SOURCE_UNAVAILABLE, or no agent).
        """
        holding = _Holding(
            self._dialer,
            revision,
            holder=holder,
            ttl_seconds=ttl_seconds,
            on_progress=on_progress,
            views=self._views,
        )
        lent = await holding.begin(lease_id, keep=keep)
        try:
            async with task_scope() as group:
                group.create_task(holding.keep_alive(lent), name=f"renew lease of {revision}")
                yield lent
        finally:
            await holding.end(lent)

    def watch_fetch(self, revision: str) -> AsyncGenerator[Growth, None]:
        """Tells what is here of a revision while it is fetched; see `early.watching`."""
        return watch_fetch(self._dialer, revision)

    async def evict(self, revision: str, *, timeout_seconds: float = _UNARY_TIMEOUT_SECONDS) -> int:
        """Drops a revision from the node; returns the bytes that were freed. Idempotent.

        Raises:
            PreconditionFailed: REVISION_LEASED, REVISION_PINNED.
        """
        request = pb.EvictRequest(revision=revision)
        response = await answer_of(self._stub().Evict(request, timeout=timeout_seconds))
        return response.freed_bytes

    async def residency(self, *, timeout_seconds: float = _UNARY_TIMEOUT_SECONDS) -> Residency:
        """Lists what is on the node."""
        request = pb.GetResidencyRequest()
        return residency_from_proto(await answer_of(self._stub().GetResidency(request, timeout=timeout_seconds)))

    async def statistics(self, *, timeout_seconds: float = _UNARY_TIMEOUT_SECONDS) -> NodeStatistics:
        """Says what the tiers did.

        Raises:
            Unavailable: TIER_FAILED.
        """
        request = pb.GetTierStatisticsRequest()
        response = await answer_of(self._stub().GetTierStatistics(request, timeout=timeout_seconds))
        return NodeStatistics(tuple(map(_statistics_from_proto, response.tiers)), response.miss_count)

    async def pin(self, revision: str, *, timeout_seconds: float = _UNARY_TIMEOUT_SECONDS) -> None:
        """Has a revision stay on the node once it is there. Idempotent.

        Raises:
            InvalidRequest: INVALID_REVISION.
        """
        await answer_of(self._stub().Pin(pb.PinRequest(revision=revision), timeout=timeout_seconds))

    async def unpin(self, revision: str, *, timeout_seconds: float = _UNARY_TIMEOUT_SECONDS) -> None:
        """Takes a pin back. Idempotent.

        Raises:
            InvalidRequest: INVALID_REVISION.
        """
        await answer_of(self._stub().Unpin(pb.UnpinRequest(revision=revision), timeout=timeout_seconds))

    async def scrub(self, *, bytes_per_second: int | None = None) -> AsyncIterator[ScrubProgress]:
        """Has every blob read and compared with its name; yields progress, and ends with the scrub.

        It has no deadline: terabytes take hours. Closing the iterator ends the scrub.

        Raises:
            PreconditionFailed: SCRUB_RUNS.
            Unavailable: TIER_FAILED, or no agent.
        """
        call = self._stub().Scrub(pb.ScrubRequest(bytes_per_second=bytes_per_second))
        async with aclosing(messages_of(call)) as answers:
            async for answer in answers:
                corrupt = tuple(CorruptBlob(c.hash, c.tier, c.is_lent, c.is_healed) for c in answer.corrupt)
                yield ScrubProgress(answer.done_bytes, answer.total_bytes, corrupt)

    def _stub(self) -> StorageServiceStub:
        return self._dialer.stub(StorageServiceStub)


def residency_from_proto(response: pb.GetResidencyResponse) -> Residency:
    """Reads the wire form."""
    return Residency(
        revisions=tuple(
            ResidentRevision(
                r.revision,
                r.size_bytes,
                r.lease_count,
                tuple(r.tiers),
                is_pinned=r.is_pinned,
                moving_to=r.moving_to,
            )
            for r in response.revisions
        ),
        tiers=tuple(map(_tier_from_proto, response.tiers)),
    )


def progress_from_proto(progress: pb.Progress) -> TransferProgress:
    """Reads how far a fetch is; an older agent says nothing of its rate."""
    remaining_seconds = progress.remaining.ToNanoseconds() / 1e9 if progress.HasField("remaining") else None
    return TransferProgress(progress.done_bytes, progress.total_bytes, progress.bytes_per_second, remaining_seconds)


def _tier_from_proto(tier: pb.Tier) -> Tier:
    kind = pb.TierKind.Name(tier.kind).removeprefix("TIER_KIND_").lower() if tier.kind else ""
    return Tier(tier.name, tier.used_bytes, tier.capacity_bytes, kind)


def _statistics_from_proto(counted: pb.TierStatistics) -> TierStatistics:
    return TierStatistics(
        tier=_tier_from_proto(counted.tier),
        free_bytes=counted.free_bytes,
        hit_count=counted.hit_count,
        hit_bytes=counted.hit_bytes,
        written_bytes=dict(counted.written_bytes),
        promoted_count=counted.promoted_count,
        demoted_count=counted.demoted_count,
        evicted_count=dict(counted.evicted_count),
        evicted_bytes=dict(counted.evicted_bytes),
        queue_seconds=counted.queue_seconds,
        queued_count=counted.queued_count,
        read_bytes_per_second=counted.read_bytes_per_second,
        write_bytes_per_second=counted.write_bytes_per_second,
        scrubbed_bytes=counted.scrubbed_bytes,
        corrupt_count=counted.corrupt_count,
        shared_bytes=counted.shared_bytes,
    )


class _Holding:
    """One lease and the streams that carry it, one after the other."""

    def __init__(
        self,
        dialer: Dialer,
        revision: str,
        *,
        holder: str,
        ttl_seconds: float,
        on_progress: Callable[[TransferProgress], None] | None,
        views: SealedViews | None,
    ) -> None:
        self._dialer = dialer
        self._views = views
        self._revision = revision
        self._holder = holder
        self._ttl_seconds = ttl_seconds
        self._on_progress = on_progress
        self._stream: Stream | None = None
        self._requests = _requests()
        self._ended = asyncio.Event()
        # Until when the lease surely lives, on this process's monotonic clock.
        self._safe_until = 0.0

    async def begin(self, lease_id: str | None, *, keep: bool) -> Lent:
        """Opens the first stream, retrying while the agent can't be reached."""
        give_up_at = time.monotonic() + self._ttl_seconds
        wait_seconds = 0.05
        while True:
            try:
                ready = await self._open(lease_id or "")
            except Unavailable as error:
                if not _is_transport(error) or time.monotonic() + wait_seconds > give_up_at:
                    raise
            else:
                return await self._show(Lent(ready, keep=keep), ready, is_resumed=bool(lease_id))
            await asyncio.sleep(random.uniform(0, wait_seconds))  # noqa: S311 - jitter, not a secret
            wait_seconds = min(2 * wait_seconds, _RETRY_CAP_SECONDS)

    async def _show(self, lent: Lent, ready: pb.Ready, *, is_resumed: bool) -> Lent:
        """Takes what is in memory, so that its path leads to this process's own descriptors."""
        if ready.descriptor_socket and self._views is not None:
            try:
                lent.path = await self._views.take(ready.descriptor_socket, ready.lease_id, self._revision)
            except BaseException:
                lent.keep = is_resumed
                await self.end(lent)
                raise
            lent.descriptor_socket = ready.descriptor_socket
        return lent

    async def keep_alive(self, lent: Lent) -> None:
        """Renews until cancelled, or until the lease is lost."""
        while True:
            try:
                await self._renew_while_connected(lent)
            except HeliosError as error:
                self._drop_stream()
                log.warning("storage stream lost", revision=self._revision, reason=error.reason)
                if not await self._resume(lent, cause=error):
                    return

    async def end(self, lent: Lent) -> None:
        """Releases the lease unless it is to be kept or is lost; a release that fails is left to the lease's end."""
        if self._views is not None and lent.descriptor_socket:
            self._views.drop(self._revision)
        try:
            if lent.keep or lent.lost.is_set():
                return
            async with asyncio.timeout(_RELEASE_TIMEOUT_SECONDS):
                if self._stream is None:
                    await self._open(lent.lease_id)
                await self._release()
        except (HeliosError, TimeoutError) as error:
            log.warning("lease left to its end", revision=self._revision, error=str(error))
        finally:
            self._drop_stream()

    async def _renew_while_connected(self, lent: Lent) -> None:
        """Renews on the current stream.

        Raises:
            HeliosError: The stream is over.
        """
        while True:
            await self._wait_or_end(self._ttl_seconds / 3)
            sent_at = time.monotonic()
            self._requests.put(pb.MaterializeRequest(renew=pb.Renew()))
            try:
                async with asyncio.timeout(self._ttl_seconds / 3):
                    answer = await self._read()
            except TimeoutError as error:
                raise Unavailable("the storage agent does not answer") from error
            if answer.WhichOneof("message") != "renewed":
                raise Bug("the storage agent answered a renewal with something else")
            self._safe_until = sent_at + self._ttl_seconds
            lent.expires_at = answer.renewed.expires_at.ToDatetime(tzinfo=UTC)

    async def _wait_or_end(self, seconds: float) -> None:
        """Waits; a stream that ends meanwhile is noticed at once, not with the next renewal."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return
        await self._read()
        raise Unavailable("the storage agent closed the stream")

    async def _resume(self, lent: Lent, *, cause: HeliosError) -> bool:
        """Tries to carry the lease on with a new stream for as long as it may live; False when it is lost."""
        wait_seconds = 0.05
        while time.monotonic() < self._safe_until:
            try:
                # However long it takes: the agent renews the lease while it checks.
                await self._give_back(lent)
                async with asyncio.timeout(max(0.0, self._safe_until - time.monotonic())):
                    ready = await self._open(lent.lease_id)
            except (Unavailable, TimeoutError):
                await asyncio.sleep(random.uniform(0, wait_seconds))  # noqa: S311 - jitter, not a secret
                wait_seconds = min(2 * wait_seconds, _RETRY_CAP_SECONDS)
            except HeliosError as error:
                cause = error
                break
            else:
                if not lent.descriptor_socket:
                    lent.path = ready.path
                log.info("lease resumed", revision=self._revision)
                return True
        lent.error = LeaseLost(f"the lease is lost: {cause.message}", metadata={"revision": self._revision})
        lent.lost.set()
        log.error("lease lost", revision=self._revision, reason=cause.reason)
        return False

    async def _give_back(self, lent: Lent) -> None:
        """Hands files in memory to an agent that was started anew; it says what it thinks of the lease afterwards.

        Raises:
            Unavailable: It does not listen yet.
        """
        if self._views is None or not lent.descriptor_socket:
            return
        try:
            await self._views.give_back(lent.descriptor_socket, lent.lease_id, self._revision)
            # The agent renewed it a third of its life ago at most.
            self._safe_until = max(self._safe_until, time.monotonic() + self._ttl_seconds / 3)
        except (PreconditionFailed, Corrupted) as error:
            log.warning("files in memory not taken back", revision=self._revision, reason=error.reason)

    async def _open(self, lease_id: str) -> pb.Ready:
        """Opens a stream and waits until the revision is lent."""
        self._drop_stream()
        want = pb.Want(revision=self._revision, lease_id=lease_id, holder=self._holder)
        want.ttl.FromMilliseconds(round(self._ttl_seconds * 1000))
        # No deadline: the stream lives as long as the lease.
        self._requests = _requests()
        self._stream = self._dialer.stub(StorageServiceStub).Materialize(self._requests)
        self._ended = ended = asyncio.Event()
        self._stream.add_done_callback(lambda _: ended.set())
        try:
            self._requests.put(pb.MaterializeRequest(want=want))
            while (answer := await self._read()).WhichOneof("message") == "progress":
                if self._on_progress is not None:
                    self._on_progress(progress_from_proto(answer.progress))
        except BaseException:
            self._drop_stream()
            raise
        if answer.WhichOneof("message") != "ready":
            raise Bug("the storage agent lent nothing")
        # Late by the answer's way, milliseconds against seconds; renewals count from when they were sent.
        self._safe_until = time.monotonic() + self._ttl_seconds
        return answer.ready

    async def _release(self) -> None:
        self._requests.put(pb.MaterializeRequest(release=pb.Release()))
        self._requests.finish()
        with contextlib.suppress(Unavailable):
            while True:
                await self._read()

    async def _read(self) -> pb.MaterializeResponse:
        assert self._stream is not None
        answer = await answer_of(self._stream.read())
        if not isinstance(answer, pb.MaterializeResponse):
            raise Unavailable("the storage agent closed the stream")
        return answer

    def _drop_stream(self) -> None:
        """Ends the stream; the lease lives on."""
        self._requests.close()
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


def _requests() -> StreamRequests[pb.MaterializeRequest]:
    return StreamRequests(max_count=_MAX_REQUESTS)


def _is_transport(error: Unavailable) -> bool:
    """Whether nobody answered, in contrast to an agent that answered UNAVAILABLE with a reason of its own."""
    return error.reason == Unavailable.default_reason
