"""From a replica's spec to vLLM's arguments: the one place where Helios's settings become vLLM's words.

What a setting leaves open comes from the spec, whose sizes were made from the model's profile, then from vLLM. A
setting that vLLM's own parser or configuration classes refuse is reported with Helios's name of it, and all of them at
once: whoever corrects one does not want to wait for the next.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from helios.mesh.errors import InvalidRequest
from helios.worker.engines.vllm import checks, compat, compat_config
from helios.worker.engines.vllm.failures import INVALID_ENGINE_SETTINGS
from helios.worker.engines.vllm.ranks import rank_cores
from helios.worker.replica.compile_cache import CompileInputs
from helios.worker.replica.scratch import kv_directory
from helios.worker.replica.settings import Compilation, EngineSettings, KvOffload, Role, SpeculativeDecoding, Task
from helios.worker.replica.spec import ReplicaSpec

# One prefill step: enough to keep two cores busy, small enough that running answers are not held up for long.
_BATCHED_TOKENS: Final = 1024
# Arguments that no compiled code depends on: other names, another order or size of the cache are the same model.
_NOT_COMPILED: Final = frozenset(
    {"model", "served_model_name", "kv_cache_memory_bytes", "kv_transfer_config", "scheduling_policy"}
)
# The connector of kv_files, by the name that vLLM loads it by.
FILES: Final = "FileConnector"
_RUNNERS: Final[Mapping[Task, Mapping[str, Any]]] = {
    Task.DEFAULT: {},
    Task.GENERATE: {"runner": "generate"},
    Task.EMBED: {"runner": "pooling", "convert": "embed"},
}


def engine_arguments(spec: ReplicaSpec, phase_descriptor: int) -> Any:
    """Returns AsyncEngineArgs for a spec.

    Raises:
        InvalidRequest: INVALID_ENGINE_SETTINGS, with every setting that can't be and what to do about it.
    """
    problems = checks.find_problems(spec.settings) + _missing_revisions(spec)
    if problems:
        raise InvalidRequest(
            f"{spec.model} can't be run with its engine settings: " + "; ".join(map(str, problems)),
            reason=INVALID_ENGINE_SETTINGS,
            metadata={"param": problems[0].field, "fields": ",".join(problem.field for problem in problems)},
        )
    return compat_config.AsyncEngineArgs(**arguments_of(spec), **_surroundings(spec, phase_descriptor))


def arguments_of(spec: ReplicaSpec) -> dict[str, Any]:
    """Returns the keyword arguments of AsyncEngineArgs that say which model is run and how. Pure."""
    transfer = role_transfer(spec.settings.role, spec.kv_directory, is_cpu=compat.runs_eagerly())
    if transfer.get("kv_connector") == FILES and spec.settings.role is Role.PREFILL:
        # A prompt in pieces would be written when the first of them is there.
        spec = replace(spec, settings=replace(spec.settings, chunked_prefill=False))
    settings = spec.settings
    arguments: dict[str, Any] = {
        "model": spec.model_path,
        "served_model_name": list(spec.names),
        # -1 fits the context to what the KV cache can hold.
        "max_model_len": spec.max_context_tokens or -1,
        # vLLM's bound is that of one rank.
        "kv_cache_memory_bytes": spec.kv_cache_bytes // settings.rank_count,
        "enforce_eager": _is_eager(settings),
        # The order of arrival, but for what hints are worth: replica.queueing.
        "scheduling_policy": "priority",
        **_batch_sizes(spec),
        **_RUNNERS[settings.task],
    }
    plain = {
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "enable_prefix_caching": settings.prefix_caching,
        "enable_chunked_prefill": settings.chunked_prefill,
        "reasoning_parser": settings.reasoning_parser,
        "attention_backend": settings.attention_backend,
        "cudagraph_capture_sizes": list(settings.cuda_graph_sizes),
    }
    arguments |= {name: value for name, value in plain.items() if value not in (None, "", [])}
    if settings.structured_output_backend:
        arguments["structured_outputs_config"] = compat_config.StructuredOutputsConfig(
            backend=settings.structured_output_backend
        )
    if settings.speculative_decoding is not None:
        arguments["speculative_config"] = speculative_config(settings.speculative_decoding, spec.revision_paths)
    if settings.kv_offload is not None:
        arguments |= _kv_offload(settings.kv_offload)
    if transfer:
        arguments["kv_transfer_config"] = compat_config.KVTransferConfig(**transfer)
    if settings.lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": settings.lora.max_rank,
            "max_loras": settings.lora.max_active_count,
        }
    return arguments


def compile_inputs(spec: ReplicaSpec) -> CompileInputs:
    """Returns what the code that is compiled for a replica depends on; names and places are not among it."""
    flags = {name: value for name, value in arguments_of(spec).items() if name not in _NOT_COMPILED}
    # Configuration objects have no JSON of their own; what they show of themselves is all that they are made of.
    plain = json.loads(json.dumps(flags, default=repr))
    speculative = spec.settings.speculative_decoding
    if speculative is not None and speculative.draft_model:
        plain["speculative_config"]["model"] = speculative.draft_revision
    cores = rank_cores(spec.placement.engine_cores, 0, spec.settings.rank_count)
    surroundings = compat.compile_surroundings()
    return CompileInputs(revision=spec.revision, flags=plain, thread_count=max(1, len(cores)), **surroundings)


def _batch_sizes(spec: ReplicaSpec) -> dict[str, int]:
    """Returns how much is computed at once; what the one leaves open is fitted to the other."""
    settings = spec.settings
    tokens, requests = settings.max_batched_tokens, settings.max_running_requests
    sizes = {"max_num_seqs": requests or min(spec.max_running_requests, tokens or spec.max_running_requests)}
    # A prompt that may not be cut has to fit: vLLM then takes the context's length.
    if tokens or settings.chunked_prefill is not False:
        sizes["max_num_batched_tokens"] = tokens or max(_BATCHED_TOKENS, requests or 0)
    return sizes


def speculative_config(speculative: SpeculativeDecoding, revision_paths: Mapping[str, str]) -> dict[str, Any]:
    """Returns vLLM's ``speculative_config``."""
    config: dict[str, Any] = {"method": speculative.method, "num_speculative_tokens": speculative.token_count}
    if speculative.prompt_lookup_max:
        config["prompt_lookup_max"] = speculative.prompt_lookup_max
    if speculative.draft_model:
        config["model"] = revision_paths.get(speculative.draft_revision, speculative.draft_model)
    return config


