"""Every place where Helios leans on what vLLM does not promise to keep; pinned to one minor version.

What stock vLLM can't do is had here: its EngineCore is forked (its CPU platform insists on spawning, and each spawn
imports torch and vLLM for nine seconds anew) before tokenizer and renderer are built; the process that computes is
bound to its cores after the fork (vLLM binds by environment variables that libgomp read long before); and every
request is metered in one place.

``tests/worker/engines/test_compat.py`` holds one test for each symbol. With another version than PINNED the contract is
unknown: ``check_version`` says so, and vLLM then does everything in its own way.
"""

import asyncio
import json
import multiprocessing
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final

import torch
import vllm
import vllm.distributed.elastic_ep.elastic_execute
import vllm.entrypoints.serve.utils.fingerprint
import vllm.envs
import vllm.model_executor.layers.quantization.online.base
import vllm.renderers.hf
import vllm.tokenizers.hf
import vllm.utils.system_utils
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.core
import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor
import vllm.v1.executor.uniproc_executor
from vllm.distributed.parallel_state import get_pp_group
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import (
    GracefulHTTPError,
    RetryableRequestError,
    VLLMClientError,
    VLLMError,
    VLLMNotFoundError,
    VLLMValidationError,
)
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import async_llm as async_llm_module
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from helios.worker.engines.vllm import compat_early, compat_packed, failures, quick_start
from helios.worker.engines.vllm.compat_adapters import AdapterTable, correct_kernels
from helios.worker.engines.vllm.compat_compiled import (
    SETTINGS_KEY,
    compile_surroundings,
    keep_compiled,
    share_compiled,
)
from helios.worker.engines.vllm.compat_continue import REPLAY, continued
from helios.worker.engines.vllm.compat_losses import telling
from helios.worker.engines.vllm.compat_outputs import OutputPump, spare_checks_of_answers
from helios.worker.engines.vllm.compat_pooling import BertEmbeddingModel, PoolingRequestOutput
from helios.worker.engines.vllm.compat_statistics import Unpublished
from helios.worker.engines.vllm.compat_streams import TemplatedServingChat as OpenAIServingChat
from helios.worker.engines.vllm.compat_version import check_version, is_pinned
from helios.worker.engines.vllm.held_tokenizers import HeldTokenizers
from helios.worker.engines.vllm.ranks import rank_cores
from helios.worker.engines.vllm.transfers import with_transfer
from helios.worker.replica.continuation import CONTINUATION
from helios.worker.replica.engine import PREFILL, Meter
from helios.worker.replica.loss_pipe import LossWriter
from helios.worker.replica.packed_writer import ArtifactWriter
from helios.worker.replica.phases import write_phase
from helios.worker.replica.queueing import ORDER

# The CPU worker patches torch when it is imported, so only the device's own worker may be.
if current_platform.is_cpu():
    import vllm.v1.attention.backends.cpu_attn
    from vllm.v1.worker.cpu_worker import CPUWorker as DeviceWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as DeviceWorker

__all__ = [
    "HELD_TOKENIZERS",
    "AsyncEngineArgs",
    "BaseModelPath",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatParams",
    "CompletionRequest",
    "CompletionResponse",
    "EngineDeadError",
    "ErrorResponse",
    "GracefulHTTPError",
    "MeteredLLM",
    "OnlineRenderer",
    "OpenAIServingChat",
    "OpenAIServingCompletion",
    "OutputPump",
    "PlacedWorker",
    "RequestOutput",
    "RequestOutputKind",
    "RetryableRequestError",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "VLLMClientError",
    "VLLMError",
    "VLLMNotFoundError",
    "VLLMValidationError",
    "can_sleep",
    "chat_template_of",
    "check_version",
    "compile_surroundings",
    "fork_instead_of_spawn",
    "is_pinned",
    "keep_compiled",
    "make_llm",
    "pack_weights",
    "parse_model_prompt",
    "prepare_before_fork",
    "put_to_sleep",
    "runs_eagerly",
    "share_compiled",
    "told_apart",
    "wake_up",
]

