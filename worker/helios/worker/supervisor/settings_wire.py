"""From the contract's EngineSettings to the worker's."""

from helios.api.engine.v1 import engine_settings_pb2 as pb
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

_COMPILATIONS = {
    pb.COMPILATION_MODE_EAGER: Compilation.EAGER,
    pb.COMPILATION_MODE_COMPILED: Compilation.COMPILED,
    # A proxy that knows it orders one form or the other; from one that does not, the form that answers soon.
    pb.COMPILATION_MODE_EAGER_THEN_COMPILED: Compilation.EAGER,
}
_MODES = {Compilation.EAGER: pb.COMPILATION_MODE_EAGER, Compilation.COMPILED: pb.COMPILATION_MODE_COMPILED}
_TASKS = {pb.TASK_GENERATE: Task.GENERATE, pb.TASK_EMBED: Task.EMBED}
_ROLES = {pb.DISAGGREGATION_ROLE_PREFILL: Role.PREFILL, pb.DISAGGREGATION_ROLE_DECODE: Role.DECODE}


def settings_from_proto(message: pb.EngineSettings) -> EngineSettings:
    """Returns the settings; an enum's value of a newer version counts as not set."""

    def given(name: str) -> int | None:
        return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

    def flag(name: str) -> bool | None:
        return bool(getattr(message, name)) if message.HasField(name) else None  # type: ignore[arg-type]

    return EngineSettings(
        dtype=message.dtype,
        quantization=message.quantization,
        tensor_parallel_size=given("tensor_parallel_size"),
        pipeline_parallel_size=given("pipeline_parallel_size"),
        kv_cache_dtype=message.kv_cache_dtype,
        prefix_caching=flag("prefix_caching"),
        chunked_prefill=flag("chunked_prefill"),
        max_running_requests=given("max_running_requests"),
        max_batched_tokens=given("max_batched_tokens"),
        speculative_decoding=_speculation(message) if message.HasField("speculative_decoding") else None,
        lora=_lora(message.lora) if message.HasField("lora") else None,
        kv_offload=_offload(message) if message.HasField("kv_offload") else None,
        tool_call_parser=message.tool_call_parser,
        reasoning_parser=message.reasoning_parser,
        structured_output_backend=message.structured_output_backend,
        attention_backend=message.attention_backend,
        compilation=compilation_from_proto(message.compilation),
        cuda_graph_sizes=tuple(message.cuda_graph_sizes),
        task=_TASKS.get(message.task, Task.DEFAULT),
        role=_ROLES.get(message.role, Role.BOTH),
        chat_template=message.chat_template,
    )


def compilation_from_proto(mode: pb.CompilationMode.ValueType) -> Compilation:
    """Returns in which form a replica runs its model."""
    return _COMPILATIONS.get(mode, Compilation.DEFAULT)


def compilation_to_proto(form: Compilation) -> pb.CompilationMode.ValueType:
    """Returns the contract's number of a form."""
    return _MODES.get(form, pb.COMPILATION_MODE_UNSPECIFIED)


def _speculation(message: pb.EngineSettings) -> SpeculativeDecoding:
    said = message.speculative_decoding
    return SpeculativeDecoding(
        method=said.method,
        draft_model=said.draft_model,
        draft_revision=said.draft_revision,
        token_count=said.token_count,
        prompt_lookup_max=said.prompt_lookup_max,
    )


def _lora(said: pb.LoraSettings) -> LoraSettings:
    defaults = LoraSettings()
    return LoraSettings(
        adapters=tuple(LoraAdapter(adapter.name, adapter.model, adapter.revision) for adapter in said.adapters),
        max_rank=said.max_rank or defaults.max_rank,
        max_active_count=said.max_active_count or defaults.max_active_count,
    )


def _offload(message: pb.EngineSettings) -> KvOffload:
    return KvOffload(message.kv_offload.host_bytes, message.kv_offload.disk_bytes)