def offload_transfer(offload: KvOffload, directory: str) -> dict[str, Any]:
    """Returns the fields of vLLM's KVTransferConfig that keep KV blocks in host memory, and below it on disk.

    Args:
        offload: How much.
        directory: Where blocks on disk go. vLLM's tier on disk has no bound of its own, and removes nothing: the
            replica does that (``replica.kv_disk``), and the directory ends with it.
    """
    extra: dict[str, Any] = {"cpu_bytes_to_use": offload.host_bytes}
    if offload.disk_bytes:
        extra |= {
            "spec_name": "TieringOffloadingSpec",
            "secondary_tiers": [{"type": "fs", "root_dir": directory, "n_read_threads": 2, "n_write_threads": 2}],
        }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def role_transfer(role: Role, directory: str, *, is_cpu: bool) -> dict[str, Any]:
    """Returns the fields of vLLM's KVTransferConfig that a role asks for; empty for a replica that does both.

    Args:
        role: What the replica does.
        directory: Where KV caches lie that travel through files.
        is_cpu: Through files on a CPU, by NIXL between devices.
    """
    if role is Role.BOTH:
        return {}
    kind = "kv_producer" if role is Role.PREFILL else "kv_consumer"
    # Blocks that did not arrive are computed; a request does not fail of it.
    common = {"kv_role": kind, "kv_load_failure_policy": "recompute"}
    if not is_cpu:
        return common | {"kv_connector": "NixlConnector"}
    return common | {
        "kv_connector": FILES,
        "kv_connector_module_path": "helios.worker.engines.vllm.kv_files",
        "kv_connector_extra_config": {"shared_storage_path": directory},
    }


def _kv_offload(offload: KvOffload) -> dict[str, Any]:
    if not offload.host_bytes and not offload.disk_bytes:
        return {}
    transfer = offload_transfer(offload, str(kv_directory()))
    return {"kv_transfer_config": compat_config.KVTransferConfig(**transfer)}


def _is_eager(settings: EngineSettings) -> bool:
    if settings.compilation is Compilation.DEFAULT:
        return compat.runs_eagerly()
    return settings.compilation is Compilation.EAGER


def _missing_revisions(spec: ReplicaSpec) -> list[checks.Problem]:
    speculative = spec.settings.speculative_decoding
    if speculative is None or not speculative.draft_model or speculative.draft_revision in spec.revision_paths:
        return []
    return [checks.Problem("speculative_decoding.draft_model", f"{speculative.draft_model!r} is not on the node")]


def _surroundings(spec: ReplicaSpec, phase_descriptor: int) -> dict[str, Any]:
    """What does not depend on the model: where its processes run and what they say."""
    return {
        "distributed_executor_backend": "uni" if spec.settings.rank_count == 1 else "mp",
        "worker_cls": "helios.worker.engines.vllm.compat.PlacedWorker",
        "additional_config": compat.worker_settings(spec.placement.engine_cores, phase_descriptor),
        "enable_sleep_mode": compat.can_sleep(),
        "disable_log_stats": True,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
    }
