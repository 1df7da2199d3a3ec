"""What a client has of an answer, and what is to be done where its replica breaks off. Pure.

| the client has | the replica | next |
|---|---|---|
| nothing | refused: UNAVAILABLE | ANOTHER, from the beginning |
| nothing | any other error | FAIL: it is the client's |
| a part | error of the replica's own, or cut off | ANOTHER, from that part |
| a part | any other error | FAIL |
| any | as many replicas in a row as may broke off without one token more | FAIL |
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from helios.mesh.errors import HeliosError

# A request's own errors would come again on every replica; these are the replica's.
_REPLICA_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS"})


class Next(enum.Enum):
    """What follows where a replica broke off."""

    ANOTHER = 1
    FAIL = 2


@dataclass(slots=True)
class Journal:
    """One answer's. Four bytes a token, and four a portion."""

    barren_limit: int
    """Replicas in a row that may break off without one token more."""
    prompt: Sequence[int] = ()
    cached_prompt_tokens: int = 0
    created: int = 0
    message_count: int = 0
    """Messages that went to the client."""
    is_finished: bool = False
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    _barren_count: int = 0
    _token_count_before: int = 0

    @property
    def has_progress(self) -> bool:
        """Whether the client has a part of the answer that a next replica can begin behind."""
        return bool(self.sizes)

    def opened(self, prompt: Sequence[int], cached_prompt_tokens: int, created: int) -> None:
        """The answer began."""
        self.prompt = array("I", prompt)
        self.cached_prompt_tokens, self.created = cached_prompt_tokens, created

    def delivered(self, message_count: int, token_ids: Iterable[int], sizes: Iterable[int]) -> None:
        """Messages went to the client, which stand for these portions of tokens."""
        self.message_count += message_count
        self.token_ids.extend(token_ids)
        self.sizes.extend(sizes)

    def broken(self, error: HeliosError) -> Next:
        """A replica broke off."""
        has_more = len(self.token_ids) > self._token_count_before
        self._token_count_before = len(self.token_ids)
        self._barren_count = 0 if has_more else self._barren_count + 1
        if self._barren_count > self.barren_limit:
            return Next.FAIL
        if not self.message_count:
            return Next.ANOTHER if error.grpc_code == "UNAVAILABLE" else Next.FAIL
        return Next.ANOTHER if self.has_progress and error.grpc_code in _REPLICA_CODES else Next.FAIL
