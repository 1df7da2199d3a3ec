"""What Helios leans on in vLLM, as one function each; `test_compat.py` runs them in a process of their own.

Importing this module imports vLLM. `python -m tests.worker.engines.contracts` prints a JSON object: contract → what is
wrong with it, empty where it holds.
"""

import asyncio
import copy
import dataclasses
import importlib.metadata
import inspect
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import psutil
import pytest
import tokenizers
import torch
import torch._dynamo.aot_compile
import vllm
import vllm.compilation.backends
import vllm.compilation.decorators
import vllm.config
import vllm.envs
import vllm.model_executor.layers.utils
import vllm.plugins
import vllm.renderers.hf
import vllm.tokenizers.hf
import vllm.tokenizers.registry
import vllm.utils.cpu_resource_utils
import vllm.utils.system_utils
import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor
import vllm.v1.sample.logits_processor
import vllm.v1.structured_output
import vllm.v1.worker.utils
from pydantic import ValidationError
from vllm.config.scheduler import SchedulerPolicy
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import GracefulHTTPError, QueueOverflowError, VLLMNotFoundError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.registry import ModelRegistry
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor, UniProcExecutor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.cpu_worker import CPUWorker

from helios.worker.engines.vllm import compat, compat_compiled, compat_statistics, errors, quick_start
from helios.worker.engines.vllm.pieces import PieceCutter
from helios.worker.replica.engine import FinishReason, Meter, Sampling
from helios.worker.replica.queueing import ORDER

Contract = Callable[[], None]
CONTRACTS: list[Contract] = []


def contract(function: Contract) -> Contract:
    """Adds a function to the contracts."""
    assert not inspect.iscoroutinefunction(function), "called, it would do nothing"
    assert function.__name__ not in {known.__name__ for known in CONTRACTS}, "one outcome would hide the other"
    CONTRACTS.append(function)
    return function


def parameters(function: Any) -> set[str]:
    """Returns the names of a function's parameters."""
    return set(inspect.signature(function).parameters)


@contract
def the_installed_version_is_the_pinned_one() -> None:
    assert compat.check_version()


@contract
def importing_starts_no_thread() -> None:
    compat.prepare_before_fork()
    assert len(list(Path("/proc/self/task").iterdir())) == 1


@contract
def the_platform_is_found_without_metadata_of_a_distribution_named_vllm() -> None:
    assert current_platform.device_type in {"cpu", "cuda"}


@contract
def get_mp_context_is_looked_up_in_the_three_modules_at_call_time() -> None:
    for module in (vllm.utils.system_utils, vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        assert callable(module.get_mp_context)
    for user in (
        vllm.v1.engine.utils.CoreEngineProcManager.__init__,
        vllm.v1.executor.multiproc_executor.MultiprocExecutor._init_executor,
        vllm.v1.executor.multiproc_executor.WorkerProc.make_worker_process,
    ):
        assert "get_mp_context" in user.__code__.co_names


@contract
def fork_instead_of_spawn_reaches_every_user() -> None:
    compat.fork_instead_of_spawn()
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        assert module.get_mp_context().get_start_method() == "fork"


@contract
def the_cpu_platform_leaves_the_worker_in_the_engine_core_when_told_so() -> None:
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in source
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="uni", world_size=1))
    assert Executor.get_class(cast(Any, config)) is UniProcExecutor


@contract
def core_engine_proc_manager_forks_in_its_constructor() -> None:
    assert "start" in CoreEngineProcManager.__init__.__code__.co_names


@contract
def async_llm_makes_renderer_then_core_client_by_global_names() -> None:
    names = AsyncLLM.__init__.__code__.co_names
    assert names.index("renderer_from_config") < names.index("EngineCoreClient")
    assert "make_async_mp_client" in names


@contract
def make_async_mp_client_takes_what_make_llm_gives() -> None:
    assert {"vllm_config", "executor_class", "log_stats", "renderer"} <= parameters(
        EngineCoreClient.make_async_mp_client
    )


