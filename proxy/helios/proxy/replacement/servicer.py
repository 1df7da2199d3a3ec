"""ReplacementService: picks for requests that are under way already, and where they went on.

They passed keys, limits and the queue when they were picked for first, so nothing of that is asked again; they are
picked and, where there is no replica, held like any request. The ledger knows them by the id that they have.
"""

import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from helios.api.fleet.v1 import replacement_service_pb2 as pb
from helios.api.fleet.v1 import replacement_service_pb2_grpc
from helios.mesh.durations import seconds_from_proto
from helios.mesh.errors import HeliosError, InvalidRequest, NoReadyReplica
from helios.proxy.catalog.servicer import find_model
from helios.proxy.catalog.session import ModelSource
from helios.proxy.catalogue import ModelEntry, addressed_name, shown
from helios.proxy.explain.record import Move
from helios.proxy.peers.calls import PeerCalls
from helios.proxy.routing.pick import Pick, Wishes
from helios.proxy.runtime import Arrival, Runtime

REPLACEMENT_SERVICE: Final = "helios.api.fleet.v1.ReplacementService"
_RETRY_SECONDS: Final = 1.0


class ReplacementServicer(replacement_service_pb2_grpc.ReplacementServiceServicer):
    """Answers the relay."""

    def __init__(
        self, runtime: Runtime, models: ModelSource, *, hold_limit_seconds: float, peers: PeerCalls | None = None
    ) -> None:
        """``peers``: calls of other proxies; None: there are none."""
        self._peers = peers
        self._runtime = runtime
        self._core = runtime.core
        self._models = models
        self._hold_limit_seconds = hold_limit_seconds

    async def PickReplica(self, request: pb.PickReplicaRequest, context: Any) -> pb.PickReplicaResponse:
        """Picks a replica, or waits for one."""
        now = time.monotonic()
        entry = await find_model(self._runtime, self._models, request.model)
        entry = self._of_revision(entry, request.revision)
        failed = frozenset(request.failed_endpoints)
        if not request.is_there_only:
            self._give_up(entry, failed, now)
        self._runtime.meter.picked_again(
            request.request_id, is_ours=self._core.traffic.ledger.is_ours(request.request_id)
        )
        adapter = request.model if request.model in entry.adapters else ""
        # Another replica of the same revision may have had a prompt that begins alike, and saves most of this one.
        blocks = self._core.traffic.prompt_of(request.request_id)
        wishes = Wishes(blocks, request.session_id)
        pick = self._core.pick(entry, request.request_id, now, adapter, wishes)
        if pick is None and not request.is_there_only:
            pick = await self._wait(entry, request, context, now)
        endpoints = [choice.address for choice in pick.choices] if pick is not None else []
        if request.is_there_only:
            # A replica that drains is not given up: the news of its drain is on its way.
            endpoints = [endpoint for endpoint in endpoints if endpoint not in failed]
        if not endpoints:
            raise NoReadyReplica(
                f"no other replica of '{shown(entry.name)}' takes requests now", retry_after_seconds=_RETRY_SECONDS
            )
        assert pick is not None, "whoever has endpoints was picked"
        goes_to = next(choice.replica_id for choice in pick.choices if choice.address == endpoints[0])
        self._core.traffic.prompt_sent(entry, goes_to, request.request_id, blocks)
        return pb.PickReplicaResponse(endpoints=endpoints)

    async def _wait(self, entry: ModelEntry, request: pb.PickReplicaRequest, context: Any, now: float) -> Pick:
        remaining: float | None = context.time_remaining()
        limit = self._hold_limit_seconds
        began_wall = datetime.now(UTC).timestamp()
        arrival = Arrival(request.request_id, request.model, now, began_wall=began_wall, is_continued=True)
        try:
            return await self._runtime.wait_pick(
                entry, arrival, size_bytes=request.body_bytes, deadline=now + min(limit, remaining or limit)
            )
        except HeliosError:
            # Of the request itself the relay knows more, and tells (NoteMove).
            self._runtime.journal.left(entry.name, request.request_id, time.monotonic())
            raise

    async def NoteMove(self, request: pb.NoteMoveRequest, context: Any) -> pb.NoteMoveResponse:
        """Remembers where an answer went on, or has the proxy remember it that knows the request."""
        if not request.request_id or not request.left_endpoint:
            raise InvalidRequest("a move has a request_id and a left_endpoint", reason="INVALID_MOVE")
        if self._note(request):
            return pb.NoteMoveResponse(is_noted=True)
        if self._peers is None:
            return pb.NoteMoveResponse(is_noted=False)
        stub = replacement_service_pb2_grpc.ReplacementServiceStub
        for address in self._peers.addresses(context):
            with suppress(HeliosError):
                if (await self._peers.ask(address, stub, "NoteMove", request, context)).is_noted:
                    return pb.NoteMoveResponse(is_noted=True)
        return pb.NoteMoveResponse(is_noted=False)

    def _note(self, request: pb.NoteMoveRequest) -> bool:
        now, journal = time.monotonic(), self._runtime.journal
        record = journal.find(request.request_id)
        if record is None:
            return False
        by_address = {replica.address: replica.replica_id for replica in self._core.fleet.replicas_of(record.model)}
        # One that died is in the pick.
        considered = record.pick.considered if record.pick is not None else ()
        by_address |= {candidate.address: candidate.replica_id for candidate in considered}
        left, reached = request.left_endpoint, request.reached_endpoint
        move = Move(
            left=by_address.get(left, left),
            reached=by_address.get(reached, reached),
            is_drain=request.is_drain,
            reason=request.reason,
            token_count=request.token_count,
            waited_seconds=seconds_from_proto(request.waited),
            at=now,
        )
        first_at = now - seconds_from_proto(request.first_token_ago) if request.HasField("first_token_ago") else None
        return journal.moved_on(request.request_id, move, first_at)

    def _of_revision(self, entry: ModelEntry, revision: str) -> ModelEntry:
        """The entry that has the revision now: the model's own, its canary's, or one that a tag or digest names."""
        if entry.revision == revision:
            return entry
        base = entry.name.partition("@")[0]
        for name in (entry.canary, base, addressed_name(base, revision)):
            other = self._core.catalogue.get(name) if name else None
            if other is not None and other.revision == revision:
                return other
        raise NoReadyReplica(
            f"the revision of '{shown(entry.name)}' that began this answer is not served any more",
            reason="REVISION_GONE",
            metadata={"revision": revision},
            retry_after_seconds=_RETRY_SECONDS,
        )

    def _give_up(self, entry: ModelEntry, addresses: frozenset[str], now: float) -> None:
        """Opens the breakers of replicas that broke answers off: the worker's word of their death is on its way, and
        where they live, a probe will show it.
        """
        traffic = self._core.traffic
        for replica in self._core.fleet.replicas_of(entry.name):
            if replica.address in addresses:
                traffic.breakers.trip(replica.replica_id, now)
                traffic.refresh(replica.replica_id)
