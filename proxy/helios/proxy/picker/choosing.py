"""What both of the picker's servers do with a request that may go at once: what it says, its pick, its headers."""

import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from envoy.config.core.v3 import base_pb2

from helios.mesh import names
from helios.mesh.errors import InvalidRequest
from helios.proxy import metrics
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalogue import ModelEntry, shown
from helios.proxy.picker.gate import Gate
from helios.proxy.picker.hints import hint_headers
from helios.proxy.picker.limits import longest_answer
from helios.proxy.picker.request import INLINE_BODY_BYTES, PROMPT_PATHS, Body, Heads
from helios.proxy.routing.pick import NO_WISHES, Pick, Wishes
from helios.proxy.routing.prefix import MIN_PROMPT_BYTES, NO_BLOCKS, Blocks, blocks_of
from helios.proxy.runtime import Runtime

OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_RETRIES: Final = ("0", "1", "2", "3")


class Asked(NamedTuple):
    """A request for a model: of whom, when it came, and when Envoy began with it by its own words."""

    model: str
    heads: Heads
    caller: Caller
    arrived_at: float
    began: str


class Chooser:
    """Picks at once, where that can be."""

    def __init__(self, runtime: Runtime, *, cluster: str = "") -> None:
        """``cluster`` is Envoy's that this proxy's endpoints are in; empty: there is but one."""
        self._core = runtime.core
        self._journal = runtime.journal
        self._cluster = {names.CLUSTER_HEADER: cluster} if cluster else {}

    def wants_prompt(self, entry: ModelEntry, heads: Heads) -> bool:
        """Whether a request's prompt bears on where it goes, as far as its headers tell."""
        return (
            MIN_PROMPT_BYTES <= heads.body_bytes <= INLINE_BODY_BYTES
            and heads.path in PROMPT_PATHS
            and self._core.traffic.wants_prompt(entry)
        )

    def wishes(
        self, entry: ModelEntry, model: str, body: Body | None, heads: Heads, lifted: Mapping[str, Any]
    ) -> Wishes:
        """What the request says that bears on where it goes; where there is no choice, only what is noted of it."""
        blocks = _blocks(entry, model, body)
        if not self._core.traffic.has_choice(entry):
            return Wishes(blocks) if blocks else NO_WISHES
        prompt_tokens = self._core.traffic.quotas.history.prompt_tokens(entry.name, heads.body_bytes)
        if len(lifted) <= 1:
            # The model alone.
            return Wishes(blocks, heads.session, prompt_tokens)
        return Wishes(blocks, session_key(heads, lifted), prompt_tokens + longest_answer(lifted))

    def goes_at_once(self, entry: ModelEntry, model: str, band: int) -> bool:
        """Whether `pick` would pick now, for a request of a band that names the model so."""
        if entry.role == "prefill":
            return False
        name = model if model in entry.adapters else ""
        adapter = self._core.lifecycle.adapters.find(entry, name) if name else None
        if (name and adapter is None) or self._core.has_before(entry, name, band):
            return False
        return self._core.traffic.takes_requests(entry, band, adapter)

    def pick(self, entry: ModelEntry, asked: Asked, wishes: Wishes, *, split: str) -> Pick | None:
        """Picks and notes it; None where the request has to wait. ``split``: why a rollout sent it to this revision.

        Raises:
            InvalidRequest: the model only computes prompts for others.
        """
        began_at = time.perf_counter()
        if entry.role == "prefill":
            raise InvalidRequest(
                f"'{shown(asked.model)}' only computes prompts, for a model of the same revision whose role is decode",
                reason="PREFILL_ONLY",
                metadata={"param": "model"},
            )
        adapter = asked.model if asked.model in entry.adapters else ""
        if asked.caller.priority != wishes.band:
            wishes = wishes._replace(band=asked.caller.priority)
        request_id = asked.heads.request_id
        pick = self._core.pick(entry, request_id, time.monotonic(), adapter, wishes)
        if pick is None:
            return None
        pick = pick._replace(split=split) if split else pick
        excluded = self._core.traffic.exclusions(entry.name, wishes.band)
        self._journal.picked(request_id, (asked.model, pick, excluded, asked.began, asked.arrived_at, time.monotonic()))
        metrics.PICK_SECONDS.observe(time.perf_counter() - began_at)
        metrics.PICKED.inc()
        return pick

    def headers(self, pick: Pick, entry: ModelEntry, asked: Asked, wishes: Wishes, gate: Gate) -> dict[str, str]:
        """What the request is to carry from here on."""
        model = asked.model
        return (
            {
                names.ENDPOINT_HEADER: pick.endpoints,
                names.ROUTE_MODEL_HEADER: model,
                names.ROUTE_REVISION_HEADER: pick.revision,
                names.MAX_RETRIES_HEADER: _RETRIES[len(pick.choices) - 1],
            }
            | self._more_headers(pick, model, asked.heads)
            | hint_headers(asked.caller, entry.name, wishes.blocks, self._core.traffic.quotas.history)
            | gate.left_for_answer()
            | self._cluster
        )

    def _more_headers(self, pick: Pick, model: str, heads: Heads) -> dict[str, str]:
        """What only requests of some models carry: the adapter that they name, the replica that computes the prompt,
        and that they are to outlive their replica.
        """
        entry = self._core.catalogue.get(pick.model)
        if entry is None or not (entry.engine_settings or entry.is_durable):
            return {}
        found = {names.DURABLE_HEADER: names.DURABLE_AUTO if is_made_durable(entry, heads) else ""}
        found |= {names.PREFILL_ENDPOINT_HEADER: self._core.prefill_endpoint(entry, pick, time.monotonic())}
        if model in entry.adapters:
            found[names.ROUTE_ADAPTER_HEADER] = model
        return {name: value for name, value in found.items() if value}


def is_made_durable(entry: ModelEntry, heads: Heads) -> bool:
    """Whether its model's policy, and not its client, has a request outlive its replica."""
    return entry.is_durable and not heads.durable and heads.path in PROMPT_PATHS


def session_key(heads: Heads, lifted: Mapping[str, Any]) -> str:
    """What says that requests belong together, the narrowest first: a header, or fields of OpenAI's bodies."""
    # A map of protobuf Values answers for a key that it has not with an empty one; to ask first costs double.
    found = (lifted[name].string_value for name in names.SESSION_FIELDS)
    return heads.session or next(filter(None, found), "")


def lifted_model(lifted: Mapping[str, Any]) -> str:
    """The model that Envoy lifted from a JSON body; empty: none. Raises InvalidRequest where it is no string."""
    value = lifted["model"]
    kind = value.WhichOneof("kind")
    if kind not in ("string_value", "null_value", None):
        raise InvalidRequest("the model parameter must be a string", metadata={"param": "model"})
    return str(value.string_value)


def _blocks(entry: ModelEntry, model: str, body: Body | None) -> Blocks:
    """A prompt's blocks, apart for all that an engine's cache keeps apart: revision, adapter, salt."""
    if body is None:
        return NO_BLOCKS
    adapter = model if model in entry.adapters else ""
    return blocks_of(body.prompt.text, f"{entry.revision} {adapter} {body.prompt.salt}")
