"""What a replica asks of an inference engine, and the values that pass between them.

The protocol lives here, with its caller; ``helios.worker.engines`` implements it.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol, runtime_checkable

from helios.worker.artifacts.requests import ArtifactRequest
from helios.worker.replica.loss_pipe import LossWriter
from helios.worker.replica.phases import measured


class OpenAICall(Enum):
    """The calls of OpenAI's API that an engine answers with ready-made bodies."""

    CHAT_COMPLETION = "chat.completion"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


class FinishReason(Enum):
    """Why one answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "abort"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change while an engine lives."""

    max_context_tokens: int
    vocabulary_size: int
    kv_cache_tokens: int
    can_sleep: bool = False
    """It has ``sleep`` and ``wake`` as well (``replica.sleeping.SleepingEngine``)."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing."""

    running_requests: int = 0
    waiting_requests: int = 0
    kv_usage_ratio: float = 0.0
    is_dead: bool = False
    """Its processes are gone; it answers nothing any more."""


@dataclass(slots=True)
class Meter:
    """Counts one request; the engine writes it while the request runs. Times are those of ``time.monotonic()``."""

    request_id: str
    arrived_at: float
    first_token_at: float | None = None
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


TransferParameters = Mapping[str, Any]
"""What an engine needs to find a KV cache that another one computed; its own business."""

PREFILL: Final[ContextVar[Callable[[Sequence[int]], Awaitable[TransferParameters | None]] | None]] = ContextVar(
    "helios_prefill", default=None
)
"""How the prompt of the current request is computed by another replica, by its token ids; None: it is computed here."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. None takes the model's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int = 1
    adapter: str = ""
    """Name of the LoRA adapter that draws them; empty: none."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. ``role`` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be rendered with the model's chat template, oldest first."""

    turns: tuple[Turn, ...]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be tokenized."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids, given to the model as they are."""

    ids: tuple[int, ...]


Prompt = Conversation | Text | TokenIds


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token that was drawn, and the likeliest ones at its place, likeliest first."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of one answer, or its end.

    ``output_index`` is the absolute index, in that answer, of the first of ``token_ids``. ``finish`` is set on the last
    piece of an answer and on no other; ``stop`` is the stop text or token id that ended it, if one did.
    """

    choice_index: int
    output_index: int
    text: str
    token_ids: Sequence[int]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids and the text of each."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """A whole answer as JSON."""

    body: bytes


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events, each a complete ``data: …`` block; close it (``aclose``) when it is not read to its end.

    An error after the first event is raised, not put into words.
    """

    events: AsyncIterator[str]


class Engine(Protocol):
    """An engine that has loaded one model.

    Promises: every call may run concurrently with every other; cancelling a call, or closing its iterator, aborts the
    request and frees its KV blocks; pieces of one answer come in order, and each answer has exactly one piece with
    ``finish``; errors are HeliosErrors (InvalidRequest with ``param`` in its metadata, ContextLengthExceeded,
    ReplicaLost when the engine died). The meter is written before a piece or an event that it counts is handed out.
    """

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        ...

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers an OpenAI request body, which is a parsed JSON object.

        For a stream it returns when the first event is there, so that a request that fails before it raises here.
        """
        ...

    def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Generates; yields the pieces that are ready together. Errors of the request are raised by the first step."""
        ...

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Returns the token ids that the model would be given."""
        ...

    def load(self) -> EngineLoad:
        """Returns what the engine last reported of itself; does not wait."""
        ...

    def close(self) -> None:
        """Ends the engine's processes. Idempotent."""
        ...


class PrefillingEngine(Protocol):
    """An engine that computes prompts for the engines of other replicas."""

    async def prefill(self, token_ids: Sequence[int], transfer: str) -> TransferParameters:
        """Computes a prompt and leaves its KV cache under the name ``transfer``; returns what finds it there.

        The prompt's tokens are counted where the request is answered, not here.
        """
        ...


@runtime_checkable
class AdaptingEngine(Protocol):
    """An engine that takes LoRA adapters while it runs."""

    async def load_adapter(self, name: str, path: str) -> Any:
        """Loads an adapter, which requests then name as their model; returns what ``unload_adapter`` knows it by.

        An adapter that has the name already serves the requests that it has, and no new ones. Raises HeliosErrors that
        say why it can't be loaded and what to do.
        """
        ...

    async def unload_adapter(self, name: str, loaded: Any) -> None:
        """Waits until no request uses an adapter, which no new one does from now on, and drops it.

        The engine does not read its files after that. Raises HeliosErrors.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """What an engine tells its replica.

    Attributes:
        on_forked: Call it once, when the engine's own processes exist: the replica may start threads from then on.
        on_load: Call it in the replica's event loop when ``load()`` has changed.
        phase_descriptor: Any process of the engine writes a JSON line here: ``[phase, began_at, ended_at]`` when a
            phase of the start is over (CLOCK_MONOTONIC), or ``{"reason": …, "message": …}`` before it dies of it.
        began_at: When the engine's part of the start begins, on that clock.
        artifacts: The engine adds what it uses or makes that other starts can use, before it is made.
        losses: Any process of the engine tells here what its KV cache lost of prompts; None: nobody wants to know.
    """

    on_forked: Callable[[], None]
    on_load: Callable[[], None]
    phase_descriptor: int
    began_at: float = field(default_factory=time.monotonic, kw_only=True)
    artifacts: list[ArtifactRequest] = field(default_factory=list)
    losses: LossWriter | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measures the block as a phase of the start."""
        return measured(self.phase_descriptor, name)