@contract
def async_llm_takes_what_make_llm_gives() -> None:
    assert {"vllm_config", "executor_class", "log_stats", "log_requests", "stat_loggers"} <= parameters(
        AsyncLLM.__init__
    )
    assert {"prompt", "sampling_params", "request_id"} <= parameters(AsyncLLM.generate)
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert isinstance(AsyncLLM.errored, property)
    assert "timeout" in parameters(AsyncLLM.shutdown)


@contract
def requests_of_a_lower_priority_are_begun_first_and_then_those_that_came_first() -> None:
    assert "priority" in get_args(SchedulerPolicy)
    assert "scheduling_policy" in {field.name for field in dataclasses.fields(compat.AsyncEngineArgs)}
    assert "priority" in parameters(AsyncLLM.add_request)
    assert "add_request" in AsyncLLM.generate.__code__.co_names
    queue = create_request_queue(SchedulingPolicy.PRIORITY)
    # Milliseconds of a clock that has run for a year, and below zero.
    came = [("late", 31_536_000_000, 1.0), ("first", -5, 3.0), ("second", 7, 1.0), ("third", 7, 2.0)]
    for request_id, priority, arrival_time in came:
        sampling = SamplingParams(max_tokens=1)
        queue.add_request(Request(request_id, [1], sampling, None, arrival_time=arrival_time, priority=priority))
    assert [queue.pop_request().request_id for _ in came] == ["first", "second", "third", "late"]


@contract
def what_a_client_says_of_its_priority_is_not_heard() -> None:
    heard: list[object] = []

    async def add_request(*_: object, **kwargs: object) -> None:
        heard.append(kwargs["priority"])

    stock: Any = AsyncLLM
    original, stock.add_request = stock.add_request, add_request
    # One that was never begun can't be shut down.
    stock.__del__ = lambda _: None
    try:
        llm = compat.MeteredLLM.__new__(compat.MeteredLLM)
        asyncio.run(llm.add_request("r", {}, None, priority=-99))
        ORDER.set(1234)
        asyncio.run(llm.add_request("r", {}, None, priority=-99))
    finally:
        ORDER.set(None)
        stock.add_request = original
    assert heard == [0, 1234]


@contract
def engine_arguments_have_the_fields_that_are_set() -> None:
    fields = {field.name for field in dataclasses.fields(compat.AsyncEngineArgs)}
    assert fields >= {
        "model",
        "served_model_name",
        "max_model_len",
        "kv_cache_memory_bytes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "distributed_executor_backend",
        "worker_cls",
        "additional_config",
        "disable_log_stats",
        "enable_log_requests",
        "use_tqdm_on_load",
    }


@contract
def the_cpu_worker_has_the_steps_that_are_timed() -> None:
    assert "vllm_config" in parameters(CPUWorker.__init__)
    assert callable(CPUWorker.init_device)
    assert callable(CPUWorker.load_model)
    assert callable(CPUWorker.determine_available_memory)
    assert "kv_cache_config" in parameters(CPUWorker.initialize_from_config)
    assert callable(CPUWorker.compile_or_warm_up_model)
    names = inspect.unwrap(EngineCore._initialize_kv_caches).__code__.co_names
    assert names.index("determine_available_memory") < names.index("initialize_from_config")


@contract
def triton_overrides_are_a_class_method_of_the_platform() -> None:
    assert callable(current_platform.register_triton_kernel_overrides)
    assert not parameters(current_platform.register_triton_kernel_overrides)


@contract
def preloaded_models_are_registered_by_class() -> None:
    compat.prepare_before_fork()
    assert {"LlamaForCausalLM", "BertModel"} <= compat._PRELOADED_MODELS.keys()
    for name in compat._PRELOADED_MODELS:
        assert type(ModelRegistry.models[name]).__name__ == "_RegisteredModel"


@contract
def the_renderer_derives_token_limits_lazily_under_these_names() -> None:
    for name in ("default_cmpl_tok_params", "default_chat_tok_params"):
        assert isinstance(inspect.getattr_static(BaseRenderer, name), cached_property)
    assert {"conversations", "chat_params", "tok_params"} <= parameters(BaseRenderer.render_chat_async)
    assert {"prompts", "tok_params"} <= parameters(BaseRenderer.render_cmpl_async)


