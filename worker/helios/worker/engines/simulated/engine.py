"""The ``Engine`` protocol on a simulated scheduler: steps that take time, and nothing computed in them.

A token is a word, an answer repeats the words of its prompt; the model's directory is not read.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from helios.mesh.errors import Bug, HeliosError, ReplicaLost, Unavailable
from helios.worker.engines.endings import answer_limit
from helios.worker.engines.openai_requests import read_request
from helios.worker.engines.openai_shapes import as_generator, shape_answer
from helios.worker.engines.options import read_options
from helios.worker.engines.simulated.faults import Fault, Faults
from helios.worker.engines.simulated.requests import VOCABULARY_SIZE, Request, token_id_of
from helios.worker.engines.simulated.scheduler import Capacity, Scheduler, Step
from helios.worker.engines.simulated.settings import SimulatedOptions
from helios.worker.replica.continuation import CONTINUATION, Continuation
from helios.worker.replica.engine import (
    Conversation,
    EngineFacts,
    EngineHooks,
    EngineLoad,
    EventStream,
    JsonAnswer,
    Meter,
    OpenAICall,
    Piece,
    Prompt,
    Sampling,
    TokenIds,
    Tokenized,
)
from helios.worker.replica.queueing import ORDER
from helios.worker.replica.settings import Compilation
from helios.worker.replica.spec import ReplicaSpec


class SimulatedEngine:
    """Answers with the prompt's own words. Made in any thread; used in one event loop.

    Steps are timers of the loop, not a task: there is nothing to own or to cancel when nobody asks for anything.
    """

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Takes as long as a start is to take.

        Raises:
            InvalidRequest: Bad options.
            Unavailable: The start is to fail.
        """
        hooks.on_forked()
        options = self._options = read_options(SimulatedOptions, spec.options)
        self._model = spec.model
        self._on_load = hooks.on_load
        self._faults = Faults(options)
        block_count = spec.kv_cache_bytes // (options.kv_bytes_per_token * options.kv_block_tokens)
        kv_tokens = max(1, block_count) * options.kv_block_tokens
        context_tokens = min(spec.max_context_tokens or options.context_tokens, kv_tokens)
        self._facts = EngineFacts(context_tokens, VOCABULARY_SIZE, kv_tokens, options.can_sleep)
        self._wake_count = 0
        self._has_wrong_weights = False
        self._scheduler = Scheduler(
            Capacity(
                max_batch=options.max_batch or spec.settings.max_running_requests or spec.max_running_requests,
                max_batched_tokens=options.max_batched_tokens,
                block_count=max(1, block_count),
                block_tokens=options.kv_block_tokens,
            )
        )
        self._requests: dict[int, Request] = {}
        self._request_count = 0
        self._sequence_count = 0
        self._step_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_dead = False
        self._begin(spec, hooks)

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        return self._facts

    def load(self) -> EngineLoad:
        """Returns what the scheduler holds now."""
        scheduler = self._scheduler
        return EngineLoad(scheduler.running_count, scheduler.waiting_count, scheduler.usage_ratio, self._is_dead)

    def close(self) -> None:
        """Ends what is under way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_all(ReplicaLost("the engine was closed"))

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers an OpenAI body."""
        request = read_request(call, document, vocabulary_size=VOCABULARY_SIZE)
        if not request.is_stream:
            # Its client has nothing of it: another replica begins anew.
            CONTINUATION.set(None)
        pieces = as_generator(self.generate(request.prompt, request.sampling, meter))
        return await shape_answer(call, request, pieces, meter=meter, model=self._model)

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Yields the tokens of each step."""
        words = _words(prompt)
        if self._has_wrong_weights:
            words = [f"not {word}" for word in words]
        meter.prompt_tokens = len(words)
        continuation = CONTINUATION.get()
        if continuation is not None:
            continuation = _begun(continuation, sampling, words)
        request = self._make_request(words, sampling)
        try:
            async with contextlib.aclosing(self._pieces(request, len(words), continuation)) as batches:
                async for pieces in batches:
                    meter.first_token_at = meter.first_token_at or time.monotonic()
                    meter.completion_tokens += sum(len(piece.token_ids) for piece in pieces)
                    yield pieces
        finally:
            self._forget(request)

    async def _pieces(
        self, request: Request, prompt_tokens: int, continuation: Continuation | None
    ) -> AsyncGenerator[Sequence[Piece], None]:
        """Yields the tokens of each step; first, of an answer that is taken up, those that there are."""
        progress = continuation.progress if continuation is not None else None
        for step in progress.steps if progress is not None else ():
            yield request.replay(step)
        self._start(request, prompt_tokens + (len(progress.token_ids) if progress is not None else 0))
        if continuation is None:
            while pieces := await request.read():
                yield pieces
            return
        continuation.go_live()
        while pieces := await request.read():
            token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
            continuation.hand(token_ids, is_last=pieces[-1].finish is not None)
            yield pieces
            continuation.asked()

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Splits into words."""
        words = _words(prompt)
        return Tokenized(tuple(map(token_id_of, words)), tuple(words))

    async def sleep(self, level: int) -> int:
        """Sleeps, whatever the level."""
        await asyncio.sleep(self._options.sleep_seconds)
        return self._options.left_bytes

    async def wake(self) -> None:
        """Wakes.

        Raises:
            Unavailable: This wake is to fail.
        """
        await asyncio.sleep(self._options.sleep_seconds)
        self._wake_count += 1
        fails, self._has_wrong_weights = self._faults.wake(self._wake_count)
        if fails:
            raise Unavailable("simulated: this wake fails", reason="SIMULATED_WAKE_FAILURE")

    def _begin(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        with hooks.phase("load"):
            time.sleep(self._options.start_seconds)
        if self._faults.has_failed_start(spec.replica_id):
            raise Unavailable(f"simulated: the start of {spec.replica_id} fails", reason="SIMULATED_START_FAILURE")
        if spec.settings.compilation is Compilation.COMPILED:
            with hooks.phase("compile"):
                time.sleep(self._options.compile_seconds)
            if self._faults.has_failed_compile(spec.replica_id):
                message = f"simulated: {spec.replica_id} can't be compiled"
                raise Unavailable(message, reason="SIMULATED_COMPILE_FAILURE")

    def _make_request(self, words: Sequence[str], sampling: Sampling) -> Request:
        if self._is_dead:
            raise _dead()
        context = self._facts.max_context_tokens
        limit = answer_limit(len(words), sampling.max_tokens, context)
        if sampling.max_tokens is None and not sampling.ignore_eos:
            limit = min(limit, max(self._options.answer_tokens, sampling.min_tokens or 0))
        keys = range(self._sequence_count, self._sequence_count + sampling.n)
        self._sequence_count = keys.stop
        self._request_count += 1
        fate = self._faults.fate(self._request_count, limit)
        return Request(keys, words, sampling, limit=limit, fate=fate)

    def _start(self, request: Request, prompt_tokens: int) -> None:
        if self._is_dead:
            raise _dead()
        for key in request.keys:
            self._requests[key] = request
            self._scheduler.add(key, prompt_tokens, ORDER.get() or 0)
        self._step()
        self._on_load()

    def _forget(self, request: Request) -> None:
        for key in request.keys:
            self._drop(key)
        self._on_load()

    def _drop(self, key: int) -> None:
        self._scheduler.remove(key)
        self._requests.pop(key, None)

    def _step(self) -> None:
        """Begins a step, where none is under way and there is something to do."""
        if self._timer is not None or (step := self._scheduler.plan()) is None:
            return
        self._step_count += 1
        options = self._options
        seconds = step.prefill_tokens * options.prefill_seconds_per_token
        if step.decode_count:
            seconds += options.decode_seconds_per_token + step.decode_count * options.decode_seconds_per_sequence
        seconds *= self._faults.jitter(self._step_count)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._finish_step, step)

    def _finish_step(self, step: Step) -> None:
        self._timer = None
        stall_seconds = 0.0
        for key in self._scheduler.complete(step):
            # Gone where another answer of its request failed just now.
            if (request := self._requests.get(key)) is None:
                continue
            faults = request.faults_at_next_token(key)
            if Fault.DEATH in faults:
                self._die()
                return
            if Fault.ERROR in faults:
                self._fail(request, Bug("simulated: this request fails", reason="SIMULATED_FAILURE"))
                continue
            if Fault.STALL in faults:
                stall_seconds = self._options.stall_seconds
            if request.make_token(key):
                self._drop(key)
        if stall_seconds:
            self._timer = asyncio.get_running_loop().call_later(stall_seconds, self._resume)
        else:
            self._step()
        self._on_load()

    def _resume(self) -> None:
        self._timer = None
        self._step()

    def _die(self) -> None:
        self._is_dead = True
        self._fail_all(_dead())
        self._on_load()

    def _fail(self, request: Request, error: HeliosError) -> None:
        request.fail(error)
        for key in request.keys:
            self._drop(key)

    def _fail_all(self, error: HeliosError) -> None:
        for request in set(self._requests.values()):
            self._fail(request, error)


def _begun(continuation: Continuation, sampling: Sampling, words: Sequence[str]) -> Continuation | None:
    """Begins an answer that another replica can take up; None where it is an ordinary one. Raises InvalidRequest."""
    error = None
    if sampling.n > 1:
        error = continuation.refuse("n", "several answers")
    elif sampling.logprobs is not None:
        error = continuation.refuse("logprobs", "what another replica computed is not here")
    if error is not None:
        raise error
    if continuation.is_ordinary:
        return None
    continuation.begin([token_id_of(word) for word in words])
    return continuation


def _dead() -> ReplicaLost:
    return ReplicaLost("simulated: the engine died", retry_after_seconds=1.0)


def _words(prompt: Prompt) -> list[str]:
    if isinstance(prompt, Conversation):
        text = " ".join(turn.content for turn in prompt.turns)
    elif isinstance(prompt, TokenIds):
        text = " ".join(map(str, prompt.ids))
    else:
        text = prompt.text
    return [f"{word} " for word in text.split()] or [" "]
