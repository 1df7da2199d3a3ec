"""One durable request's way: from replica to replica, until its answer is whole, its client leaves, or nobody goes on.

A replica that drains says so and goes on; a search for another one runs beside it, and when there is one, the first is
left (make before break). One that finds no other keeps the answer for as long as it lives.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc.aio
import structlog
from google.api.httpbody_pb2 import HttpBody

from helios.api.fleet.v1 import replacement_service_pb2 as fleet_pb
from helios.api.fleet.v1 import replacement_service_pb2_grpc
from helios.api.inference.v1 import continuation_service_pb2 as pb
from helios.api.inference.v1 import continuation_service_pb2_grpc
from helios.mesh import names
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, InvalidRequest, ReplicaLost
from helios.mesh.status import error_from_rpc, openai_body
from helios.mesh.tasks import task_scope
from helios.proxy.relay import metrics
from helios.proxy.relay.journal import Journal, Next
from helios.proxy.relay.moves import Move, MoveTeller
from helios.proxy.relay.replicas import Replicas

log = structlog.get_logger()

Call: TypeAlias = pb.AnswerRequest.Call.ValueType
# What a replica reads of a request beside its message. The endpoint is the relay's, and the prompt's own replica is
# the first one's: a next one has most of the prompt to compute anyway.
_OWN_PREFIX: Final = "x-helios-"
_PASSED: Final = frozenset({names.REQUEST_ID_HEADER, names.SESSION_HEADER, "traceparent", "tracestate"})
_FIRST_ONLY: Final = frozenset({names.PREFILL_ENDPOINT_HEADER})
_NOT_PASSED: Final = frozenset({names.ENDPOINT_HEADER, names.BODY_BYTES_HEADER})
# What says that a replica is gone or goes, where others are of one that is there and refuses.
_LOST: Final = frozenset({"UNAVAILABLE", "REPLICA_LOST", "DRAINING"})
# What a proxy says that restarts, or nobody in its stead.
_PROXY_AWAY: Final = frozenset({"UNAVAILABLE", "DRAINING"})
_EVENTS: Final = "text/event-stream"
# Between two looks for a replica to move to, while the own one drains (a start takes as long at least), or for a proxy.
_LOOK_SECONDS: Final = 0.5
# A stream may be long, and has keepalive on its connection: this only bounds what nobody foresaw.
_LONGEST_SECONDS: Final = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all sessions share.

    Attributes:
        replicas: channels to replicas.
        proxies: channels to the proxies' control services, the first one's first.
        replace_seconds: how long another replica is waited for.
        barren_limit: replicas in a row that may break off without one token more.
        moves: tells proxies where answers went on.
    """

    replicas: Replicas
    proxies: Sequence[Dialer]
    replace_seconds: float
    barren_limit: int
    moves: MoveTeller


class _MovedError(Exception):
    """Another replica is there for an answer whose own drains."""