@contract
def serving_classes_take_what_the_engine_gives() -> None:
    common = {"online_renderer", "request_logger", "enable_prompt_tokens_details"}
    assert common | {"chat_template", "chat_template_content_format"} <= parameters(compat.OpenAIServingChat.__init__)
    assert common <= parameters(compat.OpenAIServingCompletion.__init__)
    assert {"request_logger", "chat_template", "chat_template_content_format"} <= parameters(
        compat.OnlineRenderer.__init__
    )
    assert {"engine_client", "base_model_paths"} <= parameters(OpenAIServingModels.__init__)


@contract
def the_request_id_is_read_from_the_headers_of_the_http_request() -> None:
    http = cast(Any, SimpleNamespace(headers={"X-Request-Id": "mine"}, state=SimpleNamespace()))
    assert BaseServing._base_request_id(http, "default") == "mine"


@contract
def requests_are_pydantic_models_that_refuse_wrong_types() -> None:
    with pytest.raises(ValidationError) as caught:
        compat.ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "max_tokens": "a"})
    said = errors.from_exception(caught.value)
    assert said.reason == "INVALID_REQUEST"
    assert said.metadata == {"param": "max_tokens"}


@contract
def errors_say_what_went_wrong_by_class_and_message() -> None:
    def reason(error: Exception) -> str:
        return errors.from_exception(error).reason

    assert reason(VLLMValidationError("no", parameter="top_p")) == "INVALID_REQUEST"
    assert reason(VLLMNotFoundError("no")) == "MODEL_NOT_FOUND"
    assert reason(QueueOverflowError()) == "OVERLOADED"
    assert reason(GracefulHTTPError("no", HTTPStatus.SERVICE_UNAVAILABLE)) == "OVERLOADED"
    assert reason(EngineDeadError()) == "REPLICA_LOST"
    assert reason(RuntimeError("no")) == "INTERNAL"
    with pytest.raises(VLLMValidationError) as caught:
        TokenizeParams(max_total_tokens=4)._token_len_check(None, [1] * 5)
    assert reason(caught.value) == "CONTEXT_LENGTH_EXCEEDED"
    assert errors.from_exception(caught.value).metadata == {"param": "input_tokens"}


@contract
def error_events_of_a_stream_begin_with_data_error() -> None:
    serving: Any = GenerateBaseServing.__new__(GenerateBaseServing)
    event = f"data: {serving.create_streaming_error_response('it broke')}\n\n"
    assert event.startswith('data: {"error"')


@contract
def scheduler_statistics_have_the_counts_that_are_reported() -> None:
    calls: list[int] = []
    sink = compat_statistics.LoadSink(lambda: calls.append(1))
    sink.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=3, kv_cache_usage=0.5), None)
    sink.record(None, None)
    sink.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=3, kv_cache_usage=0.5), None)
    assert (sink.load.running_requests, sink.load.waiting_requests, sink.load.kv_usage_ratio) == (2, 3, 0.5)
    assert calls == [1]


@contract
def a_prometheus_logger_that_is_given_takes_the_place_of_vllms_own() -> None:
    manager = StatLoggerManager(
        cast("Any", None), custom_stat_loggers=[compat_statistics.Unpublished], enable_default_loggers=False
    )
    assert [type(logger) for logger in manager.stat_loggers] == [compat_statistics.Unpublished]
    calls = {name for name in vars(StatLoggerManager) if not name.startswith("_")}
    # What the manager passes on, the stand-in answers itself: its parent would look for series that it never made.
    assert calls <= set(vars(compat_statistics.Unpublished)), calls
    manager.record(None, None)
    manager.log()


