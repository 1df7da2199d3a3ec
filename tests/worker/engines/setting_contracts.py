"""How a model's settings become vLLM's, checked with vLLM's own parser and configuration classes; with `contracts`, in
one process: importing vLLM takes ten seconds.

What needs a GPU to run is built here all the same: vLLM's classes take it, whatever the machine.
"""

import inspect
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from vllm.config import AttentionConfig, CompilationConfig, KVTransferConfig, LoRAConfig, VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.fs.manager import FsAsyncLookupManager

from helios.mesh.errors import InvalidRequest
from helios.worker.engines.vllm import checks, compat_config, failures, kv_files
from helios.worker.engines.vllm.arguments import arguments_of, engine_arguments, offload_transfer, role_transfer
from helios.worker.replica.settings import (
    Compilation,
    EngineSettings,
    KvOffload,
    LoraAdapter,
    LoraSettings,
    Role,
    SpeculativeDecoding,
    Task,
)
from helios.worker.replica.spec import ReplicaSpec
from tests.worker.engines import kind_contracts  # noqa: F401  its contracts are collected with these
from tests.worker.engines.contracts import contract

MODEL = os.environ.get("HELIOS_TEST_MODEL", "")  # noqa: TID251
DRAFT = "sha256:" + "d" * 64
NGRAM = SpeculativeDecoding("ngram", token_count=3, prompt_lookup_max=4)


def spec(model_path: str = MODEL, kv_cache_bytes: int = 96 << 20, **settings: Any) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id="r",
        model="m",
        revision="sha256:" + "5" * 64,
        model_path=model_path,
        kv_cache_bytes=kv_cache_bytes,
        created_at=datetime.now(UTC),
        settings=EngineSettings(**settings),
        revision_paths={DRAFT: model_path},
    )


def configured(**settings: Any) -> VllmConfig:
    """Returns what vLLM makes of settings, for the embedded model."""
    config: VllmConfig = engine_arguments(spec(**settings), -1).create_engine_config()
    return config


def refusal(**settings: Any) -> tuple[str, str]:
    """Returns reason and message where vLLM finds the settings wrong for the embedded model."""
    with pytest.raises(failures.START_ERRORS) as caught:
        configured(**settings)
    return failures.classify(caught.value)


