"""Which band of priority a request asks for, in OpenAI's words (`service_tier`), and which one it is given. Pure.

A request is given at most its ceiling: the band of its key, which an operator has set; without a key, the normal one,
unless keyless requests may ask for more. Who asks for less is given less: `flex` waits for all others. A band never
costs or counts differently: tokens are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.mesh.names import TIER_FIELD
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalogue import shown
from helios.proxy.routing.rules import HIGH_BAND, LOW_BAND, NORMAL_BAND

_AUTO: Final = "auto"
# "scale" is capacity that was bought beforehand at OpenAI: here it is what goes first.
_BANDS: Final[Mapping[str, int]] = {
    "default": NORMAL_BAND,
    "flex": LOW_BAND,
    "priority": HIGH_BAND,
    "scale": HIGH_BAND,
}
_GIVEN: Final[Mapping[int, str]] = {LOW_BAND: "flex", NORMAL_BAND: "default", HIGH_BAND: "priority"}
# A boolean is an integer to Python.
_KINDS: Final = ((bool, "a boolean"), ((int, float), "a number"), (list, "an array"))
_SUPPORTED: Final = ", ".join(f"'{name}'" for name in (_AUTO, *_BANDS))


def given(caller: Caller, asked: object, *, is_free: bool) -> tuple[Caller, str]:
    """Returns who asks, at the band that is given, and that band in OpenAI's words.

    Args:
        caller: whose request it is; its priority is the band that it has without a word.
        asked: the tier that is asked for, as JSON had it.
        is_free: requests without a key may ask for any.

    Raises:
        InvalidRequest: INVALID_VALUE, INVALID_TYPE, there is no such tier.
    """
    if not isinstance(asked, str):
        kind = next((name for kind, name in _KINDS if isinstance(asked, kind)), "an object")
        raise _invalid(
            f"Invalid type for '{TIER_FIELD}': expected one of {_SUPPORTED}, but got {kind} instead.", "INVALID_TYPE"
        )
    if asked == _AUTO:
        band = caller.priority
    else:
        wanted = _BANDS.get(asked)
        if wanted is None:
            raise _invalid(f"Invalid value: '{shown(asked)}'. Supported values are: {_SUPPORTED}.", "INVALID_VALUE")
        band = min(wanted, HIGH_BAND if is_free and not caller.key_id else caller.priority)
    tier = _GIVEN.get(band, "default")
    return (caller if band == caller.priority else replace(caller, priority=band)), tier


def _invalid(message: str, reason: str) -> InvalidRequest:
    return InvalidRequest(message, reason=reason, metadata={"param": TIER_FIELD})
