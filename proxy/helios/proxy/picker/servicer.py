"""The endpoint picker: Envoy's external processor.

The numbered conversation, one stream a request:
    1. Envoy → request headers, with the model that it lifted from a JSON body as dynamic metadata; a prompt of ordinary
       length follows at once.
    2. picker → headers to set (where to go), or an immediate response (an error). A hold is an answer that comes later.
    Where neither header nor metadata names a model, and where several replicas could take a prompt that is longer:
    2. picker → "send the body", 3. Envoy → the body, 4. as 2.

Every request of the mesh passes here, so this server has no interceptors: the caller's identity is checked and errors
are mapped in this module.
"""

import asyncio
import base64
import time
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from helios.mesh import names, status
from helios.mesh.errors import Draining, HeliosError, InvalidRequest, PermissionDenied, Unsupported
from helios.mesh.identity import SpiffeId
from helios.mesh.server import check_peer
from helios.proxy import metrics
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalog.servicer import find_model
from helios.proxy.catalog.session import ModelSource
from helios.proxy.catalogue import ModelEntry, shown
from helios.proxy.explain.record import Refusal
from helios.proxy.picker.exchange import Exchange
from helios.proxy.picker.gate import Gate
from helios.proxy.picker.hints import hint_headers
from helios.proxy.picker.limits import longest_answer
from helios.proxy.picker.prompt import NO_PROMPT
from helios.proxy.picker.request import (
    INFERENCE_PREFIX,
    INLINE_BODY_BYTES,
    OPENAI_PREFIX,
    PROMPT_PATHS,
    Body,
    Heads,
    agree,
    missing_model,
    read_body,
    read_heads,
    timeout_seconds,
)
from helios.proxy.rollouts import Assignment
from helios.proxy.routing.pick import NO_WISHES, Pick, Wishes
from helios.proxy.routing.prefix import MIN_PROMPT_BYTES, NO_BLOCKS, Blocks, blocks_of
from helios.proxy.runtime import Arrival, Runtime

log = structlog.get_logger()

EXT_PROC_SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
_EXT_PROC_FILTER: Final = "envoy.filters.http.ext_proc"
_EDGE: Final = frozenset({"edge"})
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_RETRIES: Final = (b"0", b"1", b"2", b"3")


class _Came(NamedTuple):
    """How a request came: when, by this clock and by Envoy's own words, in which call, and from whom."""

    arrived_at: float
    began: str
    context: Any
    caller: Caller


