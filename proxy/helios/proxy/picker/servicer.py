"""The endpoint picker: Envoy's external processor.

The numbered conversation, one stream a request, of those that one question (`check`) did not settle:
    1. Envoy → request headers, with the model that it lifted from a JSON body as dynamic metadata.
    2. picker → headers to set (where to go), or an immediate response (an error). A hold is an answer that comes later.
    Where neither header nor metadata names a model, and where several replicas could take a prompt:
    2. picker → "send the body", 3. Envoy → the body, 4. as 2.

Requests of the mesh pass here, so this server has no interceptors: the caller's identity is checked and errors
are mapped in this module.
"""

import asyncio
import base64
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from helios.mesh import names, status
from helios.mesh.errors import Draining, HeliosError, InvalidRequest, PermissionDenied, Unsupported
from helios.mesh.identity import SpiffeId
from helios.mesh.server import check_peer
from helios.proxy import metrics
from helios.proxy.catalog.servicer import find_model
from helios.proxy.catalog.session import ModelSource
from helios.proxy.catalogue import ModelEntry
from helios.proxy.explain.record import Refusal
from helios.proxy.picker.choosing import OVERWRITE, Asked, Chooser, lifted_model, session_key
from helios.proxy.picker.exchange import Exchange
from helios.proxy.picker.gate import Gate
from helios.proxy.picker.prompt import NO_PROMPT
from helios.proxy.picker.request import (
    INFERENCE_PREFIX,
    INLINE_BODY_BYTES,
    OPENAI_PREFIX,
    Body,
    Heads,
    agree,
    missing_model,
    read_body,
    read_heads,
    timeout_seconds,
)
from helios.proxy.rollouts import Assignment
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.prefix import Blocks
from helios.proxy.runtime import Arrival, Runtime

log = structlog.get_logger()

EXT_PROC_SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
_EXT_PROC_FILTER: Final = "envoy.filters.http.ext_proc"
_EDGE: Final = frozenset({"edge"})


