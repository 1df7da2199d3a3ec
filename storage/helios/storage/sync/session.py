"""The stream with the registry: what is here, what is wanted, and who may read what from the cloud.

One stream at a time, begun anew whenever it ends, each with everything in it: the registry keeps nothing. Messages to
the registry wait in a bounded outbox; a registry that does not read ends the session. What is asked while there is no
session waits for one for a few seconds; after that the answer is that this node is alone, and reads for itself.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import grpc.aio
import structlog

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import Unavailable
from helios.mesh.requests import StreamRequests
from helios.mesh.tasks import keep_running, task_scope
from helios.mesh.transfer.spans import Span
from helios.storage.prefetch.state import Plan, Report
from helios.storage.prefetch.wire import plan_from_proto, report_to_proto
from helios.storage.sync.holdings import Holdings, apply, next_change

log = structlog.get_logger()


_Stream = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]
_Requests = StreamRequests[pb.SessionRequest]

_MAX_MESSAGES: Final = 4_096
"""More than all fetches of a node say in a minute."""

_WELCOME_SECONDS: Final = 10.0
_ACK_SECONDS: Final = 30.0
_CLAIM_SECONDS: Final = 10.0
"""A registry answers a claim from memory. One that is later is as good as away."""

_LOOK_SECONDS: Final = 1.0
"""How often what is here is compared with what was told: a thousandth of a core for 10,000 blobs."""

_SILENT_INTERVALS: Final = 5


@dataclass(frozen=True, slots=True)
class Peer:
    """Another agent that holds a blob, or some of it."""

    node: str
    address: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """Spans that this node is to read from the cloud, and who has, or reads, some of the others."""

    granted: tuple[Span, ...]
    holders: tuple[Peer, ...] = ()


class Interest(Protocol):
    """One fetch of a blob, as a session sees it. Called on the event loop."""

    @property
    def hash(self) -> str:
        """sha256 of the blob."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of the whole blob."""
        ...

    def held(self) -> list[Span]:
        """What is here, verified."""
        ...

    def meet(self, peers: Sequence[Peer]) -> None:
        """Takes all who hold the blob by now."""
        ...


class PrefetchPort(Protocol):
    """What fetches ahead, as a session sees it. Called on the event loop."""

    def take(self, plan: Plan) -> None:
        """Takes a plan, which replaces the one before."""
        ...

    def report(self) -> Report:
        """What became of it."""
        ...


