"""The gate of a request: its key is recognised, its limits are kept, and what it did not use is given back."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from helios.mesh.errors import QuotaExceeded, Unavailable
from helios.mesh.names import TIER_FIELD, TIER_HEADER, kept_header
from helios.proxy.admission import tiers
from helios.proxy.admission.keyring import ANYBODY, Caller, check_model
from helios.proxy.admission.quotas import Standing
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.picker.limits import answer_bound, rate_limit_headers
from helios.proxy.picker.request import Body, Heads
from helios.proxy.runtime import Peers

_LEADER_SECONDS: Final = 10.0
"""How long a request of a key with limits waits for a leader: longer than it takes another one to be found."""
_GRANT_SECONDS: Final = 1.0
"""How long it waits for a part of the limit that others have: they give back what they don't need within a second."""


class Gate:
    """One request's way in. Where no key is required and none is sent, each step costs a comparison.

    `identify`, `rank`, `admit`, set `is_passed` once it is picked, and `leave` in the end, whatever came of it.
    """

    def __init__(self, core: Core, heads: Heads) -> None:
        self._core = core
        self._heads = heads
        self.caller: Caller = ANYBODY
        self.is_passed = False
        """Whether it is on its way to a replica, whose reports settle what it reserved."""
        self._standing: Standing | None = None
        self._tier = ""

    def identify(self) -> None:
        """Finds out whose request it is. Raises Unauthenticated."""
        keyring = self._core.keyring
        if self._heads.authorization or keyring.is_required:
            self.caller = keyring.identify(self._heads.authorization, datetime.now(UTC).timestamp())

    def rank(self, lifted: Mapping[str, Any], body: Body | None) -> None:
        """Gives the request the band that it asks for, if it asks for one and may have it.

        The body (``lifted`` by Envoy, or read) says it before a header does, which is for clients without such a field.
        Raises InvalidRequest: there is no such tier.
        """
        asked: object = body.tier if body is not None else None
        if asked is None and len(lifted) > 1:
            # Beside the model, Envoy lifted something more.
            asked = _said(lifted[TIER_FIELD])
        if asked is None:
            asked = self._heads.tier or None
        if asked is not None:
            keyring = self._core.keyring
            self.caller, self._tier = tiers.given(self.caller, asked, is_free=keyring.has_free_bands)

    def admit(self, entry: ModelEntry, model: str, lifted: Mapping[str, Any]) -> bool:
        """Reserves what the request may take; False where its key's part of a limit is to be waited for.

        Args:
            entry: the model that it names.
            model: the name that it names it by.
            lifted: what Envoy lifted from a JSON body.

        Raises:
            ModelNotFound: its key may not use the model.
            QuotaExceeded, InvalidRequest: its key's limits.
        """
        if self.caller.key_id:
            check_model(self.caller, entry, model)
            try:
                self._reserve(entry, lifted)
            except (QuotaExceeded, Unavailable):
                if self._core.leadership.leads:
                    raise
                return False
        return True

    async def wait_admitted(self, entry: ModelEntry, lifted: Mapping[str, Any], peers: Peers | None) -> None:
        """Reserves what the request may take once the leader has granted it.

        Raises:
            QuotaExceeded: it has not, because the limit is reached.
            Unavailable: LIMITS_UNKNOWN, there is no leader.
        """
        assert peers is not None, "only one of several proxies does not lead"
        since = time.monotonic()
        while True:
            is_told = await peers.wait_told(since + _LEADER_SECONDS)
            try:
                self._reserve(entry, lifted)
                return
            except QuotaExceeded:
                if not is_told or self._core.leadership.is_refused(self.caller.key_id) or _is_over(since):
                    raise
            except Unavailable:
                if not is_told:
                    raise

    def _reserve(self, entry: ModelEntry, lifted: Mapping[str, Any]) -> None:
        self._standing = self._core.traffic.quotas.admit(
            self.caller,
            self._heads.request_id,
            entry.name,
            body_bytes=self._heads.body_bytes,
            max_tokens=answer_bound(lifted),
            now=time.monotonic(),
        )

    def left_for_answer(self) -> dict[str, str]:
        """Headers for the request in which Envoy finds those of its answer."""
        found = rate_limit_headers(self._standing) if self._standing is not None else {}
        if self._tier:
            found[TIER_HEADER] = self._tier
        return {kept_header(name): value for name, value in found.items()}

    def refusal_headers(self) -> dict[str, str]:
        """Headers of an answer that refuses the request."""
        if not self.caller.key_id:
            return {}
        standing = self._core.traffic.quotas.standing(self.caller, time.monotonic())
        return rate_limit_headers(standing) if standing is not None else {}

    def leave(self) -> None:
        """Ends: a request that goes to no replica gives back what it reserved."""
        if not self.is_passed and self.caller.key_id:
            self._core.traffic.quotas.release(self._heads.request_id, time.monotonic())


def _said(value: Any) -> object:
    """What a protobuf Value has; None for null, and for what is not there."""
    kind = value.WhichOneof("kind")
    return getattr(value, kind) if kind is not None and kind != "null_value" else None


def _is_over(since: float) -> bool:
    return time.monotonic() - since > _GRANT_SECONDS