@contract
def sampling_parameters_are_made_from_the_fields_of_the_contract() -> None:
    fields = {field.name for field in dataclasses.fields(Sampling)} - {"adapter"}
    assert fields <= parameters(compat.SamplingParams.from_optional)
    made = compat.SamplingParams.from_optional(max_tokens=None, output_kind=compat.RequestOutputKind.DELTA)
    assert made.max_tokens is None


@contract
def outputs_become_pieces() -> None:
    def output(text: str, token_ids: list[int], finish: str | None) -> RequestOutput:
        logprobs = [{7: Logprob(-2.0, 9, "g"), 1: Logprob(-0.1, 1, "a"), 2: Logprob(-0.2, 2, "b")} for _ in token_ids]
        choice = CompletionOutput(0, text, token_ids, None, logprobs, finish_reason=finish)
        return RequestOutput("id", None, [1], None, [choice], finished=finish is not None)

    cutter = PieceCutter()
    (first,) = cutter.cut(output("ab", [7, 7], None))
    (last,) = cutter.cut(output("", [7], "length"))
    assert (first.output_index, last.output_index) == (0, 2)
    assert (first.finish, last.finish) == (None, FinishReason.LENGTH)
    assert [entry.token_id for entry in first.logprobs[0].top] == [1, 2, 7]
    assert (first.logprobs[0].chosen.token_id, first.logprobs[0].chosen.logprob) == (7, -2.0)
    assert not cutter.cut(output("", [], None))