class PickerServicer(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Answers Envoy. One stream is one request."""

    def __init__(
        self,
        runtime: Runtime,
        models: ModelSource,
        *,
        chooser: Chooser,
        hold_limit_seconds: float,
        own: SpiffeId | None,
    ) -> None:
        """``own`` is who the proxy is; None lets everybody in (no TLS)."""
        self._runtime = runtime
        self._core = runtime.core
        self._journal = runtime.journal
        self._models = models
        self._chooser = chooser
        self._hold_limit_seconds = hold_limit_seconds
        self._own = own

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(self, server)

    async def Process(self, _: Any, context: Any) -> None:
        """Serves one request."""
        exchange = await self._begun(context)
        if exchange is None:
            return
        arrived_at, request = time.monotonic(), exchange.request
        heads = read_heads(_header_map(request.request_headers.headers.headers))
        gate = Gate(self._core, heads)
        lifted = _lifted(request)
        began, body, model = _began(request), None, heads.model
        try:
            gate.identify()
            model = agree(heads.model, lifted_model(lifted))
            if not model:
                _check_path(heads.path)
                body = await _body(exchange, heads)
                model = body.model
            served = entry = self._core.resolve(model) or await find_model(self._runtime, self._models, model)
            gate.rank(lifted, body)
            if not gate.admit(entry, model, lifted):
                await gate.wait_admitted(entry, lifted, self._runtime.peers)
            split = Assignment(entry)
            if entry.canary:
                split = self._core.rollouts.assign(
                    entry, model, session_key(heads, lifted), time.monotonic(), band=gate.caller.priority
                )
                entry = split.entry
            if body is None and self._chooser.wants_prompt(entry, heads):
                body = await _prompt(exchange, heads)
                # While Envoy sent it, the canary may have gone away.
                split = self._core.rollouts.still(split, served, band=gate.caller.priority)
                entry = split.entry
            wishes = self._chooser.wishes(entry, model, body, heads, lifted)
            body = None  # A request that waits keeps none here.
            if split.outcome:
                metrics.ROLLOUT_REQUESTS.labels(served.name, split.outcome).inc()
            asked = Asked(model, heads, gate.caller, arrived_at, began)
            pick = self._chooser.pick(entry, asked, wishes, split=split.why) or await self._hold(entry, asked, context)
            gate.is_passed = True
        except Draining as error:
            # No answer but a broken stream: Envoy asks another proxy, or this one once it is back.
            await status.abort(context, error)
        except HeliosError as error:
            self._note_refusal(model, heads, arrived_at, began, error)
            await context.write(_refusal(error, gate.refusal_headers()))
            return
        finally:
            gate.leave()
        await context.write(_answer(exchange, self._chooser.headers(pick, entry, asked, wishes, gate)))
        self._sent_soon(entry, pick.choices[0].replica_id, heads.request_id, wishes.blocks)

    def _sent_soon(self, entry: ModelEntry, replica_id: str, request_id: str, blocks: Blocks) -> None:
        """Notes a prompt behind the answer, which leaves at the end of this turn of the loop: a long one has many
        blocks.
        """
        asyncio.get_running_loop().call_soon(self._core.traffic.prompt_sent, entry, replica_id, request_id, blocks)

    async def _begun(self, context: Any) -> Exchange | None:
        """Reads what comes first, and makes sure that an edge asks; None where there is nothing to read."""
        request = await context.read()
        if request is grpc.aio.EOF:
            return None
        if self._own is not None:
            # After the first message: grpc.aio's client hides an answer that comes while it still sends.
            try:
                check_peer(context, _EDGE, EXT_PROC_SERVICE, self._own)
            except PermissionDenied as error:
                await status.abort(context, error)
        if not request.HasField("request_headers"):
            await status.abort(context, InvalidRequest("the first message must be the request's headers"))
        return Exchange(context, request)

    async def _hold(self, entry: ModelEntry, asked: Asked, context: Any) -> Pick:
        limit, heads = self._hold_limit_seconds, asked.heads
        own = timeout_seconds(heads.timeout)
        began_at = _began_at(asked.began)
        # Counted from the request's start: a hold that moved here from another proxy does not begin anew.
        age_seconds = max(0.0, (datetime.now(UTC) - began_at).total_seconds()) if began_at is not None else 0.0
        budget = min(limit, own if own is not None else limit) - age_seconds
        arrival = Arrival(
            heads.request_id,
            asked.model,
            asked.arrived_at,
            began=asked.began,
            began_wall=(began_at or datetime.now(UTC)).timestamp(),
            traceparent=_trace_of(context) or heads.traceparent,
            caller=asked.caller,
        )
        deadline = time.monotonic() + budget
        pick = await self._runtime.wait_pick(entry, arrival, size_bytes=heads.body_bytes, deadline=deadline)
        metrics.RELEASED.inc()
        return pick

    def _note_refusal(self, model: str, heads: Heads, arrived_at: float, began: str, error: HeliosError) -> None:
        metrics.PICKS.labels(error.reason.lower()).inc()
        log.debug("request refused", request=heads.request_id, reason=error.reason, error=error.message)
        code = int(grpc.StatusCode[error.grpc_code].value[0])
        refusal = Refusal(error.reason, error.message, code, error.retry_after_seconds)
        entry = self._core.catalogue.find(model)
        self._journal.refused(
            heads.request_id,
            refusal,
            name=model,
            began=began,
            model=entry.name if entry is not None else "",
            revision=entry.revision if entry is not None else "",
            arrived_at=arrived_at,
            now=time.monotonic(),
        )


def _header_map(headers: Any) -> dict[str, str]:
    return {header.key: (header.raw_value or header.value.encode()).decode("utf-8", "replace") for header in headers}


def _lifted(request: Any) -> Any:
    """What Envoy lifted from a JSON body.

    A map of messages answers for a key that it has not with an empty message: half the time of asking first.
    """
    return request.metadata_context.filter_metadata[names.METADATA_NAMESPACE].fields


def _check_path(path: str) -> None:
    if not path.startswith((OPENAI_PREFIX, INFERENCE_PREFIX)):
        raise missing_model()


async def _body(exchange: Exchange, heads: Heads) -> Body:
    body = await exchange.body()
    if body is None:
        raise missing_model()
    if len(body) <= INLINE_BODY_BYTES:
        return read_body(heads.path, body)
    return await asyncio.to_thread(read_body, heads.path, body)


async def _prompt(exchange: Exchange, heads: Heads) -> Body:
    """The body, for its prompt alone: what is wrong with it is the replica's to say, which reads all of it."""
    try:
        return await _body(exchange, heads)
    except (InvalidRequest, Unsupported):
        return Body("", NO_PROMPT)


def _began(request: Any) -> str:
    """When Envoy began with the request; empty where it does not say (`request_attributes: [request.time]`)."""
    return str(request.attributes[_EXT_PROC_FILTER].fields["request.time"].string_value)


def _began_at(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _trace_of(context: Any) -> str:
    """The trace context of Envoy's call, where Envoy traces: its span is a child of the client's."""
    metadata = context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == "traceparent"), "")


def _answer(exchange: Exchange, found: Mapping[str, str]) -> Any:
    response = ext_proc.ProcessingResponse()
    part = exchange.part(response)
    if names.CLUSTER_HEADER in found or names.DURABLE_HEADER in found:
        # The route was chosen before its cluster was named, or before it was known that it is the relay's.
        part.response.clear_route_cache = True
    for name, value in found.items():
        _set(part.response.header_mutation.set_headers, name, value.encode())
    return response


def _refusal(error: HeliosError, more: dict[str, str]) -> Any:
    response = ext_proc.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = error.http_status
    immediate.grpc_status.status = grpc.StatusCode[error.grpc_code].value[0]
    immediate.body = error.message.encode()
    immediate.details = error.reason.lower()
    for key, text in {names.REFUSAL_REASON_HEADER: error.reason.lower(), **more}.items():
        _set(immediate.headers.set_headers, key, text.encode())
    for key, value in status.trailing_metadata(error):
        # Envoy sends headers as they are; gRPC wants binary ones in base64.
        raw = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        _set(immediate.headers.set_headers, key, raw)
    return response


def _set(headers: Any, name: str, value: bytes) -> None:
    """Adds to the headers that Envoy is to set, whatever the request has of the name."""
    option = headers.add()
    option.append_action = OVERWRITE
    option.header.key = name
    option.header.raw_value = value
