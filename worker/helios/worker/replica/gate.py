"""What every call passes before the engine sees it: draining, routing agreement, model name, and its account.

Agreement: the endpoint picker chose this replica for one model and one revision and says so in metadata that only the
edge can set. A request that says something else in its body, or a pick that is stale, must not be answered here.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc
import structlog
from opentelemetry.trace import Span

from helios.mesh.errors import (
    Draining,
    HeliosError,
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    NoReadyReplica,
)
from helios.mesh.names import (
    MODEL_HEADER,
    PREFILL_ENDPOINT_HEADER,
    REQUEST_ID_HEADER,
    ROUTE_ADAPTER_HEADER,
    ROUTE_MODEL_HEADER,
    ROUTE_REVISION_HEADER,
    TIER_HEADER,
    kept_header,
)
from helios.worker.replica import metrics, tracing
from helios.worker.replica.continuation import CONTINUATION, Continuation
from helios.worker.replica.engine import PREFILL, Meter, TransferParameters
from helios.worker.replica.ledger import RequestLedger
from helios.worker.replica.queueing import ORDER, Queueing, read_hints
from helios.worker.replica.settings import Role

log = structlog.get_logger()

# Where the picker leaves the tier that it gave.
_TIER_HEADER: Final = kept_header(TIER_HEADER)
# Longer ones are not ids; vLLM carries the id through every message to its core.
_REQUEST_ID_LIMIT: Final = 128
# A drained endpoint leaves the picker's view within a session message.
_DRAINING_RETRY_SECONDS: Final = 1.0
# Of a replica and not of the request: what has begun goes on elsewhere.
_OWN_FAULTS: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was let in."""

    meter: Meter
    route_model: str | None
    header_model: str | None
    tier: str = ""
    """The service tier that it was given, in OpenAI's words; empty: it asked for none."""