@contract
def a_metered_engine_closes_the_engine_s_generator_when_it_is_closed() -> None:
    closed: list[bool] = []

    async def endless(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self, args, kwargs
        try:
            while True:
                choice = CompletionOutput(0, "x", [1], None, None)
                yield RequestOutput("id", None, [1, 2, 3], None, [choice], finished=False, num_cached_tokens=2)
        finally:
            closed.append(True)

    async def run() -> None:
        meter = Meter("id", 0.0)
        compat.METER.set(meter)
        llm = compat.MeteredLLM.__new__(compat.MeteredLLM)
        stream = llm.generate()
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        assert (meter.prompt_tokens, meter.completion_tokens, meter.cached_prompt_tokens) == (3, 2, 2)
        assert meter.first_token_at is not None

    stock: Any = AsyncLLM
    original, stock.generate = stock.generate, endless
    stock.__del__ = lambda _: None
    try:
        asyncio.run(run())
    finally:
        stock.generate = original
    assert closed == [True]


@contract
def plugins_are_looked_for_by_group_through_importlib_metadata() -> None:
    compat.prepare_before_fork()
    distributions = importlib.metadata.distributions
    setattr(importlib.metadata, "distributions", None)  # noqa: B010  what looks through them now fails
    try:
        assert [importlib.metadata.entry_points(group=group) for group in quick_start.PLUGIN_GROUPS]
    finally:
        setattr(importlib.metadata, "distributions", distributions)  # noqa: B010
    found = importlib.metadata.entry_points(group=vllm.plugins.DEFAULT_PLUGINS_GROUP)
    assert found is importlib.metadata.entry_points(group=vllm.plugins.DEFAULT_PLUGINS_GROUP)
    assert importlib.metadata.entry_points(group="console_scripts", name="pytest")
    for user in (vllm.plugins.load_plugins_by_group, vllm.v1.sample.logits_processor._load_logitsprocs_plugins):
        assert "entry_points" in user.__code__.co_names
    assert vllm.plugins.plugins_loaded


@contract
def the_structured_output_manager_gets_its_tokenizer_when_it_is_asked_for() -> None:
    assert "cached_tokenizer_from_config" in StructuredOutputManager.__init__.__code__.co_names
    compat.prepare_before_fork()
    with tiny_tokenizer() as path:
        manager: Any = StructuredOutputManager.__new__(StructuredOutputManager)
        manager.vllm_config = SimpleNamespace(model_config=tokenizer_config(path))
        make: Any = vars(vllm.v1.structured_output)["cached_tokenizer_from_config"]
        manager.tokenizer = make(model_config=None)
        assert "tokenizer" not in vars(manager)
        assert manager.tokenizer.encode("b a") == [1, 0]
        assert manager.tokenizer is manager.tokenizer


@contract
def lscpu_runs_once() -> None:
    compat.prepare_before_fork()
    module = vllm.utils.cpu_resource_utils
    assert "_get_cpu_list" in module.get_allowed_cpu_list.__code__.co_names
    assert module.get_allowed_cpu_list()
    assert module._get_cpu_list() is not module._get_cpu_list()


@contract
def memory_is_moved_by_one_call_that_a_single_node_does_without() -> None:
    # Looked up by name when a worker is made.
    assert "torch.ops._C.init_cpu_memory_env([" in inspect.getsource(CPUWorker.__init__)
    compat.prepare_before_fork()
    nodes = vllm.utils.cpu_resource_utils.get_memory_affinity()
    assert nodes
    assert isinstance(torch.ops._C.init_cpu_memory_env, torch._ops.OpOverloadPacket) is (len(nodes) > 1)


@contract
def the_kv_cache_is_one_tensor_of_zeros() -> None:
    assert "zeros" in vllm.v1.worker.utils.allocate_kv_cache.__code__.co_names
    compat.prepare_before_fork()
    replaced: Any = vars(vllm.v1.worker.utils)["torch"]
    cache = replaced.zeros(64 << 20, dtype=torch.int8, device=torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    assert (cache.dtype, cache.numel(), cache.is_contiguous()) == (torch.int8, 64 << 20, True)
    assert not cache[-4096:].any()
    assert psutil.Process().memory_info().rss - before < 16 << 20
    assert replaced.zeros(4, dtype=torch.float32, device="cpu").dtype is torch.float32
    assert replaced.Tensor is torch.Tensor


@contract
def an_input_embedding_is_packed_with_its_first_product() -> None:
    assert "process_weights_after_loading" in vars(UnquantizedEmbeddingMethod)
    assert "cpu_linear" in vllm.model_executor.layers.utils.cpu_unquantized_gemm.__code__.co_names
    compat.prepare_before_fork()
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(64, 32, dtype=torch.bfloat16), requires_grad=False)
    unquantized: Any = UnquantizedEmbeddingMethod()
    unquantized.process_weights_after_loading(layer)
    rows = torch.randn(3, 32, dtype=torch.bfloat16)
    late = vllm.model_executor.layers.utils.cpu_unquantized_gemm(layer, rows, layer.weight)
    again = vllm.model_executor.layers.utils.cpu_unquantized_gemm(layer, rows, layer.weight)
    assert torch.equal(late, again)
    assert torch.allclose(late.float(), rows.float() @ layer.weight.float().t(), atol=0.2)


@contract
def compiled_code_goes_where_it_is_told_to() -> None:
    kept = os.environ.get("VLLM_CACHE_ROOT")  # noqa: TID251  what the test process has is put back
    try:
        compat.keep_compiled(Path("/kept/here"))
        assert vllm.envs.VLLM_CACHE_ROOT == "/kept/here"
        assert "envs.VLLM_CACHE_ROOT" in inspect.getsource(vllm.compilation.backends)
    finally:
        os.environ.pop("VLLM_CACHE_ROOT")  # noqa: TID251
        if kept is not None:
            os.environ["VLLM_CACHE_ROOT"] = kept  # noqa: TID251
    surroundings = compat.compile_surroundings()
    assert set(surroundings) == {"engine_version", "engine_path", "torch_version", "driver", "architecture"}


@contract
def compiled_code_has_one_name_wherever_the_model_and_the_cores_are() -> None:
    def name(path: str, cores: list[int], revision: str, **more: Any) -> str:
        compat.share_compiled({path: revision})
        model: Any = object.__new__(vllm.config.ModelConfig)
        for entry in dataclasses.fields(vllm.config.ModelConfig):
            setattr(model, entry.name, None)
        model.model = path
        config = vllm.config.VllmConfig()
        config.additional_config = {"helios": {"cores": cores, "phase_descriptor": len(cores) + 7}} | more
        named = (model.compute_hash(), config.compute_hash())
        assert model.model == path
        assert config.additional_config["helios"]["cores"] == cores
        return "/".join(named)

    first = name("/a/views/1", [0], "sha256:1")
    assert name("/b/other/1", [3], "sha256:1") == first
    assert name("/a/views/1", [0], "sha256:2") != first
    assert name("/a/views/1", [0, 1], "sha256:1") != first
    assert name("/a/views/1", [0], "sha256:1", other=1) != first


@contract
def compiled_code_of_a_cpu_is_loaded_and_not_taken_for_damage() -> None:
    assert "finalize_loading" in inspect.getsource(vllm.compilation.decorators._try_load_aot_compiled_fn)
    assert "torch.compiler.load_compiled_function" in inspect.getsource(vllm.compilation.decorators)
    fields = {entry.name for entry in dataclasses.fields(torch._dynamo.aot_compile.CompileArtifacts)}
    assert "compiled_fn" in fields
    assert "_artifacts" in {entry.name for entry in dataclasses.fields(torch._dynamo.aot_compile.AOTCompiledFunction)}
    compat.share_compiled({})
    assert torch.compiler.load_compiled_function.__name__ == "load_compiled_function"
    plain: Any = lambda: "computed"  # noqa: E731
    whole = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=plain))
    own = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=SimpleNamespace(finalize_loading=lambda _: "vLLM's")))
    for loaded, expected in ((whole, None), (own, "vLLM's")):
        assert compat_compiled._load_compiled(lambda found: found, loaded) is loaded
        assert loaded._artifacts.compiled_fn.finalize_loading({}) == expected
    assert plain() == "computed"


