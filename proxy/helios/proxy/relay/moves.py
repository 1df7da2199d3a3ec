"""Telling the proxies where answers went on, for whoever asks why one took its time (`helios why`).

An answer never waits for this: what is to be told stands in a queue, and what finds it full is not told.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc.aio
import structlog

from helios.api.fleet.v1 import replacement_service_pb2 as pb
from helios.api.fleet.v1.replacement_service_pb2_grpc import ReplacementServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.durations import seconds_to_proto

log = structlog.get_logger()

# A node that dies moves all that it had; each is told in some milliseconds.
_MOST_MOVES: Final = 4096
_CALL_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Move:
    """An answer left a replica. Times are spans in seconds.

    Attributes:
        request_id: its request's.
        left: the address of the replica that it was at.
        reached: of the one that goes on; empty: none does.
        is_drain: the first one drains and was left; else it broke off.
        reason: with what it broke off, and, where none goes on, why not.
        token_count: tokens that the client had by then.
        waited_seconds: for how long nobody worked on it.
        first_token_seconds: how long ago the client got the first token; None: it had none.
    """

    request_id: str
    left: str
    reached: str
    is_drain: bool
    reason: str
    token_count: int
    waited_seconds: float = 0.0
    first_token_seconds: float | None = None


class MoveTeller:
    """Tells one proxy after the other until one knows the request. `run` must be running."""

    def __init__(self, proxies: Sequence[Dialer]) -> None:
        """``proxies`` are channels to their control services."""
        self._proxies = proxies
        self._queue: asyncio.Queue[Move] = asyncio.Queue(_MOST_MOVES)

    def tell(self, move: Move) -> None:
        """Has a move told; never blocks."""
        try:
            self._queue.put_nowait(move)
        except asyncio.QueueFull:
            log.debug("a move is not told", request=move.request_id)

    async def run(self) -> None:
        """Tells until cancelled."""
        while True:
            move = await self._queue.get()
            request = move_to_proto(move)
            for proxy in self._proxies:
                try:
                    response = await proxy.stub(ReplacementServiceStub).NoteMove(request, timeout=_CALL_SECONDS)
                except grpc.aio.AioRpcError:
                    # It restarts, or knows no such call yet.
                    continue
                if response.is_noted:
                    break


def move_to_proto(move: Move) -> pb.NoteMoveRequest:
    """Writes a move."""
    request = pb.NoteMoveRequest(
        request_id=move.request_id,
        left_endpoint=move.left,
        reached_endpoint=move.reached,
        is_drain=move.is_drain,
        reason=move.reason,
        token_count=move.token_count,
        waited=seconds_to_proto(move.waited_seconds),
    )
    if move.first_token_seconds is not None:
        request.first_token_ago.CopyFrom(seconds_to_proto(move.first_token_seconds))
    return request