class CallGate:
    """Lets calls in and accounts for them."""

    def __init__(
        self,
        *,
        names: tuple[str, ...],
        role: Role = Role.BOTH,
        prefill: Callable[[str, Sequence[int]], Awaitable[TransferParameters | None]] | None = None,
        revision: str,
        ledger: RequestLedger,
        on_change: Callable[[], None],
    ) -> None:
        """``names[0]`` is the model's own name; ``on_change`` is called when a request starts or finishes; ``prefill``
        has a prompt computed by the replica of an address.
        """
        self._role = role
        self._prefill = prefill
        self._own_names = names
        self._names = frozenset(names)
        self._adapters: frozenset[str] = frozenset()
        self._model = names[0]
        self._revision = revision
        self._ledger = ledger
        self._on_change = on_change
        self._queueing = Queueing()
        self._is_draining = False
        self._is_paused = False
        self._continuations: set[Continuation] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def set_adapters(self, names: Iterable[str]) -> None:
        """Says which adapters requests may name instead of the model."""
        self._adapters = frozenset(names)
        self._names = self._adapters.union(self._own_names)

    async def drain(self, timeout_seconds: float) -> bool:
        """Refuses new calls from now on and waits for running ones; returns whether all of them ended in time.

        Those that can go on elsewhere are told to.
        """
        self._is_draining = True
        for continuation in self._continuations:
            continuation.leaving.set()
        return await self._wait_idle(timeout_seconds)

    async def pause(self, timeout_seconds: float) -> bool:
        """Refuses new calls until ``resume`` and waits for running ones; returns whether all of them ended in time."""
        self._is_paused = True
        return await self._wait_idle(timeout_seconds)

    def resume(self) -> None:
        """Lets calls in again after ``pause``."""
        self._is_paused = False

    @contextmanager
    def admit(self, context: Any, operation: str, *, is_prefill: bool = False) -> Iterator[Call]:
        """Lets a call in, or raises; its account is closed when the block is left, however it is left.

        Raises:
            Draining: The replica takes nothing new.
            NoReadyReplica: The replica sleeps, computes prompts only, has not the adapter (ADAPTER_NOT_LOADED), or the
                pick was made for another revision.
        """
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        if self._is_draining:
            raise Draining("this replica is draining; another one answers", retry_after_seconds=_DRAINING_RETRY_SECONDS)
        if self._is_paused:
            raise NoReadyReplica("this replica is asleep", retry_after_seconds=_DRAINING_RETRY_SECONDS)
        revision = metadata.get(ROUTE_REVISION_HEADER)
        if revision is not None and revision != self._revision:
            raise NoReadyReplica(
                "this replica serves another revision of the model",
                metadata={"revision": self._revision, "wanted": revision},
                retry_after_seconds=_DRAINING_RETRY_SECONDS,
            )
        if self._role is Role.PREFILL and not is_prefill:
            raise NoReadyReplica(
                "this replica only computes prompts for others", retry_after_seconds=_DRAINING_RETRY_SECONDS
            )
        endpoint = metadata.get(PREFILL_ENDPOINT_HEADER)
        PREFILL.set(partial(self._prefill, endpoint) if endpoint and self._prefill is not None else None)
        adapter = metadata.get(ROUTE_ADAPTER_HEADER)
        if adapter is not None and adapter not in self._adapters:
            # The picker sends to replicas that have it: this one just lost it, and another one, or this one a moment
            # later, has it.
            raise NoReadyReplica(
                f"this replica of {self._model} does not have the adapter {adapter!r} now",
                reason="ADAPTER_NOT_LOADED",
                metadata={"param": "model", "model": adapter},
                retry_after_seconds=_DRAINING_RETRY_SECONDS,
            )
        now = time.monotonic()
        ORDER.set(self._queueing.order(read_hints(metadata), now))
        meter = self._ledger.start(_request_id(metadata), now)
        span = tracing.start_request(metadata, operation, self._model, meter.request_id)
        self._idle.clear()
        self._on_change()
        status = grpc.StatusCode.OK
        continuation = CONTINUATION.get()
        if continuation is not None:
            self._continuations.add(continuation)
        try:
            header_model, tier = metadata.get(MODEL_HEADER) or None, metadata.get(_TIER_HEADER, "")
            yield Call(meter, metadata.get(ROUTE_MODEL_HEADER), header_model, tier)
        except BaseException as error:
            status = _status_of(error)
            if continuation is not None and _goes_on_elsewhere(continuation, status):
                # Another replica takes the answer up, and counts all of it: here it went elsewhere.
                status = grpc.StatusCode.UNAVAILABLE
                meter.prompt_tokens = meter.completion_tokens = 0
            raise
        finally:
            if continuation is not None:
                self._continuations.discard(continuation)
            self._close(meter, status, operation, span)

    def check_model(self, model: str, call: Call) -> None:
        """Checks the model that a request names against what it was routed for and what this replica serves.

        Raises:
            InvalidRequest: It names none.
            ModelMismatch: It names another one than the request was routed for.
            ModelNotFound: It was not routed, and this replica does not serve it.
        """
        if not model:
            raise InvalidRequest("model: required, the name of a model", metadata={"param": "model"})
        for expected in (call.route_model, call.header_model):
            if expected is not None and expected != model:
                raise ModelMismatch(
                    f"the request names the model {model!r} but was routed for {expected!r}",
                    metadata={"param": "model", "model": model, "routed_for": expected},
                )
        # A routed name is the picker's to know: an alias may be younger than this replica.
        if call.route_model is None and model not in self._names:
            raise ModelNotFound(f"this replica does not serve {model!r}", metadata={"param": "model", "model": model})

    def engine_name(self, model: str) -> str:
        """Returns the name to give to the engine for a model that ``check_model`` let pass."""
        return model if model in self._names else self._model

    def adapter_of(self, model: str) -> str:
        """Returns the adapter that a request names; empty where it names the model itself."""
        return model if model in self._adapters else ""

    async def _wait_idle(self, timeout_seconds: float) -> bool:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _close(self, meter: Meter, status: grpc.StatusCode, operation: str, span: Span) -> None:
        finished = self._ledger.finish(meter, status.value[0], time.monotonic())
        used = {"prompt_tokens": finished.prompt_tokens, "completion_tokens": finished.completion_tokens}
        tracing.end_request(span, status=status.name, **used)
        metrics.observe(self._model, operation, status.name, finished)
        log.info(
            "request finished",
            request_id=meter.request_id,
            operation=operation,
            status=status.name,
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            time_to_first_token_seconds=_rounded(finished.time_to_first_token),
            duration_seconds=_rounded(finished.duration),
        )
        if self._ledger.running_count == 0:
            self._idle.set()
        self._on_change()


def _request_id(metadata: dict[str, str]) -> str:
    given = metadata.get(REQUEST_ID_HEADER, "")
    return given if given.isprintable() and 0 < len(given) <= _REQUEST_ID_LIMIT else uuid.uuid4().hex


def _goes_on_elsewhere(continuation: Continuation, status: grpc.StatusCode) -> bool:
    """Whether the relay has another replica go on with an answer that ended so."""
    if status is grpc.StatusCode.CANCELLED:
        return continuation.leaving.is_set()
    is_own = status is grpc.StatusCode.UNAVAILABLE or (continuation.is_begun and status in _OWN_FAULTS)
    return is_own and not continuation.is_ordinary


def _status_of(error: BaseException) -> grpc.StatusCode:
    if isinstance(error, HeliosError):
        return grpc.StatusCode[error.grpc_code]
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.INTERNAL


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