_PRELOADED_MODELS: Final = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "BertModel": BertEmbeddingModel,
}
# Modules that imported get_mp_context by name: replacing it in one place would not reach the others.
_USERS_OF_MP_CONTEXT: Final = (vllm.utils.system_utils, vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor)

HELD_TOKENIZERS: Final = HeldTokenizers(capacity=4)
"""Those of the models that ran here last. 4: some 60 MiB of the launcher for each, shared by all that it forks."""
# When this process began to be an EngineCore, last; its workers inherit it.
_began_at: Final = [0.0]
METER: Final[ContextVar[Meter | None]] = ContextVar("helios_meter", default=None)
"""The meter of the request that the current task serves; set by the engine around each call into vLLM."""


def runs_eagerly() -> bool:
    """Returns whether compiling costs more than it gains: on a CPU it takes a minute and a half for nothing."""
    return bool(current_platform.is_cpu())


def can_sleep() -> bool:
    """Returns whether vLLM can take a model's weights and KV cache off this kind of device."""
    return bool(current_platform.is_sleep_mode_available())


async def put_to_sleep(llm: AsyncLLM, level: int) -> None:
    """Takes weights and KV cache off the devices of all ranks. There must be no request.

    Raises:
        RuntimeError: A rank could not.
    """
    with told_apart():
        # What the prefix cache names would be other blocks after waking.
        await llm.reset_prefix_cache()
        await llm.sleep(level=level)


async def wake_up(llm: "MeteredLLM", level: int) -> None:
    """Brings all ranks back, after level 2 with weights read anew from the model's directory.

    Weights first and the KV cache last, so that loading has the room that the cache will take.

    Raises:
        RuntimeError: A rank could not.
    """
    with told_apart():
        await llm.wake_up(tags=["weights"])
        if level == 2:
            await llm.collective_rpc("reload_weights")
        await llm.wake_up(tags=["kv_cache"])
        # Buffers of adapters lie with the weights, and are not read from the model's directory.
        await llm.adapters.reload()


@contextmanager
def told_apart() -> Iterator[None]:
    """Makes RuntimeErrors of what a call to all ranks raises."""
    try:
        yield
    except Exception as error:  # vLLM's client raises Exception itself for whatever a rank could not do
        raise RuntimeError(str(error)) from error


def prepare_before_fork() -> None:
    """Does what needs no model and would otherwise be done in every child. Starts no thread, touches no device."""
    # One OpenMP thread: a pool that a parallel region starts here would be missing in the child, which then hangs.
    torch.set_num_threads(1)
    # Known by class, so that no child has to find them out: for a model whose class is known only by name, vLLM starts
    # a Python process that imports everything anew (twelve seconds, once for every machine and version).
    for architecture, model in _PRELOADED_MODELS.items():
        ModelRegistry.register_model(architecture, model)
    if not check_version():
        return
    # Resolves the platform, which is otherwise found out at first use, and replaces Triton kernels by C++ ones: a
    # scan over every module that takes 0.4 s.
    current_platform.register_triton_kernel_overrides()
    setattr(type(current_platform), "register_triton_kernel_overrides", classmethod(lambda _: None))  # noqa: B010
    spare_checks_of_answers()
    compat_early.install()
    quick_start.apply(is_cpu=current_platform.is_cpu())
    if current_platform.is_cpu():
        correct_kernels()
    if current_platform.is_cpu():
        compat_packed.install()
    HELD_TOKENIZERS.install()


def fork_instead_of_spawn() -> None:
    """Makes vLLM fork its processes from this one. Call before an engine is made, in a process without threads."""
    context: BaseContext = multiprocessing.get_context("fork")
    for module in _USERS_OF_MP_CONTEXT:
        setattr(module, "get_mp_context", lambda: context)  # noqa: B010  a patch, and visibly one
    # PlacedWorker binds. vLLM's executor of several ranks would refuse a machine with fewer NUMA nodes than ranks.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # noqa: TID251  the only way to tell it


