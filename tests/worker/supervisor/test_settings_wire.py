"""Engine settings on their way from a StartReplica to a replica's spec, and through the launcher's control socket."""

import dataclasses
import json
from datetime import UTC, datetime

from helios.api.engine.v1 import engine_settings_pb2 as pb
from helios.api.fleet.v1 import fleet_service_pb2 as fleet
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
from helios.worker.supervisor.commands import Start
from helios.worker.supervisor.settings_wire import (
    compilation_from_proto,
    compilation_to_proto,
    settings_from_proto,
)
from helios.worker.supervisor.wire import command_from_proto

MESSAGE = pb.EngineSettings(
    engine="vllm",
    dtype="float16",
    quantization="awq",
    tensor_parallel_size=2,
    pipeline_parallel_size=3,
    kv_cache_dtype="fp8",
    prefix_caching=False,
    chunked_prefill=True,
    max_running_requests=8,
    max_batched_tokens=512,
    speculative_decoding=pb.SpeculativeDecoding(
        method="eagle", draft_model="d", token_count=3, prompt_lookup_max=4, draft_revision="sha256:d"
    ),
    lora=pb.LoraSettings(max_rank=32, adapters=[pb.LoraAdapter(name="x", model="a", revision="sha256:a")]),
    kv_offload=pb.KvOffload(host_bytes=1, disk_bytes=2),
    tool_call_parser="hermes",
    reasoning_parser="deepseek_r1",
    structured_output_backend="guidance",
    attention_backend="FLASH_ATTN",
    compilation=pb.COMPILATION_MODE_COMPILED,
    cuda_graph_sizes=[1, 2],
    task=pb.TASK_EMBED,
    role=pb.DISAGGREGATION_ROLE_DECODE,
    chat_template="{{ messages }}",
    options={"seed": "7"},
)
SETTINGS = EngineSettings(
    dtype="float16",
    quantization="awq",
    tensor_parallel_size=2,
    pipeline_parallel_size=3,
    kv_cache_dtype="fp8",
    prefix_caching=False,
    chunked_prefill=True,
    max_running_requests=8,
    max_batched_tokens=512,
    speculative_decoding=SpeculativeDecoding("eagle", "d", "sha256:d", 3, 4),
    lora=LoraSettings((LoraAdapter("x", "a", "sha256:a"),), max_rank=32),
    kv_offload=KvOffload(1, 2),
    tool_call_parser="hermes",
    reasoning_parser="deepseek_r1",
    structured_output_backend="guidance",
    attention_backend="FLASH_ATTN",
    compilation=Compilation.COMPILED,
    cuda_graph_sizes=(1, 2),
    task=Task.EMBED,
    role=Role.DECODE,
    chat_template="{{ messages }}",
)


def test_every_field_of_the_contract_arrives() -> None:
    assert settings_from_proto(MESSAGE) == SETTINGS
    default = EngineSettings()
    unused = [field.name for field in dataclasses.fields(default) if _is_default(field.name)]
    assert unused == [], "set in the message of this test, too"
    # Those four are fields of the spec: others have a word in them.
    elsewhere = {"engine", "options", "kv_cache_bytes", "max_context_tokens"}
    names = {field.name for field in pb.EngineSettings.DESCRIPTOR.fields} - elsewhere
    assert names == {field.name for field in dataclasses.fields(default)}


def _is_default(name: str) -> bool:
    return bool(getattr(SETTINGS, name) == getattr(EngineSettings(), name))


def test_nothing_said_is_nothing_set() -> None:
    assert settings_from_proto(pb.EngineSettings()) == EngineSettings()
    assert settings_from_proto(pb.EngineSettings(prefix_caching=False)).prefix_caching is False
    assert settings_from_proto(pb.EngineSettings(compilation=99)).compilation is Compilation.DEFAULT  # type: ignore[arg-type]


def test_a_start_brings_settings_and_names_along() -> None:
    message = fleet.StartReplica(replica_id="r", model="m", engine_settings=MESSAGE, served_names=["one", "two"])
    start = command_from_proto(fleet.Command(command_id="c", start=message))
    assert isinstance(start, Start)
    assert (start.settings, start.served_names) == (SETTINGS, ("one", "two"))
    assert (start.engine, start.options) == ("vllm", {"seed": "7"})


def test_a_spec_outlives_the_control_socket() -> None:
    spec = ReplicaSpec(
        replica_id="r",
        model="m",
        revision="sha256:1",
        model_path="/m",
        created_at=datetime.now(UTC),
        settings=SETTINGS,
        revision_paths={"sha256:d": "/d"},
    )
    assert ReplicaSpec.from_document(json.loads(json.dumps(spec.to_document()))) == spec


def test_ranks_are_counted() -> None:
    assert (SETTINGS.rank_count, EngineSettings().rank_count) == (6, 1)


def test_a_replica_that_is_told_both_forms_starts_eager_and_tells_its_form() -> None:
    both = pb.EngineSettings(compilation=pb.COMPILATION_MODE_EAGER_THEN_COMPILED)
    assert settings_from_proto(both).compilation is Compilation.EAGER
    for form in Compilation:
        assert compilation_from_proto(compilation_to_proto(form)) is form
