"""What can be picked at once, with one message each way: Envoy's ext_authz asks, before ext_proc would.

A conversation (`servicer`) is a stream that Envoy keeps for the request; half of what it costs Envoy, and a third of
what it costs here, is that it could go on. Most requests say all that matters in one message, and their answer is
there: this question gets it. Whatever has none (a request that has to wait or is refused, a body that was not sent)
is answered with nothing, and Envoy begins the conversation, where it is said why.

So nothing that is noted of a request may stay where the answer is nothing.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from envoy.service.auth.v3 import external_auth_pb2 as auth_pb

from helios.mesh import names
from helios.mesh.errors import HeliosError
from helios.mesh.identity import SpiffeId
from helios.mesh.server import check_peer
from helios.proxy.admission.keyring import Caller
from helios.proxy.picker.choosing import OVERWRITE, Asked, Chooser, is_made_durable, lifted_model
from helios.proxy.picker.gate import Gate
from helios.proxy.picker.request import Heads, agree, read_body, read_heads
from helios.proxy.runtime import Runtime

SERVICE: Final = "envoy.service.auth.v3.Authorization"
METHOD: Final = f"/{SERVICE}/Check"
_EDGE: Final = frozenset({"edge"})
# Envoy waits for a second, and then begins the conversation: a pick that comes later would be a second one. A request
# whose body took so long is asked about in the conversation as well.
_LATE_SECONDS: Final = 0.5


class _Times(NamedTuple):
    """When a request came here (monotonic), and when Envoy began with it (seconds of the epoch)."""

    arrived_at: float
    began_at: float


class CheckPicker:
    """Answers Envoy at once, or with nothing."""

    def __init__(self, runtime: Runtime, chooser: Chooser, *, own: SpiffeId | None) -> None:
        """``own`` is who the proxy is; None lets everybody in (no TLS)."""
        self._core = runtime.core
        self._chooser = chooser
        self._own = own

    def answer(self, message: bytes, caller: Any) -> bytes:
        """Answers a CheckRequest: headers for the request where it is picked, else none.

        Raises:
            PermissionDenied: the caller is no edge.
            google.protobuf.message.DecodeError: it is no CheckRequest.
        """
        if self._own is not None:
            check_peer(caller, _EDGE, SERVICE, self._own)
        arrived_at = time.monotonic()
        attributes = auth_pb.CheckRequest.FromString(message).attributes
        began_at = attributes.request.time.seconds + attributes.request.time.nanos / 1e9
        if datetime.now(UTC).timestamp() - began_at > _LATE_SECONDS:
            return _NOTHING
        gate = Gate(self._core, heads := read_heads(attributes.request.http.headers))
        try:
            picked = self._picked(attributes, gate, heads, _Times(arrived_at, began_at))
        except HeliosError:
            # The conversation refuses it, in full.
            return _NOTHING
        finally:
            gate.leave()
        return picked if picked is not None else _NOTHING

    def _shares_limits(self, caller: Caller) -> bool:
        """Whether a caller's limits are another proxy's to grant: to ask for a part of them would take it from where
        the conversation may come to.
        """
        return not self._core.leadership.leads and bool(caller.requests_per_minute or caller.tokens_per_minute)

    def _picked(self, attributes: Any, gate: Gate, heads: Heads, times: _Times) -> bytes | None:
        gate.identify()
        lifted: Mapping[str, Any] = attributes.metadata_context.filter_metadata[names.METADATA_NAMESPACE].fields
        model = agree(heads.model, lifted_model(lifted))
        entry = self._core.resolve(model) if model else None
        # A split is chosen once, and only the conversation can have another route chosen.
        if entry is None or entry.canary or is_made_durable(entry, heads) or self._shares_limits(gate.caller):
            return None
        body = None
        if self._chooser.wants_prompt(entry, heads):
            body = read_body(heads.path, attributes.request.http.raw_body)
        # The conversation has a body only where no model is named; tiers go by what Envoy lifted.
        gate.rank(lifted, None)
        # A request counts against its key's limits where it was admitted, whatever became of it.
        if gate.caller.key_id and not self._chooser.goes_at_once(entry, model, gate.caller.priority):
            return None
        if not gate.admit(entry, model, lifted):
            return None
        wishes = self._chooser.wishes(entry, model, body, heads, lifted)
        began = datetime.fromtimestamp(times.began_at, UTC).isoformat()
        asked = Asked(model, heads, gate.caller, times.arrived_at, began)
        pick = self._chooser.pick(entry, asked, wishes, split="")
        if pick is None:
            return None
        gate.is_passed = True
        found = self._chooser.headers(pick, entry, asked, wishes, gate)
        self._core.traffic.prompt_sent(entry, pick.choices[0].replica_id, heads.request_id, wishes.blocks)
        return _answer(found)


def _answer(found: Mapping[str, str]) -> bytes:
    response = auth_pb.CheckResponse()
    response.ok_response.SetInParent()
    headers = response.ok_response.headers
    for name, value in found.items():
        # ext_authz knows no `raw_value`.
        option = headers.add()
        option.append_action = OVERWRITE
        option.header.key, option.header.value = name, value
    return bytes(response.SerializeToString())


_NOTHING: Final = _answer({})