@contract
def notes_for_reloading_weights_are_taken_by_one_function() -> None:
    assert "record_metadata_for_reloading" in inspect.unwrap(initialize_model).__code__.co_names


@contract
def a_held_tokenizer_is_used_until_its_files_change() -> None:
    assert "cached_get_tokenizer" in vllm.tokenizers.registry.cached_tokenizer_from_config.__code__.co_names
    assert "maybe_make_thread_pool" in vllm.renderers.hf.HfRenderer.__init__.__code__.co_names
    assert "deepcopy" in vllm.tokenizers.hf.maybe_make_thread_pool.__code__.co_names
    compat.prepare_before_fork()
    with tiny_tokenizer() as path:
        config = tokenizer_config(path)
        ask: Any = vllm.tokenizers.registry.cached_tokenizer_from_config
        compat.HELD_TOKENIZERS.hold(config)
        held: Any = ask(config)
        assert held is ask(config)
        assert compat.HELD_TOKENIZERS.holds(path)
        assert held.get_vocab() == {"a": 0, "b": 1}
        copying: Any = vars(vllm.tokenizers.hf)["copy"]
        copies = [copying.deepcopy(copy.copy(held)) for _ in range(2)]
        assert [one.encode("a b") for one in (*copies, held)] == [[0, 1]] * 3
        assert copies[0]._tokenizer is not held._tokenizer
        Path(path, "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "a"}'
        )
        assert not compat.HELD_TOKENIZERS.holds(path)
        assert ask(config) is not held
    assert len(list(Path("/proc/self/task").iterdir())) == 1


@contextmanager
def tiny_tokenizer() -> Iterator[str]:
    """Makes a directory with a tokenizer of two words."""
    with tempfile.TemporaryDirectory() as path:
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.save(f"{path}/tokenizer.json")
        Path(path, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        yield path


def tokenizer_config(path: str) -> Any:
    """Returns what vLLM reads of a model's configuration to find its tokenizer."""
    return SimpleNamespace(
        skip_tokenizer_init=False,
        hf_config=None,
        tokenizer=path,
        runner_type="generate",
        tokenizer_mode="hf",
        tokenizer_revision=None,
        trust_remote_code=False,
    )


def main() -> None:
    """Runs all contracts and prints what came of each."""
    outcome = {}
    for function in CONTRACTS:
        try:
            function()
            outcome[function.__name__] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  told to the test
            outcome[function.__name__] = traceback.format_exc(limit=-3)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
