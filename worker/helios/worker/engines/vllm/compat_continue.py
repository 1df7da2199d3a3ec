"""Answers that another replica can take up, and that are taken up here: a part of ``compat``.

Between an engine's tokens and an answer's bytes vLLM keeps state in many places: the detokenizer (half a character,
text held back for a stop string), parsers of tools and reasoning, counts. None of it is copied. The tokens that there
are go through vLLM's output processor again, in the portions in which they went through it before, and only when its
serving code has taken them all does the engine get the request: with the prompt and these tokens as its prompt, and so
much less to make. What the engine itself keeps of an answer's tokens is refused from the start (`check_continuable`).
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.continuation import CONTINUATION, Continuation

# What the engine counts or tracks over the tokens of an answer, which it would take for a part of the prompt: names of
# SamplingParams, what they are without effect, and what a caller knows them as.
_TRACKED: Final[tuple[tuple[str, Any, str], ...]] = (
    ("n", 1, "n"),
    ("presence_penalty", 0.0, "presence_penalty"),
    ("frequency_penalty", 0.0, "frequency_penalty"),
    ("structured_outputs", None, "response_format"),
    ("bad_words", None, "bad_words"),
    ("thinking_token_budget", None, "thinking_token_budget"),
    ("repetition_detection", None, "repetition_detection"),
    # Each token's goes to the client with it, and those of tokens that were made elsewhere are not here.
    ("logprobs", None, "logprobs"),
    ("prompt_logprobs", None, "prompt_logprobs"),
    ("logprob_token_ids", None, "logprob_token_ids"),
    ("trace_decode_token_ids", None, "trace_decode_token_ids"),
)


def check_continuable(params: Any, continuation: Continuation) -> bool:
    """Returns whether another replica could go on with a request; raises VLLMValidationError, with the field's name,
    where it was asked for.
    """
    for name, without_effect, field in _TRACKED:
        value = getattr(params, name)
        if value != without_effect and value not in ([], ()):
            what = (
                " (a grammar, which strict tools and some choices of tools bring, too)"
                if name == "structured_outputs"
                else ""
            )
            return _refuse(continuation, field, f"depends on what an engine keeps of the tokens that it made{what}")
    # Greedy tokens need none; other ones come of a generator's state, which has drawn once for each token.
    if params.seed is not None and params.temperature > 0:
        return _refuse(continuation, "seed", "would need the state of a random generator")
    return True


def _refuse(continuation: Continuation, field: str, why: str) -> bool:
    error = continuation.refuse(field, why)
    if error is not None:
        # vLLM's serving code knows its own errors only.
        raise VLLMValidationError(error.message, parameter=field)
    return False


class Replay:
    """The tokens of one answer that was begun elsewhere, on their way through vLLM's output processor."""

    def __init__(self, llm: Any, continuation: Continuation) -> None:
        self._llm = llm
        self._continuation = continuation
        self._request: EngineCoreRequest | None = None
        self._next = 0

    async def add(self, request: EngineCoreRequest, prompt: str | None, queue: Any) -> bool:
        """Takes a request in AsyncLLM's stead, where it continues an answer; returns whether it does."""
        progress = self._continuation.progress
        if progress is not None:
            # A template may say the time of day: what the answer began with is what counts.
            request.prompt_token_ids = list(progress.prompt)
        try:
            self._continuation.begin(request.prompt_token_ids or ())
        except InvalidRequest as error:
            raise VLLMValidationError(error.message, parameter="prompt") from error
        if progress is None:
            return False
        self._llm.check_admission(request_id=request.request_id)
        self._llm.output_processor.add_request(request, prompt, None, 0, queue)
        self._request = request
        await self.advance()
        return True

    async def advance(self) -> None:
        """Gives vLLM's serving code, which has asked for it, the next output; after the last one, the engine its
        request.
        """
        progress, request = self._continuation.progress, self._request
        assert progress is not None
        assert request is not None
        if self._next == len(progress.steps):
            self._continuation.go_live()
            await self._llm.engine_core.add_request_async(_rest(request, progress.token_ids))
            return
        output = EngineCoreOutput(request.request_id, list(progress.steps[self._next]))
        if not self._next:
            counts = PrefillStats(num_prompt_tokens=len(progress.prompt))
            counts.num_cached_tokens = progress.cached_prompt_tokens
            output.prefill_stats = counts
        self._next += 1
        self._llm.output_processor.process_outputs([output])


REPLAY: Final[ContextVar[Replay | None]] = ContextVar("helios_replay", default=None)
"""That of the request that the current task serves; None: its answer ends with this replica."""


async def continued(
    llm: Any, generate: Callable[..., AsyncGenerator[RequestOutput, None]], *args: Any, **kwargs: Any
) -> AsyncGenerator[RequestOutput, None]:
    """Yields what ``generate`` does, AsyncLLM's own, for an answer that can be taken up or is."""
    continuation = CONTINUATION.get()
    assert continuation is not None
    if not check_continuable(args[1], continuation):
        async with aclosing(generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield output
        return
    replay = Replay(llm, continuation)
    REPLAY.set(replay)
    async with aclosing(generate(*args, **kwargs)) as outputs:
        async for output in outputs:
            if not continuation.is_live:
                yield output
                await replay.advance()
                continue
            continuation.cached_prompt_tokens = output.num_cached_tokens or 0
            continuation.hand(output.outputs[0].token_ids, is_last=output.finished)
            yield output
            continuation.asked()


def _rest(request: EngineCoreRequest, token_ids: list[int]) -> EngineCoreRequest:
    """Returns the request for what is still to be made of its answer."""
    rest, params = copy(request), copy(request.sampling_params)
    assert params is not None
    if params.max_tokens is not None:
        params.max_tokens -= len(token_ids)
    params.min_tokens = max(0, params.min_tokens - len(token_ids))
    rest.prompt_token_ids = [*(request.prompt_token_ids or ()), *token_ids]
    rest.sampling_params = params
    return rest