class PickerServicer(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Answers Envoy. One stream is one request."""

    def __init__(
        self,
        runtime: Runtime,
        models: ModelSource,
        *,
        hold_limit_seconds: float,
        own: SpiffeId | None,
        cluster: str = "",
    ) -> None:
        """``own`` is who the proxy is; None lets everybody in (no TLS).

        ``cluster`` is Envoy's that this proxy's endpoints are in; empty: there is but one.
        """
        self._runtime = runtime
        self._core = runtime.core
        self._journal = runtime.journal
        self._models = models
        self._hold_limit_seconds = hold_limit_seconds
        self._own = own
        self._cluster = {names.CLUSTER_HEADER: cluster} if cluster else {}

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
        began, body, model = _began(request), None, heads.model
        try:
            gate.identify()
            await exchange.read_pushed()
            model = agree(heads.model, _lifted_model(request))
            if not model:
                _check_path(heads.path)
                body = await _body(exchange, heads)
                model = body.model
            served = entry = self._core.resolve(model) or await find_model(self._runtime, self._models, model)
            if not gate.admit(entry, model, _lifted(request), body):
                await gate.wait_admitted(entry, _lifted(request), self._runtime.peers)
            split = Assignment(entry)
            if entry.canary:
                split = self._core.rollouts.assign(
                    entry, model, _session_key(heads, request), time.monotonic(), band=gate.caller.priority
                )
                entry = split.entry
            if body is None and self._wants_prompt(entry, heads):
                body = await _prompt(exchange, heads)
                # While Envoy sent it, the canary may have gone away.
                split = self._core.rollouts.still(split, served, band=gate.caller.priority)
                entry = split.entry
            wishes = self._wishes(entry, model, body, heads, request)
            # A request that waits keeps no body here.
            body = None
            exchange.drop_body()
            if split.outcome:
                metrics.ROLLOUT_REQUESTS.labels(served.name, split.outcome).inc()
            pick = await self._pick(
                entry, model, wishes, heads, _Came(arrived_at, began, context, gate.caller), split=split.why
            )
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
        more = (
            self._more_headers(pick, model, heads)
            | hint_headers(gate.caller, entry.name, wishes.blocks, self._core.traffic.quotas.history)
            | gate.left_for_answer()
            | self._cluster
        )
        await exchange.answer(_answer(exchange, pick, model, more))
        await self._answered(exchange, (entry, pick.choices[0].replica_id, heads.request_id, wishes.blocks))

    async def _answered(self, exchange: Exchange, sent: tuple[ModelEntry, str, str, Blocks]) -> None:
        # Behind the answer, which leaves at the end of this turn of the loop: a long prompt has many blocks.
        asyncio.get_running_loop().call_soon(self._core.traffic.prompt_sent, *sent)
        await exchange.let_rest_go_on()

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

    def _wants_prompt(self, entry: ModelEntry, heads: Heads) -> bool:
        return (
            MIN_PROMPT_BYTES <= heads.body_bytes <= INLINE_BODY_BYTES
            and heads.path in PROMPT_PATHS
            and self._core.traffic.wants_prompt(entry)
        )

    def _wishes(self, entry: ModelEntry, model: str, body: Body | None, heads: Heads, request: Any) -> Wishes:
        """What the request says that bears on where it goes; where there is no choice, only what is noted of it."""
        blocks = _blocks(entry, model, body)
        if not self._core.traffic.has_choice(entry):
            return Wishes(blocks) if blocks else NO_WISHES
        lifted, history = _lifted(request), self._core.traffic.quotas.history
        prompt_tokens = history.prompt_tokens(entry.name, heads.body_bytes)
        if len(lifted) <= 1:
            # The model alone.
            return Wishes(blocks, heads.session, prompt_tokens)
        return Wishes(blocks, _session_key(heads, request), prompt_tokens + longest_answer(lifted))

    def _more_headers(self, pick: Pick, model: str, heads: Heads) -> dict[str, str]:
        """What only requests of some models carry: the adapter that they name, the replica that computes the prompt,
        and that they are to outlive their replica.
        """
        entry = self._core.catalogue.get(pick.model)
        if entry is None or not (entry.engine_settings or entry.is_durable):
            return {}
        is_durable = entry.is_durable and not heads.durable and heads.path in PROMPT_PATHS
        found = {names.DURABLE_HEADER: names.DURABLE_AUTO if is_durable else ""}
        found |= {names.PREFILL_ENDPOINT_HEADER: self._core.prefill_endpoint(entry, pick, time.monotonic())}
        if model in entry.adapters:
            found[names.ROUTE_ADAPTER_HEADER] = model
        return {name: value for name, value in found.items() if value}

    async def _pick(
        self, entry: ModelEntry, model: str, wishes: Wishes, heads: Heads, came: _Came, *, split: str
    ) -> Pick:
        now = time.perf_counter()
        if entry.role == "prefill":
            raise InvalidRequest(
                f"'{shown(model)}' only computes prompts, for a model of the same revision whose role is decode",
                reason="PREFILL_ONLY",
                metadata={"param": "model"},
            )
        adapter = model if model in entry.adapters else ""
        if came.caller.priority != wishes.band:
            wishes = wishes._replace(band=came.caller.priority)
        pick = self._core.pick(entry, heads.request_id, time.monotonic(), adapter, wishes)
        if pick is not None:
            pick = pick._replace(split=split) if split else pick
            excluded = self._core.traffic.exclusions(entry.name, wishes.band)
            self._journal.picked(
                heads.request_id, (model, pick, excluded, came.began, came.arrived_at, time.monotonic())
            )
            metrics.PICK_SECONDS.observe(time.perf_counter() - now)
            metrics.PICKED.inc()
            return pick
        pick = await self._hold(entry, model, heads, came)
        metrics.RELEASED.inc()
        return pick

    async def _hold(self, entry: ModelEntry, model: str, heads: Heads, came: _Came) -> Pick:
        limit = self._hold_limit_seconds
        own = timeout_seconds(heads.timeout)
        began_at = _began_at(came.began)
        # Counted from the request's start: a hold that moved here from another proxy does not begin anew.
        age_seconds = max(0.0, (datetime.now(UTC) - began_at).total_seconds()) if began_at is not None else 0.0
        budget = min(limit, own if own is not None else limit) - age_seconds
        arrival = Arrival(
            heads.request_id,
            model,
            came.arrived_at,
            began=came.began,
            began_wall=(began_at or datetime.now(UTC)).timestamp(),
            traceparent=_trace_of(came.context) or heads.traceparent,
            caller=came.caller,
        )
        deadline = time.monotonic() + budget
        return await self._runtime.wait_pick(entry, arrival, size_bytes=heads.body_bytes, deadline=deadline)

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


def _lifted_model(request: Any) -> str:
    value = _lifted(request)["model"]
    kind = value.WhichOneof("kind")
    if kind not in ("string_value", "null_value", None):
        raise InvalidRequest("the model parameter must be a string", metadata={"param": "model"})
    return str(value.string_value)


def _session_key(heads: Heads, request: Any) -> str:
    """What says that requests belong together, the narrowest first: a header, or fields of OpenAI's bodies."""
    fields = _lifted(request)
    # A map of protobuf Values answers for a key that it has not with an empty one; to ask first costs double.
    lifted = (fields[name].string_value for name in names.SESSION_FIELDS)
    return heads.session or next(filter(None, lifted), "")


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


def _blocks(entry: ModelEntry, model: str, body: Body | None) -> Blocks:
    """A prompt's blocks, apart for all that an engine's cache keeps apart: revision, adapter, salt."""
    if body is None:
        return NO_BLOCKS
    adapter = model if model in entry.adapters else ""
    return blocks_of(body.prompt.text, f"{entry.revision} {adapter} {body.prompt.salt}")


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


def _answer(exchange: Exchange, pick: Pick, model: str, more: dict[str, str]) -> Any:
    response = ext_proc.ProcessingResponse()
    part = exchange.part(response)
    if names.CLUSTER_HEADER in more or names.DURABLE_HEADER in more:
        # The route was chosen before its cluster was named, or before it was known that it is the relay's.
        part.response.clear_route_cache = True
    headers = part.response.header_mutation.set_headers
    _set(headers, names.ENDPOINT_HEADER, pick.endpoints.encode())
    _set(headers, names.ROUTE_MODEL_HEADER, model.encode())
    _set(headers, names.ROUTE_REVISION_HEADER, pick.revision.encode())
    for name, value in more.items():
        _set(headers, name, value.encode())
    _set(headers, names.MAX_RETRIES_HEADER, _RETRIES[len(pick.choices) - 1])
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


def _set(headers: Any, key: str, value: bytes) -> None:
    option = headers.add()
    option.append_action = _OVERWRITE
    option.header.key = key
    option.header.raw_value = value
