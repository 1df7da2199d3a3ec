"""``--set key=value``: every field of the contract can be written, read back, and is refused by its name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.api.engine.v1 import engine_settings_pb2 as pb
from helios.cli.engine_settings import change, flatten, setting_keys
from helios.mesh.errors import InvalidRequest

EVERYTHING = {
    "engine": "vllm",
    "dtype": "float16",
    "quantization": "awq",
    "tensor_parallel_size": "2",
    "pipeline_parallel_size": "3",
    "max_context_tokens": "4096",
    "kv_cache_bytes": str(1 << 40),
    "kv_cache_dtype": "fp8",
    "prefix_caching": "false",
    "chunked_prefill": "true",
    "max_running_requests": "8",
    "max_batched_tokens": "512",
    "speculative_decoding.method": "ngram",
    "speculative_decoding.draft_model": "small",
    "speculative_decoding.token_count": "3",
    "speculative_decoding.prompt_lookup_max": "4",
    "lora.max_rank": "32",
    "lora.max_active_count": "2",
    "lora.adapters": "one:lora/one,two:lora/two",
    "kv_offload.host_bytes": "1024",
    "kv_offload.disk_bytes": "2048",
    "tool_call_parser": "hermes",
    "reasoning_parser": "deepseek_r1",
    "structured_output_backend": "xgrammar",
    "attention_backend": "FLASH_ATTN",
    "compilation": "eager",
    "cuda_graph_sizes": "1,2,8",
    "task": "embed",
    "role": "prefill",
    "chat_template": "{{ messages }}",
    "options.seed": "7=7",
}


def test_every_field_of_the_contract_can_be_set_and_is_written_as_it_was() -> None:
    keys = [key if key != "options.NAME" else "options.seed" for key in setting_keys()]
    assert sorted(keys) == sorted(EVERYTHING)
    settings = change(pb.EngineSettings(), [f"{key}={value}" for key, value in EVERYTHING.items()])
    assert flatten(settings) == EVERYTHING
    assert settings.compilation == pb.COMPILATION_MODE_EAGER
    assert settings.role == pb.DISAGGREGATION_ROLE_PREFILL
    assert settings.lora.adapters[1] == pb.LoraAdapter(name="two", model="lora/two")


@given(st.lists(st.sampled_from(sorted(EVERYTHING))))
def test_what_is_unset_is_as_if_it_had_never_been_set(keys: list[str]) -> None:
    everything = [f"{key}={value}" for key, value in EVERYTHING.items()]
    settings = change(change(pb.EngineSettings(), everything), [], keys)
    left = [line for line in everything if line.partition("=")[0] not in keys]
    assert settings == change(pb.EngineSettings(), left)


def test_a_change_leaves_the_rest_and_the_original_alone() -> None:
    before = change(pb.EngineSettings(), ["dtype=float16", "cuda_graph_sizes=1,2"])
    after = change(before, ["cuda_graph_sizes=4", "prefix_caching=off"], ["dtype"])
    assert flatten(after) == {"cuda_graph_sizes": "4", "prefix_caching": "false"}
    assert flatten(before) == {"dtype": "float16", "cuda_graph_sizes": "1,2"}
    assert flatten(change(change(before, ["lora.max_rank=8"]), [], ["lora"])) == flatten(before)


def test_bytes_have_units_and_texts_come_from_files(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}\n")
    settings = change(pb.EngineSettings(), ["kv_cache_bytes=96 MiB", f"chat_template=@{template}"])
    assert (settings.kv_cache_bytes, settings.chat_template) == (96 << 20, "{{ messages }}\n")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("dtype", "dtype: has no value; write it as key=value"),
        ("prefix_caching=maybe", "prefix_caching: 'maybe' is neither true nor false"),
        ("compilation=fast", "compilation: 'fast' is not one of eager, compiled"),
        ("task=unspecified", "task: 'unspecified' is not one of generate, embed"),
        ("max_context_tokens=4k", "max_context_tokens: '4k' is not a whole number"),
        ("max_context_tokens=-1", "max_context_tokens: '-1' is not a whole number"),
        ("kv_cache_bytes=1GB", "kv_cache_bytes: '1GB' is not a number, or one with KiB"),
        ("max_running_requests=4294967296", "max_running_requests: 4294967296 is too large"),
        ("cuda_graph_sizes=1,x", "cuda_graph_sizes: 'x' is not a whole number"),
        ("lora.adapters=one", "lora.adapters: 'one' is not NAME:MODEL"),
        ("chat_template=@/nowhere", "chat_template: /nowhere can't be read"),
    ],
)
def test_a_value_that_cant_be_is_refused_by_its_key(assignment: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        change(pb.EngineSettings(), [assignment])
    assert words in caught.value.message


@pytest.mark.parametrize(
    "key", ["dtyp", "speculative_decoding", "speculative_decoding.draft_revision", "options", "lora."]
)
def test_an_unknown_key_is_told_with_those_that_there_are(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        change(pb.EngineSettings(), [f"{key}=x"])
    assert caught.value.reason == "UNKNOWN_SETTING"
    assert repr(key) in caught.value.message
    for known in ("dtype", "speculative_decoding.method", "options.NAME"):
        assert known in caught.value.message
    assert "draft_revision," not in caught.value.message
