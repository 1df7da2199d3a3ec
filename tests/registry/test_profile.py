"""Profiles: numbers that placement relies on, from headers and config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import InvalidRequest
from helios.registry.inspection import inspect_model
from helios.registry.profile import build_profile, check_shards, read_weight_map
from helios.registry.safetensors_header import SafetensorsHeader, Tensor
from tests.registry import tiny


def header(dtype: str = "BF16", elements: int = 100, size: int = 200, name: str = "w") -> SafetensorsHeader:
    return SafetensorsHeader((Tensor(name, dtype, (elements,), 0, size),), {})


def profile_of(config: dict[str, Any], dtype: str = "BF16") -> Any:
    return build_profile(config, {"model.safetensors": header(dtype)})


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in tiny.CONFIG.items() if key not in keys}


def test_profile_of_a_directory(tmp_path: Path) -> None:
    directory = tiny.write_model(tmp_path / "m")
    profile = inspect_model({path.name: path for path in directory.iterdir()})
    weights = tiny.tensors()
    assert profile.architecture == "LlamaForCausalLM"
    assert profile.parameter_count == sum(weight.size for weight in weights.values())
    assert profile.weights_bytes == 2 * profile.parameter_count
    assert profile.dtype == "float16"
    assert profile.kv_bytes_per_token == tiny.KV_BYTES_PER_TOKEN
    assert (profile.layer_count, profile.max_context_tokens) == (tiny.LAYERS, tiny.CONTEXT)
    assert profile.vocabulary_size == len(tiny.WORDS)


def test_shards_have_the_profile_of_the_whole(tmp_path: Path) -> None:
    one, several = tiny.write_model(tmp_path / "one"), tiny.write_sharded(tmp_path / "several")
    whole = inspect_model({path.name: path for path in one.iterdir()})
    assert inspect_model({path.name: path for path in several.iterdir()}) == whole


@pytest.mark.parametrize(
    ("changes", "kv_bytes"),
    [
        # Layers x (keys and values) x KV heads x head size x bytes.
        ({}, 2 * 2 * 2 * 8 * 2),
        ({"num_key_value_heads": None}, 2 * 2 * 4 * 8 * 2),
        ({"head_dim": 16}, 2 * 2 * 2 * 16 * 2),
        ({"num_key_value_heads": 1}, 2 * 2 * 1 * 8 * 2),
        ({"num_key_value_heads": None, "multi_query": True}, 2 * 2 * 1 * 8 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2 * (512 + 64) * 2),
    ],
)
def test_kv_bytes_per_token(changes: dict[str, Any], kv_bytes: int) -> None:
    assert profile_of(tiny.CONFIG | changes).kv_bytes_per_token == kv_bytes


def test_smollm2_needs_22_5_kib_a_token() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "vocab_size": 49152, "max_position_embeddings": 8192,
    }  # fmt: skip
    assert profile_of(config).kv_bytes_per_token == 23_040


@pytest.mark.parametrize(
    ("dtype", "named", "kv_value_bytes"),
    [("F32", None, 4), ("BF16", "float32", 2), ("I32", "float32", 4), ("F8_E4M3", "bfloat16", 2), ("U8", None, 2)],
)
def test_the_cache_of_quantised_weights_has_the_type_of_the_activations(
    dtype: str, named: str | None, kv_value_bytes: int
) -> None:
    config = without("torch_dtype") | ({"dtype": named} if named else {})
    assert profile_of(config, dtype).kv_bytes_per_token == 2 * 2 * 2 * 8 * kv_value_bytes


def test_other_names_of_settings() -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "vocab_size": 50257,
    }  # fmt: skip
    profile = profile_of(config)
    assert (profile.layer_count, profile.max_context_tokens) == (12, 1024)
    assert profile.kv_bytes_per_token == 12 * 2 * 768 * 2


def test_numbers_of_the_language_model_in_a_part_of_their_own() -> None:
    assert (
        profile_of({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": tiny.CONFIG}).layer_count == 2
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without("architectures"), "architecture"),
        (tiny.CONFIG | {"architectures": []}, "architecture"),
        (tiny.CONFIG | {"architectures": ["a; rm -rf"]}, "architecture"),
        (without("num_hidden_layers"), "num_hidden_layers"),
        (without("vocab_size"), "vocab_size"),
        (tiny.CONFIG | {"num_hidden_layers": -3}, "positive"),
        (tiny.CONFIG | {"num_hidden_layers": True}, "positive"),
        (tiny.CONFIG | {"num_hidden_layers": 1e3}, "positive"),
        (tiny.CONFIG | {"num_hidden_layers": 1 << 40}, "positive"),
        (tiny.CONFIG | {"num_key_value_heads": 3}, "contradicts"),
        (tiny.CONFIG | {"hidden_size": 2}, "contradicts"),
        (tiny.CONFIG | {"text_config": [1]}, "text_config"),
    ],
)
def test_refuses_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        profile_of(config)
    assert caught.value.reason == "UNSUPPORTED_FORMAT"


def test_refuses_files_without_weights() -> None:
    with pytest.raises(InvalidRequest, match="no weights"):
        build_profile(tiny.CONFIG, {"model.safetensors": SafetensorsHeader((), {})})


def test_the_index_must_agree_with_the_shards() -> None:
    shards = {"a.safetensors": header(name="x"), "b.safetensors": header(name="y")}
    check_shards({"x": "a.safetensors", "y": "b.safetensors"}, shards)
    for wrong in (
        {"x": "a.safetensors"},
        {"x": "b.safetensors", "y": "b.safetensors"},
        {"x": "a.safetensors", "z": "b.safetensors"},
    ):
        with pytest.raises(InvalidRequest, match="index"):
            check_shards(wrong, shards)
    with pytest.raises(InvalidRequest, match=r"is in a\.safetensors and in b\.safetensors"):
        check_shards(None, {"a.safetensors": header(), "b.safetensors": header()})


@pytest.mark.parametrize("weight_map", [{}, None, [], {"x": "../a.safetensors"}, {"x": "a.bin"}, {"x": 3}])
def test_refuses_weight_maps(weight_map: Any) -> None:
    with pytest.raises(InvalidRequest):
        read_weight_map({"weight_map": weight_map})


def test_a_config_with_two_equal_keys_is_refused(tmp_path: Path) -> None:
    directory = tiny.write_model(tmp_path / "m")
    text = json.dumps(tiny.CONFIG)
    (directory / "config.json").write_text(text[:-1] + ', "vocab_size": 1}')
    with pytest.raises(InvalidRequest, match="'vocab_size' stands twice"):
        inspect_model({path.name: path for path in directory.iterdir()})