def pack_weights(arguments: Any, init_method: str, writer: ArtifactWriter) -> Path:
    """Makes the artifact that a replica with these arguments can map; see ``compat_packed.pack``."""
    return compat_packed.pack(
        arguments.create_engine_config(UsageContext.ENGINE_CONTEXT), PlacedWorker, init_method, writer
    )


def chat_template_of(model_config: Any, tokenizer: Any) -> str | None:
    """Returns the template of a text model, None where vLLM must find it out.

    vLLM first asks for a multimodal processor of the model, which for a text model loads the tokenizer once more.
    """
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) and not model_config.is_multimodal_model else None


def worker_settings(cores: tuple[int, ...], phase_descriptor: int) -> dict[str, Any]:
    """Returns the ``additional_config`` that a PlacedWorker reads. A negative descriptor is none."""
    # Only a fork inherits it, and an unknown version spawns.
    descriptor = phase_descriptor if is_pinned() else -1
    return {SETTINGS_KEY: {"cores": list(cores), "phase_descriptor": descriptor}}


class PlacedWorker(DeviceWorker):
    """The process that computes: bound to its cores before its first parallel region, and says when weights are in."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        settings = vllm_config.additional_config[SETTINGS_KEY]
        self._phase_descriptor: int = settings["phase_descriptor"]
        local_rank = kwargs["local_rank"] if "local_rank" in kwargs else args[0]
        cores = rank_cores(settings["cores"], local_rank, vllm_config.parallel_config.local_world_size)
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(max(1, len(cores)))
        super().__init__(vllm_config, *args, **kwargs)
        self._told_at = 0.0

    def init_device(self) -> None:
        """Prepares the device; what comes next is loading."""
        self._told_at = _began_at[-1]
        with self._phase("engine"):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the weights; what comes next is the KV cache and the warm-up."""
        with self._phase("load"):
            super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """Says how much the KV cache may take; where the model is compiled, or nobody says how much, by running it."""
        with self._phase("compile"):
            return int(super().determine_available_memory())

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Allocates the KV cache, which was planned since the memory was known."""
        with self._phase("kv_cache"):
            return super().initialize_from_config(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """Captures graphs, and runs what a first request would otherwise wait for."""
        with self._phase("warm_up"):
            self._make_room_for_what_comes_from_other_ranks()
            return super().compile_or_warm_up_model()

    def _make_room_for_what_comes_from_other_ranks(self) -> None:
        """Makes the buffer of a later group of layers, which vLLM makes in the warm-up that a CPU leaves out."""
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Measures the block, and what EngineCore does for it after the block before, as a phase of the start.

        One rank tells: the others do the same at the same time.
        """
        with _telling(self._phase_descriptor):
            yield
        began_at, self._told_at = self._told_at, time.monotonic()
        if self.rank == 0:
            # As one stretch, though there were many: a phase is what it took, not when.
            loads_at = began_at + compat_early.take_waited_seconds()
            if loads_at > began_at:
                write_phase(self._phase_descriptor, "await_bytes", began_at, loads_at)
            write_phase(self._phase_descriptor, name, loads_at, self._told_at)


def make_llm(
    arguments: Any,
    *,
    stat_loggers: list[Any],
    on_forked: Callable[[], None],
    while_loading: Callable[[Any, Any], None],
    began_at: float,
    losses: LossWriter | None = None,
) -> "MeteredLLM":
    """Makes an engine whose processes load the weights while this one builds tokenizer and renderer.

    AsyncLLM does these one after the other, and for a small model they take about as long. Here EngineCore is forked
    first, from a thread of its own so that its handshake can go on meanwhile; this thread waits until the fork is over.

    Args:
        arguments: AsyncEngineArgs.
        stat_loggers: As AsyncLLM takes them.
        on_forked: Called in another thread when EngineCore's process exists.
        while_loading: Called with the model's config and its renderer while the weights load.
        began_at: When the first phase of the engine's start begins.
        losses: Where the engine tells what its KV cache lost.

    With an unknown version of vLLM everything happens in AsyncLLM's own order, in this thread.
    """
    descriptor = arguments.additional_config[SETTINGS_KEY]["phase_descriptor"]
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    configured_at = time.monotonic()
    write_phase(descriptor, "config", began_at, configured_at)
    if not is_pinned():
        llm = MeteredLLM(
            config, Executor.get_class(config), log_stats=False, log_requests=False, stat_loggers=stat_loggers
        )
        on_forked()
        llm.joined_at = time.monotonic()
        while_loading(config.model_config, llm.renderer)
        return llm
    llm = _make_side_by_side(
        config,
        stat_loggers=stat_loggers,
        on_forked=on_forked,
        while_loading=while_loading,
        phase_descriptor=descriptor,
        configured_at=configured_at,
        losses=losses,
    )
    # The engine may have fitted the context to its KV cache: what was derived from the old length is derived anew.
    for name in ("default_cmpl_tok_params", "default_chat_tok_params"):
        llm.renderer.__dict__.pop(name, None)
    # vLLM's own server does the same after its start: each token asks for some, which is a look into the environment.
    vllm.envs.enable_envs_cache()
    return llm


