"""What a gateway is told of a model's replicas ten times a second, to pick among them by itself, and what it tells.

Each of Envoy's threads asks for each of its models, and tells of each pick, so little is done for one: a record in the
journal, a place at its replica, if that has not told of it yet, and where its prompt is now.
"""

import hashlib
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

from helios.api.proxy.v1 import lane_service_pb2 as pb
from helios.mesh.identity import SpiffeId
from helios.mesh.server import check_peer
from helios.proxy import metrics
from helios.proxy.catalogue import ModelEntry
from helios.proxy.express.express import LEASE_SECONDS
from helios.proxy.express.granting import LaneView
from helios.proxy.express.told import take_first, take_late
from helios.proxy.routing.losses import HASH_END
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.prefix import NO_BLOCKS, Blocks
from helios.proxy.routing.table import Candidate
from helios.proxy.runtime import Runtime

SERVICE: Final = "helios.api.proxy.v1.LaneService"
METHOD: Final = f"/{SERVICE}/Renew"
_EDGE: Final = frozenset({"edge"})
_RENEW_MILLISECONDS: Final = 100
_LEASE_MILLISECONDS: Final = round(1000 * LEASE_SECONDS)
# What a gateway tells at most; whoever tells more is none of ours.
_PICK_COUNT: Final = 1024
# A UUID has 36.
_ID_LENGTH: Final = 64
# A prompt of 100 kB, the longest request that takes the lane.
_BLOCK_COUNT: Final = 400
# A pick that is told of so late is no older for the journal.
_TOLD_SECONDS: Final = 60.0
_NOTHING: Final = b""


class Renewing:
    """Answers gateways, at once."""

    def __init__(self, runtime: Runtime, *, own: SpiffeId | None) -> None:
        """``own`` is who the proxy is; None lets everybody in (no TLS)."""
        self._core = runtime.core
        self._journal = runtime.journal
        self._own = own
        # No client can make hashes collide that it does not know the beginning of.
        self._secret = secrets.token_bytes(16)

    def answer(self, message: bytes, caller: Any) -> bytes:
        """Answers a RenewRequest.

        Raises:
            PermissionDenied: the caller is no edge.
            google.protobuf.message.DecodeError: it is no RenewRequest.
        """
        if self._own is not None:
            check_peer(caller, _EDGE, SERVICE, self._own)
        request = pb.RenewRequest.FromString(message)
        entry = self._core.catalogue.get(request.model)
        if entry is None:
            return _NOTHING
        now = time.monotonic()
        metrics.LANE_UNTOLD.inc(request.untold_count)
        if request.picks:
            self._take(entry, request, now)
        view = self._core.express.lease(entry, now)
        return self._granted(entry, view, request.loss_sequence) if view is not None else _NOTHING

    def _take(self, entry: ModelEntry, request: pb.RenewRequest, now: float) -> None:
        told = request.picks[:_PICK_COUNT]
        picks = self._core.express.picks_told(entry.name, frozenset(pick.replica_id for pick in told))
        if not picks:
            return
        traffic, journal, new_count = self._core.traffic, self._journal, 0
        excluded = traffic.exclusions(entry.name)
        weights = traffic.rules_of(entry.name).weights
        for one in told:
            request_id, replica_id = one.request_id, one.replica_id
            pick = picks.get(replica_id)
            if pick is None or not 0 < len(request_id) <= _ID_LENGTH:
                continue
            blocks = _blocks(one.blocks) if weights.prefix else NO_BLOCKS
            pick = _as_told(pick, one, len(blocks))
            at = now - _age(request.now_seconds - one.picked_seconds)
            arrived_id = journal.told(request_id, (entry.name, pick, excluded, "", at, at))
            if arrived_id:
                take_late(traffic, entry, arrived_id, request_id, blocks, is_retried=arrived_id != replica_id)
            else:
                new_count += 1
                take_first(traffic, entry, replica_id, request_id, blocks, now=now)
        for replica_id in picks:
            traffic.rescore(replica_id)
        metrics.EXPRESS.inc(new_count)

    def _granted(self, entry: ModelEntry, view: LaneView, known_sequence: int) -> bytes:
        response = pb.RenewResponse(
            lease_milliseconds=_LEASE_MILLISECONDS,
            renew_milliseconds=_RENEW_MILLISECONDS,
            revision=view.revision,
            seed=self._seed(view.revision),
            retry_count=view.retry_count,
            running_weight=view.running_weight,
            prefix_weight=view.prefix_weight,
            session_weight=view.session_weight,
            context_tokens=view.context_tokens,
            tokens_per_byte=view.tokens_per_byte,
            loss_sequence=self._core.traffic.losses.sequence,
        )
        for replica_id, address, fixed_score, running_count, room in view.candidates:
            response.candidates.add(
                replica_id=replica_id,
                address=address,
                fixed_score=fixed_score,
                running_count=running_count,
                room_plus_one=0 if room is None else room + 1,
            )
        if known_sequence:
            self._tell_losses(entry, known_sequence, response)
        return response.SerializeToString()

    def _tell_losses(self, entry: ModelEntry, known_sequence: int, response: pb.RenewResponse) -> None:
        replica_ids = {replica.replica_id for replica in self._core.fleet.replicas_of(entry.name)}
        losses = self._core.traffic.losses.since(known_sequence, replica_ids)
        if losses is None:
            response.forgets_all = True
            return
        for replica_id, blocks in losses.items():
            response.losses.add(replica_id=replica_id, blocks=blocks)

    def _seed(self, revision: str) -> int:
        digest = hashlib.blake2b(revision.encode(), key=self._secret, digest_size=8).digest()
        return int.from_bytes(digest, "big") % HASH_END


def _blocks(told: Iterable[int]) -> Blocks:
    blocks = tuple(told)[:_BLOCK_COUNT]
    # A larger one is nobody's hash: that it was lost would not be noted.
    return Blocks(blocks) if blocks and max(blocks) < HASH_END else NO_BLOCKS


def _age(seconds: float) -> float:
    # What is no number compares with none.
    return min(seconds, _TOLD_SECONDS) if seconds > 0 else 0.0


def _as_told(pick: Pick, told: pb.LanePick, block_count: int) -> Pick:
    """A replica's pick, with what was told of this one."""
    prefix_score = min(told.held_count / block_count, 1.0) if block_count else 0.0
    score = min(told.score, 1.0) if told.score > 0 else 0.0
    replica_id, address, _, queue, running, kv, _, _, locality, context = pick.choices[0]
    # By `_replace` it would be a third of all that is done for a pick.
    at_home = 1.0 if told.is_home else 0.0
    best = (Candidate(replica_id, address, score, queue, running, kv, prefix_score, at_home, locality, context),)
    weights = pick.weights
    drawn = (weights.prefix if prefix_score else 0.0, weights.session if at_home else 0.0)
    return Pick(pick.model, pick.revision, best, pick.candidate_count, best, "", True, weights, *drawn)
