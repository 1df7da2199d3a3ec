"""Which revision answers a request of a model that is rolled out: the served one or the canary. Pure.

Requests with a key (a conversation, a user) go by a hash of it: the same key always meets the same revision, on every
proxy, and as the weight grows, keys move to the canary and none moves back. The hash takes the canary in, so that the
next rollout tries other users first.

Requests without a key take turns: the share is exact after every hundred and never off by more than one request, which
a hash of request ids would only reach in the long run. A request is assigned once (Envoy's retries do not ask again),
so nothing is gained by making the turn a function of its id.
"""

import hashlib
from typing import Final

from helios.proxy.catalogue import ModelEntry

_WHOLE: Final = 100
_HASH_BYTES: Final = 8


class Splitter:
    """Assigns requests. One a proxy: each keeps the share, so all of them together do.

    Invariant: of any n requests of a model in a row that have no key, the canary is given n * weight / 100, give or
    take less than one.
    """

    def __init__(self) -> None:
        # Hundredths of a request that the canary is owed, below a whole one.
        self._owed: dict[str, int] = {}

    def takes_canary(self, entry: ModelEntry, key: str) -> bool:
        """Whether a request goes to the canary of its model; ``key`` is empty where it has none."""
        if key:
            return _place(f"{entry.canary} {key}") < entry.canary_percent
        owed = self._owed.get(entry.name, 0) + entry.canary_percent
        is_due = owed >= _WHOLE
        self._owed[entry.name] = owed - _WHOLE if is_due else owed
        return is_due

    def forget(self, model: str) -> None:
        """The model has no rollout any more."""
        self._owed.pop(model, None)


def _place(text: str) -> float:
    """Returns where a text lies between 0 and 100, which it is not told by its looks."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=_HASH_BYTES).digest()
    return _WHOLE * int.from_bytes(digest, "big") / (1 << (8 * _HASH_BYTES))