def with_config(directory: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Returns a copy of the model's directory (links) with a changed config.json."""
    for file in Path(MODEL).iterdir():
        if file.name != "config.json":
            Path(directory, file.name).symlink_to(file)
    document = json.loads(Path(MODEL, "config.json").read_text())
    change(document)
    Path(directory, "config.json").write_text(json.dumps(document))
    return directory


@contract
def every_name_that_vllm_gives_is_taken() -> None:
    names = {
        "quantization": compat_config.quantization_methods(),
        "tool_call_parser": compat_config.tool_parsers(),
        "reasoning_parser": compat_config.reasoning_parsers(),
        "attention_backend": compat_config.attention_backends(),
        "structured_output_backend": compat_config.structured_output_backends(),
        "kv_cache_dtype": ["auto", "fp8", "fp8_e5m2", "bfloat16"],
        "dtype": ["auto", "float16", "bfloat16", "float32"],
    }
    for field, known in names.items():
        assert known
        for name in known:
            settings: dict[str, Any] = {field: name}
            assert checks.find_problems(EngineSettings(**settings)) == []
    assert {"awq", "gptq", "compressed-tensors", "fp8"} <= set(names["quantization"])
    assert {"hermes", "llama3_json", "mistral"} <= set(names["tool_call_parser"])
    assert {"FLASH_ATTN", "FLASHINFER", "CPU_ATTN"} <= set(names["attention_backend"])
    assert {"ngram", "draft_model", "eagle", "eagle3", "mtp"} <= set(compat_config.speculative_methods())


@contract
def settings_that_are_not_there_are_not_checked_and_change_nothing() -> None:
    checks._parser.cache_clear()
    assert checks.find_problems(EngineSettings()) == []
    assert checks._parser.cache_info().misses == 0
    arguments = arguments_of(spec())
    assert arguments["max_model_len"] == -1
    assert arguments["kv_cache_memory_bytes"] == 96 << 20
    assert arguments["enforce_eager"] is True
    given = {"dtype", "quantization", "runner", "speculative_config", "kv_transfer_config", "enable_lora"}
    assert not given & arguments.keys()


@contract
def every_mistake_is_found_at_once_by_its_name() -> None:
    wrong = EngineSettings(
        dtype="float8",
        quantization="zip",
        tensor_parallel_size=0,
        kv_cache_dtype="fp3",
        max_running_requests=64,
        max_batched_tokens=8,
        tool_call_parser="hermess",
        reasoning_parser="deep",
        attention_backend="FLASH",
        structured_output_backend="x",
        cuda_graph_sizes=(4, 2),
        chat_template="{% for",
        speculative_decoding=SpeculativeDecoding("ngrams"),
        lora=LoraSettings(max_rank=17, max_active_count=0),
        kv_offload=KvOffload(disk_bytes=5),
    )
    fields = [problem.field for problem in checks.find_problems(wrong)]
    assert sorted(fields) == [
        "attention_backend",
        "chat_template",
        "cuda_graph_sizes",
        "dtype",
        "kv_cache_dtype",
        "kv_offload",
        "kv_offload.host_bytes",
        "lora.max_active_count",
        "lora.max_rank",
        "max_batched_tokens",
        "quantization",
        "reasoning_parser",
        "speculative_decoding.method",
        "speculative_decoding.token_count",
        "structured_output_backend",
        "tensor_parallel_size",
        "tool_call_parser",
    ]
    with pytest.raises(InvalidRequest) as caught:
        engine_arguments(spec(dtype="float8", tool_call_parser="hermess"), -1)
    assert caught.value.reason == "INVALID_ENGINE_SETTINGS"
    assert caught.value.metadata["fields"] == "dtype,tool_call_parser"
    assert "dtype: invalid choice: 'float8' (choose from 'auto', " in caught.value.message
    assert "hermes," in caught.value.message


@contract
def speculation_says_what_it_lacks() -> None:
    def fields(speculative: SpeculativeDecoding) -> list[str]:
        return [problem.field for problem in checks.find_problems(EngineSettings(speculative_decoding=speculative))]

    assert fields(NGRAM) == []
    assert fields(SpeculativeDecoding("ngram", token_count=2)) == ["speculative_decoding.prompt_lookup_max"]
    assert fields(SpeculativeDecoding("eagle", token_count=2)) == ["speculative_decoding.draft_model"]
    assert fields(SpeculativeDecoding("mtp", "d", DRAFT, 2)) == ["speculative_decoding.draft_model"]
    with pytest.raises(InvalidRequest, match=r"speculative_decoding.draft_model: 'd' is not on the node"):
        engine_arguments(spec(speculative_decoding=SpeculativeDecoding("draft_model", "d", "sha256:x", 2)), -1)
    with pytest.raises(InvalidRequest, match="ngram_gpu runs on GPUs only; on a CPU: ngram"):
        configured(speculative_decoding=SpeculativeDecoding("ngram_gpu", token_count=2))


@contract
def a_draft_model_that_can_t_guess_for_the_model_is_refused_before_anything_is_started() -> None:
    drafting = EngineSettings(speculative_decoding=SpeculativeDecoding("draft_model", "d", DRAFT, 2))

    def config(path: str) -> Any:
        subject = replace(spec(), settings=drafting, revision_paths={DRAFT: path})
        return engine_arguments(subject, -1).create_engine_config().speculative_config

    made = config(MODEL)
    assert (made.method, made.num_speculative_tokens, made.draft_model_config.model) == ("draft_model", 2, MODEL)
    with tempfile.TemporaryDirectory() as directory:
        other = with_config(directory, lambda document: document.update(vocab_size=1000))
        with pytest.raises(failures.START_ERRORS) as caught:
            config(other)
    reason, message = failures.classify(caught.value)
    assert reason == "INVALID_ENGINE_SETTINGS", message
    assert "vocab" in message


@contract
def plain_settings_reach_vllms_configuration() -> None:
    config = configured(
        dtype="float32",
        kv_cache_dtype="fp8",
        prefix_caching=False,
        max_running_requests=3,
        max_batched_tokens=64,
        compilation=Compilation.COMPILED,
        structured_output_backend="guidance",
        attention_backend="FLASH_ATTN",
    )
    assert str(config.model_config.dtype) == "torch.float32"
    assert config.cache_config.cache_dtype == "fp8"
    assert config.cache_config.enable_prefix_caching is False
    assert (config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens) == (3, 64)
    assert not config.model_config.enforce_eager
    assert config.structured_outputs_config.backend == "guidance"
    assert config.attention_config.backend is AttentionBackendEnum.FLASH_ATTN
    assert configured().cache_config.enable_prefix_caching is True


@contract
def batches_are_fitted_to_what_is_set() -> None:
    def sizes(**settings: Any) -> tuple[int, int]:
        scheduler = configured(**settings).scheduler_config
        return scheduler.max_num_seqs, scheduler.max_num_batched_tokens

    assert sizes() == (64, 1024)
    assert sizes(max_batched_tokens=16) == (16, 16)
    assert sizes(max_running_requests=2000) == (2000, 2000)
    whole = configured(chunked_prefill=False)
    assert whole.scheduler_config.max_num_batched_tokens >= whole.model_config.max_model_len


@contract
def parallel_replicas_share_their_kv_cache() -> None:
    arguments = arguments_of(spec(tensor_parallel_size=2, pipeline_parallel_size=3))
    assert arguments["kv_cache_memory_bytes"] == 16 << 20
    parallel = configured(pipeline_parallel_size=2).parallel_config
    assert (parallel.world_size, parallel.distributed_executor_backend) == (2, "mp")
    assert configured(tensor_parallel_size=3).parallel_config.tensor_parallel_size == 3
    reason, message = refusal(tensor_parallel_size=2)
    assert reason == "INVALID_ENGINE_SETTINGS"
    assert "attention heads (9) must be divisible by tensor_parallel_size (2)" in message


@contract
def ngrams_and_a_draft_model_are_taken() -> None:
    speculative = configured(speculative_decoding=NGRAM).speculative_config
    assert speculative is not None
    assert (speculative.method, speculative.num_speculative_tokens, speculative.prompt_lookup_max) == ("ngram", 3, 4)
    draft = configured(speculative_decoding=SpeculativeDecoding("draft_model", "d", DRAFT, 2)).speculative_config
    assert draft is not None
    assert (draft.method, draft.model, draft.num_speculative_tokens) == ("draft_model", MODEL, 2)


@contract
def an_eagle_head_is_taken() -> None:
    with tempfile.TemporaryDirectory() as directory:
        head = with_config(directory, lambda config: config.update(architectures=["LlamaForCausalLM"], eagle=True))
        given = spec(speculative_decoding=SpeculativeDecoding("eagle", "d", DRAFT, 2))
        given = given.__class__.from_document(given.to_document() | {"revision_paths": {DRAFT: head}})
        speculative = engine_arguments(given, -1).create_engine_config().speculative_config
        assert speculative is not None
        assert (speculative.method, speculative.use_eagle()) == ("eagle", True)


@contract
def adapters_are_taken() -> None:
    adapters = (LoraAdapter("x", "a", "sha256:a"),)
    lora = configured(lora=LoraSettings(adapters, max_rank=32, max_active_count=4)).lora_config
    assert isinstance(lora, LoRAConfig)
    assert (lora.max_lora_rank, lora.max_loras) == (32, 4)
    assert 16 in get_args(MaxLoRARanks), "Helios's default rank"


@contract
def kv_blocks_fall_to_host_memory_and_then_to_disk() -> None:
    host = KVTransferConfig(**offload_transfer(KvOffload(host_bytes=1 << 30), "/kv"))
    assert (host.kv_connector, host.kv_role) == ("OffloadingConnector", "kv_both")
    assert host.kv_connector_extra_config == {"cpu_bytes_to_use": 1 << 30}
    assert OffloadingSpecFactory.get_spec_cls(host.kv_connector_extra_config).__name__ == "CPUOffloadingSpec"
    disk = KVTransferConfig(**offload_transfer(KvOffload(1 << 30, 1 << 32), "/kv")).kv_connector_extra_config
    assert OffloadingSpecFactory.get_spec_cls(disk).__name__ == "TieringOffloadingSpec"
    (tier,) = disk["secondary_tiers"]
    manager = SecondaryTierFactory.get_tier_class(tier)
    options = {name: value for name, value in tier.items() if name != "type"}
    inspect.signature(manager.__init__).bind(
        None, offloading_spec=None, primary_kv_view=None, tier_type="fs", backpressure_detector=None, **options
    )
    # What keeps the disk within its bound looks for these, and the tier looks for a file before it reads it.
    assert "/{hash_hex}.bin" in inspect.getsource(FileMapper.get_file_name)
    assert "os.path.exists(p)" in inspect.getsource(FsAsyncLookupManager)
    assert "mark_miss(failed)" in inspect.getsource(manager.get_finished_jobs)
    arguments = arguments_of(spec(kv_offload=KvOffload(host_bytes=1 << 30)))
    assert arguments["kv_transfer_config"].kv_connector == "OffloadingConnector"
    with pytest.raises(InvalidRequest, match="on a CPU the KV cache is in host memory already"):
        configured(kv_offload=KvOffload(host_bytes=1 << 30))
    assert configured(kv_offload=KvOffload()).kv_transfer_config is None


@contract
def cuda_graphs_and_attention_backends_are_taken() -> None:
    arguments = arguments_of(spec(cuda_graph_sizes=(1, 2, 8), attention_backend="FLASHINFER"))
    compilation = CompilationConfig(cudagraph_capture_sizes=arguments["cudagraph_capture_sizes"])
    assert compilation.cudagraph_capture_sizes == [1, 2, 8]
    assert AttentionConfig(backend=arguments["attention_backend"]).backend is AttentionBackendEnum.FLASHINFER
    # A CPU captures none, and says nothing against it: the same settings serve both.
    assert configured(cuda_graph_sizes=(1, 2, 8)).compilation_config.cudagraph_capture_sizes == []


@contract
def an_embedding_model_is_run_for_pooling() -> None:
    assert configured(task=Task.EMBED).model_config.runner_type == "pooling"
    assert configured(task=Task.GENERATE).model_config.runner_type == "generate"


@contract
def what_does_not_fit_the_model_is_told_in_helios_words() -> None:
    for settings, words in (
        ({"quantization": "awq"}, "Cannot find the config file for awq"),
        ({"chunked_prefill": False, "max_batched_tokens": 64}, "max_batched_tokens (64) is smaller than max_context"),
        ({"reasoning_parser": "deepseek_r1"}, "could not locate think start/end tokens"),
        ({"speculative_decoding": SpeculativeDecoding("mtp", token_count=1)}, "mtp"),
    ):
        reason, message = refusal(**settings)
        assert reason == "INVALID_ENGINE_SETTINGS", message
        assert words in message, message
        assert "max_num" not in message
        assert "https://" not in message


@contract
def an_architecture_that_vllm_does_not_know_is_told_as_such() -> None:
    def unknown(config: dict[str, Any]) -> None:
        config["architectures"] = ["HoloForCausalLM"]

    def nameless(config: dict[str, Any]) -> None:
        config["model_type"] = "holo"

    for change in (unknown, nameless):
        with tempfile.TemporaryDirectory() as directory:
            given = spec(with_config(directory, change))
            with pytest.raises(failures.START_ERRORS) as caught:
                engine_arguments(given, -1).create_engine_config()
        reason, message = failures.classify(caught.value)
        assert reason == "UNSUPPORTED_ARCHITECTURE", message
        assert "olo" in message


@contract
def a_literals_validation_error_is_a_value_error() -> None:
    assert issubclass(ValidationError, ValueError), "failures.START_ERRORS leans on it"


@contract
def roles_are_a_connector_through_files_on_a_cpu_and_nixl_between_devices() -> None:
    for role, kind in ((Role.PREFILL, "kv_producer"), (Role.DECODE, "kv_consumer")):
        for is_cpu in (True, False):
            config = KVTransferConfig(**role_transfer(role, "/kv", is_cpu=is_cpu))
            assert (config.kv_role, config.kv_load_failure_policy) == (kind, "recompute")
            assert config.is_kv_producer == (role is Role.PREFILL)
            connector = KVConnectorFactory.get_connector_class(config)
            assert connector.__name__.startswith("FileConnector" if is_cpu else "Nixl")
    assert role_transfer(Role.BOTH, "/kv", is_cpu=True) == {}
    made = configured(role=Role.PREFILL)
    assert not made.scheduler_config.enable_chunked_prefill, "a prompt in pieces would be written too early"
    problems = checks.find_problems(EngineSettings(role=Role.DECODE, tensor_parallel_size=2, kv_offload=KvOffload(1)))
    assert {problem.field for problem in problems} == {"role", "kv_offload"}


@contract
def the_connector_through_files_leans_on_the_examples_names() -> None:
    for name in ("start_load_kv", "save_kv_layer", "update_state_after_alloc", "_generate_filename_debug"):
        assert callable(getattr(ExampleConnector, name))
    example = inspect.getsource(ExampleConnector)
    for leaned_on in ("self._requests_need_load", "self._storage_path", "self._block_size", "request.mm_hashes"):
        assert leaned_on in example
    named = [*inspect.signature(ExampleConnector._generate_foldername_debug).parameters]
    assert named == [*inspect.signature(kv_files.FileConnector._generate_foldername_debug).parameters]
    assert kv_files._transfer_of({"transfer": "../x"}) == kv_files._transfer_of(None) == ""
    assert kv_files._transfer_of({"transfer": "0" * 32}) == "0" * 32
