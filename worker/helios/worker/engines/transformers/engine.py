"""The ``Engine`` protocol on a model of transformers: one thread decodes one request."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import structlog
import torch

from helios.mesh.errors import Bug, HeliosError, InvalidRequest, ReplicaLost
from helios.worker.engines.endings import answer_limit
from helios.worker.engines.handover import Handover
from helios.worker.engines.openai_requests import read_request
from helios.worker.engines.openai_shapes import as_generator, shape_answer
from helios.worker.engines.options import Options, read_options
from helios.worker.engines.transformers.admission import Admission
from helios.worker.engines.transformers.decoding import Decoding
from helios.worker.engines.transformers.model import LoadedModel
from helios.worker.replica.engine import (
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
    Tokenized,
)
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

# Each decodes by itself, so more at once only make each other slower.
_THREAD_LIMIT: Final = 8


class TransformersEngine:
    """One model, decoded by threads. Made in any thread; used in one event loop.

    A cancelled request's thread stops before its next token, or the next part of its prompt, and only then is the
    request's KV cache free.
    """

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Loads the model."""
        read_options(Options, spec.options)
        cores = spec.placement.engine_cores
        _place(cores)
        self._model = LoadedModel(spec, hooks)
        self._name = spec.model
        kv_tokens = max(1, spec.kv_cache_bytes // self._model.kv_bytes_per_token)
        context_tokens = min(spec.max_context_tokens or self._model.context_tokens, self._model.context_tokens)
        self._facts = EngineFacts(min(context_tokens, kv_tokens), self._model.vocabulary_size, kv_tokens)
        thread_count = min(_THREAD_LIMIT, spec.settings.max_running_requests or spec.max_running_requests)
        self._admission = Admission(request_count=thread_count, token_count=kv_tokens, on_change=hooks.on_load)
        self._decoders = ThreadPoolExecutor(thread_count, "decode", initializer=_place, initargs=(cores,))
        self._renderer = ThreadPoolExecutor(1, "render")
        self._jobs: set[Handover[list[Piece]]] = set()
        self._is_closed = False
        self._warm_up()

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        return self._facts

    def load(self) -> EngineLoad:
        """Returns what is admitted and what waits."""
        admission = self._admission
        return EngineLoad(admission.running_count, admission.waiting_count, admission.usage_ratio)

    def close(self) -> None:
        """Stops all threads before their next token; does not wait for them."""
        self._is_closed = True
        for job in self._jobs:
            job.is_cancelled.set()
            job.fail(_closed())
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._renderer.shutdown(wait=False, cancel_futures=True)

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers an OpenAI body."""
        request = read_request(call, document, vocabulary_size=self._facts.vocabulary_size)
        pieces = as_generator(self.generate(request.prompt, request.sampling, meter))
        return await shape_answer(call, request, pieces, meter=meter, model=self._name)

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Yields each token when it is drawn."""
        prompt_ids = await self._render(prompt)
        limit = self._limit(len(prompt_ids), sampling)
        booked = (len(prompt_ids) + limit) * sampling.n
        meter.prompt_tokens = len(prompt_ids)
        await self._admission.enter(booked)
        job = self._start(prompt_ids, sampling, limit, booked)
        try:
            while (item := await job.read()) is not None:
                (pieces,) = item
                meter.first_token_at = meter.first_token_at or time.monotonic()
                meter.completion_tokens += sum(len(piece.token_ids) for piece in pieces)
                yield pieces
        finally:
            job.is_cancelled.set()

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Returns the ids that the model would be given."""
        ids = await self._render(prompt)
        return Tokenized(tuple(ids), tuple(self._model.text_of([one], skip_special_tokens=False) for one in ids))

    async def _render(self, prompt: Prompt) -> list[int]:
        if self._is_closed:
            raise _closed()
        ids = await asyncio.get_running_loop().run_in_executor(self._renderer, self._model.render, prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty", metadata={"param": "prompt"})
        return ids

    def _limit(self, prompt_tokens: int, sampling: Sampling) -> int:
        limit = answer_limit(prompt_tokens, sampling.max_tokens, self._facts.max_context_tokens)
        room = self._facts.kv_cache_tokens // sampling.n - prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"n: {sampling.n} such answers need more than the {self._facts.kv_cache_tokens} tokens of KV cache",
                metadata={"param": "n"},
            )
        return min(limit, room)

    def _start(self, prompt_ids: list[int], sampling: Sampling, limit: int, booked: int) -> Handover[list[Piece]]:
        if self._is_closed:
            self._admission.leave(booked)
            raise _closed()
        job = Handover[list[Piece]]()
        self._jobs.add(job)
        future = self._decoders.submit(self._decode, job, prompt_ids, sampling, limit)
        future.add_done_callback(lambda done: job.call(self._end, job, booked, done))
        return job

    def _end(self, job: Handover[list[Piece]], booked: int, done: "Future[None]") -> None:
        self._jobs.discard(job)
        self._admission.leave(booked)
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.error("decoding failed", exc_info=error)
            job.fail(error if isinstance(error, HeliosError) else Bug(f"the engine failed ({type(error).__name__})"))
        else:
            job.end()

    def _decode(self, job: Handover[list[Piece]], prompt_ids: list[int], sampling: Sampling, limit: int) -> None:
        """Decodes a request, its answers in turn. Runs in a thread."""
        with torch.inference_mode():
            answers = [
                Decoding(self._model, prompt_ids, sampling, choice_index=index, limit=limit)
                for index in range(sampling.n)
            ]
            while answers and not job.is_cancelled.is_set():
                pieces = [piece for answer in answers if (piece := answer.step()) is not None]
                if pieces:
                    job.put(pieces)
                answers = [answer for answer in answers if not answer.is_over]

    def _warm_up(self) -> None:
        """Computes two tokens, so that no request pays for what is done once."""
        with torch.inference_mode():
            answer = Decoding(self._model, [1], Sampling(temperature=0, ignore_eos=True), choice_index=0, limit=2)
            while not answer.is_over:
                answer.step()


def _place(cores: tuple[int, ...]) -> None:
    """Binds the calling thread, and the pool that its parallel regions start, to cores; empty: one thread anywhere."""
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(max(1, len(cores)))


def _closed() -> ReplicaLost:
    return ReplicaLost("the engine was closed", retry_after_seconds=1.0)
