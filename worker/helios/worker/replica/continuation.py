"""Streams that another replica can take up: which tokens the messages of an answer stand for.

An engine hands its outputs to serving code, which makes events of them (and of some none). What is remembered is not
the events but the outputs' tokens, in their portions: a replica that takes the answer up gives its own serving code the
same portions first, drops what comes of them, and has its engine go on behind them. Whatever the serving code keeps
between two tokens is then what it was.

For that each message must stand for whole portions. Serving code pulls: when it asks for the next output, everything of
the last one is out (``asked``). While it has not asked, a message waits (`is_between`); those of an answer's last
output wait for its end, so that no client has a part of an end that another replica would make again.

One event loop; no I/O.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from helios.mesh.errors import InvalidRequest
from helios.mesh.names import DURABLE_HEADER

T = TypeVar("T")

_CREATED: Final = '"created":'
_DIGITS: Final = "0123456789"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a client has of an answer.

    Attributes:
        prompt: Token ids, as the model was given them.
        steps: Token ids in portions, as an engine handed them over. At least one portion, and none is the answer's end.
        cached_prompt_tokens: What the first replica's prefix cache had of the prompt.
        created: ``created`` of the events that the client has, in seconds since the epoch; 0: they have none.
    """

    prompt: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    cached_prompt_tokens: int = 0
    created: int = 0

    @property
    def token_ids(self) -> list[int]:
        """The tokens of all steps."""
        return [token_id for step in self.steps for token_id in step]


class Continuation:
    """One answer, on the replica that makes it.

    The engine calls ``begin`` once; for each output ``hand`` right before serving code gets it and ``asked`` when that
    asks for another one; and ``go_live`` when serving code has taken all of `progress` and asks for more.
    """

    def __init__(self, progress: Progress | None = None, *, is_strict: bool = True) -> None:
        self.progress = progress
        self.is_strict = is_strict
        """Whether a request that another replica could not go on with is refused; else it is an ordinary one."""
        self.is_ordinary = False
        """Whether the answer ends with this replica after all."""
        self.is_live = progress is None
        """Whether what comes out is new to the client."""
        self.is_begun = False
        self.is_finishing = False
        """Whether the answer's last output is with the serving code."""
        self.is_between = True
        """Whether all that was handed over has become events."""
        self.prompt: Sequence[int] = ()
        self.cached_prompt_tokens = 0
        self.refusal: InvalidRequest | None = None
        """Why another replica could not go on with this request; serving code may have put it into other words."""
        self.leaving = asyncio.Event()
        """Set when the replica drains: the answer should go on elsewhere."""
        self._steps: list[tuple[int, ...]] = []

    def refuse(self, field: str, why: str) -> InvalidRequest | None:
        """Another replica could not go on with this request: returns the error to raise, and keeps it; None where it
        is an ordinary one from now on.
        """
        if not self.is_strict:
            self.is_ordinary = True
            return None
        self.refusal = InvalidRequest(
            f"{field}: {why} in a durable request; leave it out, or the header {DURABLE_HEADER}",
            reason="NOT_CONTINUABLE",
            metadata={"param": field},
        )
        return self.refusal

    def begin(self, prompt: Sequence[int]) -> None:
        """The engine takes the request, with this prompt. Raises InvalidRequest for the second one of an answer."""
        if self.is_begun and (error := self.refuse("prompt", "one prompt at a time")) is not None:
            raise error
        self.is_begun = True
        self.prompt = prompt

    def go_live(self) -> None:
        """What comes now is new."""
        self.is_live = True

    def hand(self, token_ids: Sequence[int], *, is_last: bool) -> None:
        """An output goes to the serving code."""
        self.is_between = False
        self.is_finishing = is_last
        self._steps.append(tuple(token_ids))

    def asked(self) -> None:
        """Serving code asks for the next output."""
        self.is_between = True

    def take(self) -> list[tuple[int, ...]]:
        """Returns the steps since the last call."""
        steps, self._steps = self._steps, []
        return steps


CONTINUATION: Final[ContextVar[Continuation | None]] = ContextVar("helios_continuation", default=None)
"""The current request's; None: it ends with this replica."""


def only_new(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Returns the items of an answer that its client does not have.

    They come from serving code, one by one: whether one is new is known only before the next one is asked for.
    """
    continuation = CONTINUATION.get()
    return items if continuation is None else _only_new(items, continuation)


async def _only_new(items: AsyncIterator[T], continuation: Continuation) -> AsyncGenerator[T, None]:
    try:
        async for item in items:
            if not (continuation.is_begun or continuation.is_ordinary):
                error = continuation.refuse(DURABLE_HEADER, "the engine of this model can't take up an answer")
                if error is not None:
                    raise error
            if continuation.is_live:
                yield item
    finally:
        close: Any = getattr(items, "aclose", None)
        if close is not None:
            await close()


def with_created(event: str, created: int) -> str:
    """Returns an OpenAI event with another time of its answer's beginning.

    The first such key is the event's own: before it an event has only its id and its kind.
    """
    head, key, rest = event.partition(_CREATED)
    return f"{head}{key}{created}{rest.lstrip(_DIGITS)}" if key else event


def created_of(event: str) -> int:
    """Returns the ``created`` of an OpenAI event; 0 where it has none."""
    _, _, rest = event.partition(_CREATED)
    digits = rest[: len(rest) - len(rest.lstrip(_DIGITS))]
    return int(digits) if digits else 0