class SyncSession:
    """This node's session. `run` keeps it; everything else may be called whether or not there is one."""

    def __init__(
        self,
        dialer: Dialer,
        *,
        node: str,
        holdings: Callable[[], Holdings],
        prefetch: PrefetchPort | None = None,
        patience_seconds: float = 5.0,
    ) -> None:
        """Takes an open dialer to the registry, and what is asked for what is here.

        `patience_seconds`: after so long without a session this node reads from the cloud without asking.
        """
        self._dialer = dialer
        self._node = node
        self._holdings = holdings
        self._prefetch = prefetch
        self._patience_seconds = patience_seconds
        self._interests: dict[str, Interest] = {}
        self._claims: dict[int, asyncio.Future[ClaimAnswer | None]] = {}
        self._last_id = 0
        self._requests: _Requests | None = None
        self._told = Holdings()
        self._acked = asyncio.Event()
        self._connected = asyncio.Event()
        self._lost_at = time.monotonic()

    @property
    def is_connected(self) -> bool:
        """Whether a registry listens."""
        return self._connected.is_set()

    async def run(self, address: str) -> None:
        """Keeps a session until cancelled; `address` is where others reach this node, empty: nowhere."""
        await keep_running("sync session", lambda: self._converse(address), cap_seconds=2.0)

    def want(self, interest: Interest) -> None:
        """Tells that a blob is being fetched; its holders are told from now on."""
        self._interests[interest.hash] = interest
        self._send(_want(interest))

    def unwant(self, interest: Interest, *, is_whole: bool) -> None:
        """Tells that a fetch has ended. Idempotent."""
        if self._interests.get(interest.hash) is not interest:
            return
        del self._interests[interest.hash]
        self._send(pb.SessionRequest(unwant=pb.BlobUnwant(hash=interest.hash, is_whole=is_whole)))
        if is_whole and self.is_connected:
            # The registry knows it by this; if it goes at once, that must be told.
            self._told = Holdings(self._told.blobs | {interest.hash}, self._told.revisions)

    async def claim(
        self, hash_: str, spans: Sequence[Span], *, limit: int, excluded: Collection[str] = ()
    ) -> ClaimAnswer | None:
        """Asks for spans to read from the cloud, the most urgent first; None: nobody is there to ask, read."""
        if not await self._wait_connected():
            return None
        self._last_id += 1
        request = pb.ClaimRequest(
            request_id=self._last_id, hash=hash_, spans=_spans(spans), limit=limit, excluded_nodes=excluded
        )
        answer: asyncio.Future[ClaimAnswer | None] = asyncio.get_running_loop().create_future()
        self._claims[request.request_id] = answer
        try:
            self._send(pb.SessionRequest(claim=request))
            async with asyncio.timeout(_CLAIM_SECONDS):
                return await answer
        except TimeoutError:
            log.warning("the registry does not answer a claim", hash=hash_)
            return None
        finally:
            self._claims.pop(request.request_id, None)

    def end_claims(self, hash_: str, *, done: Iterable[Span] = (), given_up: Iterable[Span] = ()) -> None:
        """Tells spans that are here now, and spans that somebody else is to read."""
        ended = pb.ClaimsEnded(hash=hash_, done=_spans(done), given_up=_spans(given_up))
        self._send(pb.SessionRequest(claims_ended=ended))

    async def _wait_connected(self) -> bool:
        left = self._lost_at + self._patience_seconds - time.monotonic()
        if not self.is_connected and left > 0:
            try:
                async with asyncio.timeout(left):
                    await self._connected.wait()
            except TimeoutError:
                log.warning("no session with the registry: fetching without asking others")
        return self.is_connected

    def _send(self, message: pb.SessionRequest) -> None:
        # Without a session it is lost: the next one begins with all that counts.
        if self._requests is not None and not self._requests.put(message):
            log.warning("the registry does not read what it is told: the session ends")
            self._requests.close()
            self._requests = None

    async def _converse(self, address: str) -> None:
        hello = pb.SessionRequest(hello=pb.AgentHello(node=self._node, address=address))
        requests = _Requests(hello, max_count=_MAX_MESSAGES)
        stream: _Stream = self._dialer.stub(SyncServiceStub).Session(requests)
        try:
            welcome = await self._welcome(stream)
            interval = min(max(welcome.heartbeat_interval.ToTimedelta().total_seconds(), 0.05), 60.0)
            self._begin(requests)
            requests.beat(interval, _heartbeat)
            log.info("sync session open", node=self._node, address=address)
            async with task_scope() as group:
                group.create_task(self._tell_holdings(), name="tell holdings")
                if self._prefetch is not None:
                    group.create_task(self._tell_prefetches(self._prefetch), name="tell prefetches")
                await self._read(stream, interval)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._end()
            requests.close()
            stream.cancel()

    def _begin(self, requests: _Requests) -> None:
        self._requests = requests
        self._told = Holdings()
        for interest in self._interests.values():
            self._send(_want(interest))
        self._connected.set()

    def _end(self) -> None:
        if self.is_connected:
            self._lost_at = time.monotonic()
        self._connected.clear()
        self._requests = None
        for answer in self._claims.values():
            if not answer.done():
                answer.set_result(ClaimAnswer(()))

    async def _welcome(self, stream: _Stream) -> pb.SyncWelcome:
        async with asyncio.timeout(_WELCOME_SECONDS):
            response = await _next(stream)
        if response.WhichOneof("message") != "welcome":
            raise Unavailable("the registry did not answer the hello with a welcome", reason="WELCOME_EXPECTED")
        return response.welcome

    async def _read(self, stream: _Stream, interval: float) -> None:
        while True:
            try:
                async with asyncio.timeout(_SILENT_INTERVALS * interval):
                    response = await _next(stream)
            except TimeoutError as error:
                raise Unavailable("the registry was silent for too long", reason="SESSION_SILENT") from error
            self._take(response)

    def _take(self, response: pb.SessionResponse) -> None:
        match response.WhichOneof("message"):
            case "inventory_ack":
                self._acked.set()
            case "holders":
                interest = self._interests.get(response.holders.hash)
                if interest is not None:
                    interest.meet(_peers(response.holders.holders))
            case "claim_result":
                result = response.claim_result
                answer = self._claims.get(result.request_id)
                granted = tuple((span.offset, span.offset + span.length) for span in result.granted)
                if answer is not None and not answer.done():
                    answer.set_result(ClaimAnswer(granted, tuple(_peers(result.holders))))
            case "prefetch_plan":
                if self._prefetch is not None:
                    self._prefetch.take(plan_from_proto(response.prefetch_plan))
            case _:
                # A heartbeat, or what a newer registry says.
                pass

    async def _tell_prefetches(self, prefetch: PrefetchPort) -> None:
        told: Report | None = None
        while True:
            if (report := prefetch.report()) != told:
                self._send(pb.SessionRequest(prefetch_report=report_to_proto(report)))
                told = report
            await asyncio.sleep(_LOOK_SECONDS)

    async def _tell_holdings(self) -> None:
        sequence = 0
        while True:
            change = next_change(self._told, self._holdings())
            if not change:
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            sequence += 1
            self._acked.clear()
            inventory = pb.Inventory(
                sequence=sequence,
                blobs=change.blobs,
                gone_blobs=change.gone_blobs,
                revisions=change.revisions,
                gone_revisions=change.gone_revisions,
            )
            self._send(pb.SessionRequest(inventory=inventory))
            self._told = apply(self._told, change)
            try:
                async with asyncio.timeout(_ACK_SECONDS):
                    await self._acked.wait()
            except TimeoutError as error:
                raise Unavailable("the registry takes no inventory", reason="SESSION_SILENT") from error


def _heartbeat() -> pb.SessionRequest:
    return pb.SessionRequest(heartbeat=pb.SyncHeartbeat())


def _want(interest: Interest) -> pb.SessionRequest:
    held = _spans(interest.held())
    return pb.SessionRequest(want=pb.BlobWant(hash=interest.hash, size_bytes=interest.size_bytes, held=held))


def _spans(spans: Iterable[Span]) -> list[pb.Span]:
    return [pb.Span(offset=start, length=end - start) for start, end in spans]


def _peers(holders: Iterable[pb.BlobHolder]) -> list[Peer]:
    return [Peer(holder.node, holder.address, holder.is_whole) for holder in holders if holder.address]


async def _next(stream: _Stream) -> pb.SessionResponse:
    response = await stream.read()
    if not isinstance(response, pb.SessionResponse):
        raise Unavailable("the registry closed the session", reason="SESSION_CLOSED")
    return response
