"""The ``Engine`` protocol on vLLM's AsyncLLM and its OpenAI serving classes."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from helios.mesh.errors import PreconditionFailed, ReplicaLost
from helios.worker.artifacts.asking import take
from helios.worker.artifacts.requests import COMPILE_CACHE, ArtifactRequest
from helios.worker.engines.vllm import compat, compat_config, compat_statistics, errors, kv_files
from helios.worker.engines.vllm.arguments import compile_inputs, engine_arguments
from helios.worker.engines.vllm.compat_adapters import AdaptedModels, adapter_rank
from helios.worker.engines.vllm.early import load_early
from helios.worker.engines.vllm.openai_api import OpenAIApi, TextApi, VectorApi
from helios.worker.engines.vllm.packing import map_weights
from helios.worker.engines.vllm.pieces import PieceCutter
from helios.worker.engines.vllm.prompts import PromptRenderer
from helios.worker.replica.artifact_directory import drop_unproven, use
from helios.worker.replica.compile_cache import inputs_document
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
    TransferParameters,
)
from helios.worker.replica.phases import write_phase
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

# What only a start can change.
_REPLACE: Final = "helios scale {model} 0 ends the replica, and the next one is started with the settings of then"

# Nothing runs any more when an engine is closed. A graceful end of EngineCore may take seconds, in which the device is
# not free; after this it is killed.
_SHUTDOWN_SECONDS: Final = 0.2
# What NIXL's connector wants to hear of a prompt whose KV cache another engine will take; others do not read it.
_NIXL_REQUEST: Final[Mapping[str, Any]] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def _use_compiled(spec: ReplicaSpec, hooks: EngineHooks) -> None:
    """Has vLLM use what was compiled for such a replica before, here or on another node, and keep what it compiles."""
    inputs = compile_inputs(spec)
    request = ArtifactRequest(COMPILE_CACHE, inputs_document(inputs), spec.revision, spec.replica_id)
    path = Path(spec.compile_cache_directory, request.key)
    drop_unproven(path)
    if spec.artifact_door and not path.is_dir():
        with hooks.phase("fetch_artifact"):
            take(spec.artifact_door, request, timeout_seconds=spec.artifact_seconds)
    # Never released: it is in use for as long as the replica lives.
    compat.keep_compiled(use(path).path)
    drafts = {directory: revision for revision, directory in spec.revision_paths.items()}
    compat.share_compiled(drafts | {spec.model_path: spec.revision})
    hooks.artifacts.append(request)


class VllmEngine:
    """One model in vLLM. Made before the process has other threads, because it forks; used in one event loop."""

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Loads the model; returns when the engine takes requests."""
        if compat.check_version():
            compat.fork_instead_of_spawn()
        self._settings = spec.settings
        self._model = spec.model
        self._sink = compat_statistics.LoadSink(hooks.on_load)
        arguments = engine_arguments(spec, hooks.phase_descriptor)
        # Never released: it is in use for as long as the replica lives.
        self._mapped = map_weights(arguments, spec, hooks)
        load_early(arguments, spec)
        if spec.compile_cache_directory and not arguments.enforce_eager:
            _use_compiled(spec, hooks)
        self._llm = compat.make_llm(
            arguments,
            stat_loggers=[lambda *_: self._sink],
            on_forked=hooks.on_forked,
            while_loading=self._prepare,
            began_at=hooks.began_at,
            losses=hooks.losses,
        )
        self._make_api(spec)
        write_phase(hooks.phase_descriptor, "api", self._llm.joined_at, time.monotonic())

    def _make_api(self, spec: ReplicaSpec) -> None:
        config = self._llm.vllm_config
        is_pooling = config.model_config.runner_type == "pooling"
        self._facts = EngineFacts(
            max_context_tokens=config.model_config.max_model_len,
            vocabulary_size=config.model_config.get_vocab_size(),
            kv_cache_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            # The canary that proves a wake is text.
            can_sleep=config.model_config.enable_sleep_mode and not is_pooling,
        )
        self._sleep_level = 0
        models = AdaptedModels(
            self._llm, [compat.BaseModelPath(name=name, model_path=spec.model_path) for name in spec.names]
        )
        self._api: OpenAIApi
        if is_pooling:
            self._api = VectorApi(self._llm, models, model=spec.model, chat_template=self._chat_template)
        else:
            self._api = TextApi(
                self._llm,
                models,
                self._renderer,
                model=spec.model,
                chat_template=self._chat_template,
                settings=spec.settings,
            )
        self._prompts = PromptRenderer(config.model_config, self._llm.renderer, self._chat_template)

    def _prepare(self, model_config: Any, renderer: Any) -> None:
        """Does what needs no weights and what the first request would otherwise wait for."""
        settings = self._settings
        self._chat_template = settings.chat_template or compat.chat_template_of(model_config, renderer.tokenizer)
        self._renderer = None
        if model_config.runner_type == "pooling":
            return
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

    async def prefill(self, token_ids: Sequence[int], transfer: str) -> TransferParameters:
        """Computes a prompt for another replica: one token is drawn, because vLLM draws one, and thrown away."""
        parameters = compat.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=compat.RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {**_NIXL_REQUEST, kv_files.TRANSFER: transfer}},
        )
        prompt = compat.TokensPrompt(prompt_token_ids=list(token_ids))
        found: TransferParameters | None = None
        try:
            async with contextlib.aclosing(self._llm.generate(prompt, parameters, f"prefill-{transfer}")) as outputs:
                async for output in outputs:
                    found = output.kv_transfer_params
        except errors.REQUEST_ERRORS as error:
            raise errors.from_exception(error) from error
        # What a connector between devices says of its blocks; files are found by the transfer's name.
        return found or {kv_files.TRANSFER: transfer}

    async def load_adapter(self, name: str, path: str) -> Any:
        """Loads an adapter into all ranks. Raises PreconditionFailed: what this replica, or vLLM, has against it."""
        lora = self._llm.vllm_config.lora_config
        if lora is None:
            raise PreconditionFailed(
                f"the adapter {name!r} can't be loaded: this replica was started when its model's settings said nothing"
                f" of LoRA, so it has no room for adapters. {_REPLACE.format(model=self._model)}",
                reason="ADAPTERS_NOT_ENABLED",
            )
        rank = await asyncio.to_thread(adapter_rank, path)
        if rank > lora.max_lora_rank:
            raise PreconditionFailed(
                f"the adapter {name!r} has rank {rank}, and this replica was started for ranks up to"
                f" {lora.max_lora_rank}. Set lora.max_rank to {compat_config.lora_rank_for(rank)} or more, then:"
                f" {_REPLACE.format(model=self._model)}",
                reason="ADAPTER_RANK_TOO_LARGE",
            )
        try:
            with compat.told_apart():
                return await self._llm.adapters.load(name, path)
        except RuntimeError as error:
            if self._llm.errored:
                raise ReplicaLost(f"the adapter {name!r} can't be loaded: the engine died") from error
            raise PreconditionFailed(f"the adapter {name!r} can't be loaded: {error}", reason="BAD_ADAPTER") from error

    async def unload_adapter(self, name: str, loaded: Any) -> None:
        """Drops an adapter from all ranks once no request uses it."""
        try:
            with compat.told_apart():
                await self._llm.adapters.unload(name, loaded)
        except RuntimeError as error:
            raise ReplicaLost(f"vLLM could not drop the adapter {name!r}: {error}") from error

    def close(self) -> None:
        """Ends EngineCore."""
        self._llm.shutdown(timeout=_SHUTDOWN_SECONDS)

    async def answer(self, call: OpenAICall, document: Mapping[str, Any], meter: Meter) -> JsonAnswer | EventStream:
        """Answers an OpenAI body with vLLM's own serving code."""
        compat.METER.set(meter)
        try:
            return await self._api.answer(call, document, meter.request_id)
        except errors.REQUEST_ERRORS as error:
            raise errors.from_exception(error) from error

    async def generate(self, prompt: Prompt, sampling: Sampling, meter: Meter) -> AsyncIterator[Sequence[Piece]]:
        """Generates with AsyncLLM directly: token ids and log probabilities are the engine's."""
        compat.METER.set(meter)
        self._api.check_makes_text()
        try:
            rendered, parameters = await self._prompts.render(prompt, sampling)
            cutter = PieceCutter()
            adapter = self._llm.adapters.current.get(sampling.adapter)
            outputs = self._llm.generate(rendered, parameters, meter.request_id, lora_request=adapter)
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