def _make_side_by_side(
    config: Any,
    *,
    stat_loggers: list[Any],
    on_forked: Callable[[], None],
    while_loading: Callable[[Any, Any], None],
    phase_descriptor: int,
    configured_at: float,
    losses: LossWriter | None,
) -> "MeteredLLM":
    executor_class = Executor.get_class(config)
    joined_at: list[float] = []
    forked: Future[None] = Future()
    started: Future[tuple[Any, float]] = Future()

    def start() -> None:
        try:
            client = EngineCoreClient.make_async_mp_client(
                vllm_config=config, executor_class=executor_class, log_stats=True
            )
            started.set_result((client, time.monotonic()))
        except Exception as error:  # noqa: BLE001  raised in the thread that waits
            started.set_exception(error)
        finally:
            if not forked.done():
                forked.set_result(None)

    def tell() -> None:
        on_forked()
        forked.set_result(None)

    class Started:
        """Stands for EngineCoreClient in AsyncLLM's constructor."""

        @staticmethod
        def make_async_mp_client(*, renderer: Any, **_: Any) -> Any:
            renderer.start_mm_warmup_in_background()
            while_loading(config.model_config, renderer)
            prepared_at = time.monotonic()
            client, connected_at = started.result()
            # What happened at the same time is told last: it is a phase as far as the engine had to wait for it.
            write_phase(phase_descriptor, "connect", configured_at, connected_at)
            write_phase(phase_descriptor, "tokenizer", configured_at, prepared_at)
            joined_at.append(max(connected_at, prepared_at))
            return client

    patches = _patched(async_llm_module, "EngineCoreClient", Started), _notifying(tell)
    with telling(config, losses), patches[0], patches[1], _confessing(phase_descriptor, configured_at):
        threading.Thread(target=start, name="engine core handshake", daemon=True).start()
        forked.result()
        llm = MeteredLLM(
            config, executor_class, log_stats=False, log_requests=False, stat_loggers=[*stat_loggers, Unpublished]
        )
    llm.joined_at = joined_at[0]
    return llm


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _notifying(callback: Callable[[], None]) -> Iterator[None]:
    """Has ``callback`` called, in the thread that forks, when EngineCore's process exists."""
    manager: Any = vllm.v1.engine.utils.CoreEngineProcManager
    original = manager.__init__

    def start_and_tell(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        callback()

    # The method rather than the class: vLLM asks for instances of the class later.
    with _patched(manager, "__init__", start_and_tell):
        yield


@contextmanager
def _confessing(phase_descriptor: int, asked_at: float) -> Iterator[None]:
    """Has an EngineCore that is forked meanwhile say when it began and what it died of: its parent can't know."""
    core: Any = vllm.v1.engine.core.EngineCoreProc
    original = core.__init__

    def start_or_tell(*args: Any, **kwargs: Any) -> None:
        _began_at.append(time.monotonic())
        write_phase(phase_descriptor, "spawn", asked_at, _began_at[-1])
        with _telling(phase_descriptor):
            original(*args, **kwargs)

    with _patched(core, "__init__", start_or_tell):
        yield


@contextmanager
def _telling(phase_descriptor: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # raised again, and said on the way; safetensors' errors, for one, have no other base
        reason, message = failures.classify(error)
        if phase_descriptor >= 0:
            os.write(phase_descriptor, json.dumps({"reason": reason, "message": message}).encode() + b"\n")
        raise


class MeteredLLM(AsyncLLM):
    """AsyncLLM that counts each request's tokens into the METER of its task, and the requests of each adapter."""

    joined_at: float
    """When its front and its EngineCore had found each other."""

    @cached_property
    def adapters(self) -> AdapterTable:
        """The adapters that are loaded."""
        return AdapterTable(self)

    def _run_output_handler(self) -> None:
        if self.output_handler is not None:
            return
        if not is_pinned() or not OutputPump.can_stand_for(self):
            super()._run_output_handler()
            return
        assert self.logger_manager is not None
        pump = OutputPump(self.engine_core, self.output_processor, self.logger_manager.record)
        # The task is vLLM's: it asks it whether the engine lives, and cancels it.
        task = asyncio.get_running_loop().create_task(pump.run(), name="engine outputs")
        self.output_handler: asyncio.Task[None] | None = task
        self.engine_core.resources.output_queue_task = task

    async def get_supported_tasks(self) -> Any:
        """Asks the engine. A request does this first, and vLLM's own reader of outputs would be started by it."""
        self._run_output_handler()
        return await super().get_supported_tasks()

    async def add_request(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a request where it stands in the queue: what a client says of that (`priority`) is not its to say."""
        # vLLM begins the lowest first. Nobody's request is the replica's own.
        kwargs["priority"] = ORDER.get() or 0
        meter = METER.get()
        if meter is not None and self.vllm_config.kv_events_config is not None:
            kwargs["session_id"] = meter.request_id
        return await super().add_request(*args, **kwargs)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """Generates as AsyncLLM does. Closing the generator aborts the request at once, not when it is collected."""
        meter = METER.get()
        if (prefill := PREFILL.get()) is not None:
            args = await with_transfer(prefill, self.vllm_config.cache_config.block_size, *args, **kwargs)
        with self.adapters.use(kwargs):
            # What is not streamed is begun anew elsewhere: its client has nothing of it.
            is_continued = CONTINUATION.get() is not None and args[1].output_kind is RequestOutputKind.DELTA
            if is_continued:
                outputs = continued(self, super().generate, *args, **kwargs)
            else:
                outputs = super().generate(*args, **kwargs)
            try:
                async for output in outputs:
                    if meter is not None:
                        _count(meter, output)
                    yield output
            finally:
                await outputs.aclose()

    async def _add_request(self, request: Any, prompt: str | None, parent_req: Any, index: int, queue: Any) -> None:
        replay = REPLAY.get()
        if replay is None or not await replay.add(request, prompt, queue):
            await super()._add_request(request, prompt, parent_req, index, queue)

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Makes vectors as AsyncLLM does; the inputs of one request come as calls of their own, all on its meter."""
        meter = METER.get()
        with self.adapters.use(kwargs):
            outputs = super().encode(*args, **kwargs)
            try:
                async for output in outputs:
                    if meter is not None and output.finished:
                        meter.prompt_tokens += len(output.prompt_token_ids)
                        meter.cached_prompt_tokens += output.num_cached_tokens
                    yield output
            finally:
                await outputs.aclose()


def _count(meter: Meter, output: RequestOutput) -> None:
    tokens = sum(len(choice.token_ids) for choice in output.outputs)
    if tokens and meter.first_token_at is None:
        now = time.monotonic()
        # An answer that is not streamed has one output, at its end; the engine measured when its first token came.
        latency = output.metrics.first_token_latency if output.finished and output.metrics is not None else 0.0
        meter.first_token_at = min(now, meter.arrived_at + latency) if latency else now
    meter.completion_tokens += tokens
    if output.prompt_token_ids is not None:
        meter.prompt_tokens = len(output.prompt_token_ids)
    if output.num_cached_tokens:
        meter.cached_prompt_tokens = output.num_cached_tokens
