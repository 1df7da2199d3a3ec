"""The ``Engine`` protocol on vLLM's AsyncLLM and its OpenAI serving classes."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

import orjson
import structlog

from helios.mesh.errors import Bug, HeliosError, ReplicaLost
from helios.worker.engines.vllm import compat, errors
from helios.worker.engines.vllm.arguments import compile_inputs, engine_arguments
from helios.worker.engines.vllm.pieces import PieceCutter
from helios.worker.engines.vllm.prompts import PromptRenderer
from helios.worker.replica.compile_cache import cache_directory
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

_ERROR_EVENT: Final = 'data: {"error"'
# Nothing runs any more when an engine is closed. A graceful end of EngineCore may take seconds, in which the device is
# not free; after this it is killed.
_SHUTDOWN_SECONDS: Final = 0.2


class VllmEngine:
    """One model in vLLM. Made before the process has other threads, because it forks; used in one event loop."""

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Loads the model; returns when the engine takes requests."""
        if compat.check_version():
            compat.fork_instead_of_spawn()
        self._model = spec.model
        self._settings = spec.settings
        self._sink = compat.LoadSink(hooks.on_load)
        arguments = engine_arguments(spec, hooks.phase_descriptor)
        if spec.compile_cache_directory and not arguments.enforce_eager:
            compat.keep_compiled(cache_directory(spec.compile_cache_directory, compile_inputs(spec)))
        self._llm = compat.make_llm(
            arguments,
            stat_loggers=[lambda *_: self._sink],
            on_forked=hooks.on_forked,
            while_loading=self._prepare,
        )
        with hooks.phase("api"):
            self._make_api(spec)

    def _make_api(self, spec: ReplicaSpec) -> None:
        config = self._llm.vllm_config
        self._facts = EngineFacts(
            max_context_tokens=config.model_config.max_model_len,
            vocabulary_size=config.model_config.get_vocab_size(),
            kv_cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            can_sleep=config.model_config.enable_sleep_mode,
        )
        self._sleep_level = 0
        models = compat.OpenAIServingModels(
            self._llm, [compat.BaseModelPath(name=name, model_path=spec.model_path) for name in spec.names]
        )
        self._chat = compat.OpenAIServingChat(
            self._llm,
            models,
            "assistant",
            online_renderer=self._renderer,
            request_logger=None,
            chat_template=self._chat_template,
            chat_template_content_format="auto",
            enable_prompt_tokens_details=True,
            reasoning_parser=spec.settings.reasoning_parser,
            enable_auto_tools=bool(spec.settings.tool_call_parser),
            tool_parser=spec.settings.tool_call_parser or None,
        )
        self._completion = compat.OpenAIServingCompletion(
            self._llm, models, online_renderer=self._renderer, request_logger=None, enable_prompt_tokens_details=True
        )
        self._prompts = PromptRenderer(config.model_config, self._llm.renderer, self._chat_template)

    def _prepare(self, model_config: Any, renderer: Any) -> None:
        """Does what needs no weights and what the first request would otherwise wait for."""
        settings = self._settings
        self._chat_template = settings.chat_template or compat.chat_template_of(model_config, renderer.tokenizer)
        self._renderer = compat.OnlineRenderer(
            model_config,
            renderer,
            request_logger=None,
            chat_template=self._chat_template,
            chat_template_content_format="auto",
            reasoning_parser=settings.reasoning_parser,
            enable_auto_tools=bool(settings.tool_call_parser),
            tool_parser=settings.tool_call_parser or None,
        )
        self._renderer.warmup()

    @property
    def facts(self) -> EngineFacts:
        """What does not change."""
        return self._facts

    def load(self) -> EngineLoad:
        """Returns the scheduler's last report."""
        load = self._sink.load
        return dataclasses.replace(load, is_dead=True) if self._llm.errored else load

    async def sleep(self, level: int) -> int:
        """Takes weights and KV cache off the devices. What stays there (CUDA's context) is measured from outside: 0."""
        try:
            await compat.put_to_sleep(self._llm, level)
        except RuntimeError as error:
            raise ReplicaLost(f"vLLM could not put the model to sleep: {error}") from error
        self._sleep_level = level
        return 0

    async def wake(self) -> None:
        """Brings the model back. Raises ReplicaLost where vLLM can't."""
        try:
            await compat.wake_up(self._llm, self._sleep_level)
        except RuntimeError as error:
            raise ReplicaLost(f"vLLM could not wake the model: {error}") from error

    def close(self) -> None:
        """Ends EngineCore."""
        self._llm.shutdown(timeout=_SHUTDOWN_SECONDS)

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers an OpenAI body with vLLM's own serving code."""
        compat.METER.set(meter)
        # What vLLM's serving code reads of an HTTP request: the id that its answers and its engine carry.
        http = SimpleNamespace(headers={"X-Request-Id": meter.request_id}, state=SimpleNamespace())
        try:
            if call is OpenAICall.CHAT_COMPLETION:
                chat = compat.ChatCompletionRequest.model_validate(document)
                result = await self._chat.create_chat_completion(chat, http)
            else:
                completion = compat.CompletionRequest.model_validate(document)
                result = await self._completion.create_completion(completion, http)
        except errors.REQUEST_ERRORS as error:
            raise errors.from_exception(error) from error
        if isinstance(result, compat.ErrorResponse):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                # vLLM's serving code turns a cancel into an answer ("Client disconnected") and goes on.
                raise asyncio.CancelledError
            raise errors.from_response(result, self._model)
        if isinstance(result, compat.ChatCompletionResponse | compat.CompletionResponse):
            return JsonAnswer(result.model_dump_json().encode())
        return await _open(result)

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Generates with AsyncLLM directly: token ids and log probabilities are the engine's."""
        compat.METER.set(meter)
        try:
            rendered, parameters = await self._prompts.render(prompt, sampling)
            cutter = PieceCutter()
            outputs = self._llm.generate(rendered, parameters, meter.request_id)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield cutter.cut(output)
        except errors.REQUEST_ERRORS as error:
            raise errors.from_exception(error) from error

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Tokenizes with the model's tokenizer and chat template."""
        try:
            return await self._prompts.tokenize(prompt)
        except errors.REQUEST_ERRORS as error:
            raise errors.from_exception(error) from error


async def _open(events: AsyncGenerator[str, None]) -> EventStream:
    """Waits for the first event; where that is an error, the call fails with it instead of streaming it."""
    try:
        first = await anext(events)
    except StopAsyncIteration as error:
        raise Bug("the engine ended a stream before its first event") from error
    if first.startswith(_ERROR_EVENT):
        await events.aclose()
        raise _read_error(first)
    return EventStream(_rest(first, events))


async def _rest(first: str, events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            if event.startswith(_ERROR_EVENT):
                raise _read_error(event)
            yield event


def _read_error(event: str) -> HeliosError:
    return errors.from_document(orjson.loads(event.removeprefix("data: "))["error"])