class Session:
    """One request. One task runs it; cancelling it ends everything."""

    def __init__(self, call: Call, request: bytes, context: Any, surroundings: Surroundings) -> None:
        self._call = call
        self._request = request
        self._context = context
        self._around = surroundings
        self._journal = Journal(surroundings.barren_limit)
        self._metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        self._endpoints = [each for each in self._metadata.get(names.ENDPOINT_HEADER, "").split(",") if each]
        self._is_first = True
        self._first_token_at: float | None = None

    async def run(self) -> None:
        """Answers. Raises HeliosErrors; after the first message they are told in band, too."""
        if not self._endpoints or names.ROUTE_REVISION_HEADER not in self._metadata:
            raise InvalidRequest("this request was not picked for: durable requests come through the edge")
        try:
            while not self._journal.is_finished:
                await self._go_on()
        except HeliosError as error:
            if self._journal.message_count and self._is_openai:
                data = b"data: " + openai_body(error) + b"\n\n"
                await self._context.write(HttpBody(content_type=_EVENTS, data=data).SerializeToString())
            raise

    @property
    def _is_openai(self) -> bool:
        return self._call in (pb.AnswerRequest.CALL_OPENAI_CHAT, pb.AnswerRequest.CALL_OPENAI_COMPLETION)

    async def _go_on(self) -> None:
        """Has one replica go on with the answer; where it breaks off, finds the next one, or raises."""
        endpoint, message_count = self._endpoints[0], self._journal.message_count
        try:
            await self._answer(endpoint)
        except _MovedError:
            metrics.MOVES.labels("draining", "moved").inc()
            self._tell(endpoint, self._endpoints[0], "DRAINING", is_drain=True)
            return
        except HeliosError as error:
            if self._journal.is_finished:
                # It broke off behind its end, which the client has.
                return
            if self._journal.broken(error) is Next.FAIL:
                raise
            since = time.monotonic()
            log.info(
                "replica broke off",
                request=self._request_id,
                endpoint=endpoint,
                reason=error.reason,
                tokens=len(self._journal.token_ids),
            )
            # What else was picked is as old as what this replica brought; where that is something, the proxy is asked.
            others = self._endpoints[1:] if self._journal.message_count == message_count else []
            self._endpoints = others or await self._replacement(error, since, failed=endpoint)
            metrics.MOVES.labels("broken", "moved").inc()
            self._tell(endpoint, self._endpoints[0], error.reason, since=since)

    async def _answer(self, endpoint: str) -> None:
        """Passes on what a replica says, until it is done.

        Raises _MovedError with the next replica in place, HeliosErrors of the replica and of the connection to it.
        """
        async with self._around.replicas.lend(endpoint) as dialer, task_scope() as group:
            stub = dialer.stub(continuation_service_pb2_grpc.ContinuationServiceStub)
            is_leaving = False
            call = stub.Answer(self._order(), metadata=self._passed(), timeout=self._remaining(_LONGEST_SECONDS))
            try:
                async for response in call:
                    await self._pass_on(response)
                    if response.is_leaving:
                        is_leaving = True
                        group.create_task(self._leave(call, endpoint), name="find another replica")
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from error
            except asyncio.CancelledError:
                # grpc.aio raises it in whoever reads from a call that was cancelled.
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise _MovedError from None
            finally:
                call.cancel()
            if not self._journal.is_finished:
                raise ReplicaLost("the replica ended an answer before its end")
            if is_leaving:
                metrics.MOVES.labels("draining", "stayed").inc()

    async def _pass_on(self, response: pb.AnswerResponse) -> None:
        for message in response.messages:
            await self._context.write(message)
        journal = self._journal
        if response.HasField("opening"):
            opening = response.opening
            journal.opened(opening.prompt_token_ids, opening.cached_prompt_tokens, opening.created)
        if self._first_token_at is None and response.steps.token_ids:
            self._first_token_at = time.monotonic()
        journal.delivered(len(response.messages), response.steps.token_ids, response.steps.sizes)
        journal.is_finished = response.is_finished

    async def _leave(self, call: Any, endpoint: str) -> None:
        """Looks for another replica while this one, which drains, goes on; leaves it when there is one.

        None is started for it: this one may as well end its answers, and where it may not, models in use are started
        elsewhere without being asked.
        """
        while True:
            # What has not begun, or is not streamed, this one may finish. And the proxy may hear of the drain later.
            if self._journal.has_progress:
                with contextlib.suppress(HeliosError):
                    self._endpoints = await self._pick(failed=endpoint, is_there_only=True)
                    call.cancel()
                    return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _replacement(self, error: HeliosError, since: float, *, failed: str) -> list[str]:
        try:
            return await self._pick(failed=failed if error.reason in _LOST else "")
        except HeliosError as refusal:
            metrics.MOVES.labels("broken", "lost").inc()
            self._tell(failed, "", f"{error.reason}, {refusal.reason}", since=since)
            if not self._journal.message_count:
                raise
            raise ReplicaLost(
                f"the replica is gone ({error.message}), and no other one could go on: {refusal.message}",
                metadata={"tokens": str(len(self._journal.token_ids)), "cause": refusal.reason},
                retry_after_seconds=refusal.retry_after_seconds or 1.0,
            ) from refusal

    def _tell(
        self, left: str, reached: str, reason: str, *, since: float | None = None, is_drain: bool = False
    ) -> None:
        """Has proxies told of a move. ``since``: when the replica broke off; None: the answer went on meanwhile."""
        now, first = time.monotonic(), self._first_token_at
        waited = now - since if since is not None else 0.0
        first_ago = now - first if first is not None else None
        count = len(self._journal.token_ids)
        move = Move(self._request_id, left, reached, is_drain, reason, count, waited, first_ago)
        self._around.moves.tell(move)

    async def _pick(self, *, failed: str, is_there_only: bool = False) -> list[str]:
        """Asks the proxies, one after the other, for replicas; waits for one that restarts. Raises HeliosErrors."""
        request = fleet_pb.PickReplicaRequest(
            request_id=self._request_id,
            model=self._metadata.get(names.ROUTE_MODEL_HEADER, ""),
            revision=self._metadata[names.ROUTE_REVISION_HEADER],
            failed_endpoints=[failed] if failed else [],
            body_bytes=len(self._request),
            is_there_only=is_there_only,
            session_id=self._metadata.get(names.SESSION_HEADER, ""),
        )
        deadline = time.monotonic() + self._remaining(self._around.replace_seconds)
        while True:
            refusal: HeliosError | None = None
            for proxy in self._around.proxies:
                stub = proxy.stub(replacement_service_pb2_grpc.ReplacementServiceStub)
                try:
                    response = await stub.PickReplica(request, timeout=max(0.0, deadline - time.monotonic()))
                except grpc.aio.AioRpcError as error:
                    # What one says that is there counts, whoever is away beside it.
                    if refusal is None or refusal.reason in _PROXY_AWAY:
                        refusal = error_from_rpc(error)
                else:
                    return list(response.endpoints)
            assert refusal is not None, "there is a proxy"
            is_last = time.monotonic() + _LOOK_SECONDS >= deadline
            if is_there_only or is_last or refusal.reason not in _PROXY_AWAY:
                raise refusal
            await asyncio.sleep(_LOOK_SECONDS)

    def _order(self) -> pb.AnswerRequest:
        order = pb.AnswerRequest(call=self._call, request=self._request)
        journal = self._journal
        if journal.has_progress:
            opening = order.progress.opening
            opening.prompt_token_ids.extend(journal.prompt)
            opening.cached_prompt_tokens, opening.created = journal.cached_prompt_tokens, journal.created
            order.progress.steps.token_ids.extend(journal.token_ids)
            order.progress.steps.sizes.extend(journal.sizes)
        return order

    def _passed(self) -> list[tuple[str, str]]:
        dropped = _NOT_PASSED if self._is_first else _NOT_PASSED | _FIRST_ONLY
        self._is_first = False
        return [
            (key, value)
            for key, value in self._metadata.items()
            if key in _PASSED or (key.startswith(_OWN_PREFIX) and key not in dropped)
        ]

    @property
    def _request_id(self) -> str:
        return self._metadata.get(names.REQUEST_ID_HEADER, "")

    def _remaining(self, limit_seconds: float) -> float:
        remaining: float | None = self._context.time_remaining()
        return limit_seconds if remaining is None else min(limit_seconds, remaining)
