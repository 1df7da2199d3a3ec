"""What is known of a model without loading it: from its config.json and the headers of its safetensors files.

Placement and cold-start estimates are computed from these numbers before a replica exists, so they come from the
tensors that are really there; config.json only says what headers can't: layers, heads, vocabulary, context.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from helios.registry.safetensors_header import DTYPE_BITS, SafetensorsHeader
from helios.registry.strict_json import malformed

# Names as PyTorch and config.json write them.
_DTYPE_NAMES: Final[dict[str, str]] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
    "F6_E2M3": "float6_e2m3", "F6_E3M2": "float6_e3m2",
}  # fmt: skip
# Types that an engine keeps its KV cache in; quantised weights have a cache in the type of the activations.
_KV_BYTES: Final[dict[str, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}
_DEFAULT_KV_BYTES: Final = 2
# What stands in `architecture` of a LoRA adapter.
ADAPTER: Final = "LoraAdapter"
# Longer than any hub's names and most paths.
_MAX_BASE_NAME: Final = 500
# Far above any model (the largest have 126 layers, 262,144 entries, 10 M tokens); below 2^32, the wire's type.
_MAX_SETTING: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What is known of a model without loading it.

    Attributes:
        architecture: Model class, such as ``LlamaForCausalLM``.
        dtype: Type of most bytes of the weights, in PyTorch's words.
        kv_bytes_per_token: KV cache of all layers for one token, at the weights' type.
        max_context_tokens: Longest context that the model was made for; 0 where config.json does not say.
        base_model: Of a LoRA adapter: what it was made for, as its adapter_config.json names it. Empty: a whole model.
        license: As the model card (README.md) names it, such as ``apache-2.0``; empty where it does not.
        tensor_parallel_options: Into how many ranks its layers can be split; empty: it was ingested before that was
            asked.
        pipeline_parallel_options: Into how many stages they can be cut; the same.
    """

    architecture: str
    parameter_count: int
    weights_bytes: int
    dtype: str
    kv_bytes_per_token: int
    max_context_tokens: int
    layer_count: int
    vocabulary_size: int
    base_model: str = ""
    license: str = ""
    tensor_parallel_options: tuple[int, ...] = ()
    pipeline_parallel_options: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # What was kept as JSON has lists.
        for name in ("tensor_parallel_options", "pipeline_parallel_options"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


def build_adapter_profile(config: Mapping[str, Any], header: SafetensorsHeader) -> ModelProfile:
    """Computes the profile of a LoRA adapter: what it weighs, and for which model it was made.

    Args:
        config: The content of adapter_config.json.
        header: Header of adapter_model.safetensors.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when it is another kind of adapter, or does not say for which model.
    """
    if config.get("peft_type") != "LORA":
        raise malformed(f"adapter_config.json is of the kind {str(config.get('peft_type'))[:50]!r}, not 'LORA'")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or len(base) > _MAX_BASE_NAME or not base.isprintable():
        raise malformed("adapter_config.json does not say for which model it is ('base_model_name_or_path')")
    _setting(config, "r")
    by_dtype = Counter(header.bytes_by_dtype())
    if not any(".lora_" in tensor.name for tensor in header.tensors):
        raise malformed("adapter_model.safetensors holds no LoRA weights")
    return ModelProfile(
        architecture=ADAPTER,
        parameter_count=sum(tensor.element_count for tensor in header.tensors),
        weights_bytes=by_dtype.total(),
        dtype=_DTYPE_NAMES[max(by_dtype, key=lambda name: (by_dtype[name], DTYPE_BITS[name], name))],
        kv_bytes_per_token=0,
        max_context_tokens=0,
        layer_count=0,
        vocabulary_size=0,
        base_model=base,
    )


def build_profile(config: Mapping[str, Any], headers: Mapping[str, SafetensorsHeader]) -> ModelProfile:
    """Computes the profile of a model.

    Args:
        config: The content of config.json.
        headers: Header of each safetensors file that belongs to the model, by path.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when config.json lacks or contradicts what an engine needs.
    """
    by_dtype: Counter[str] = Counter()
    for header in headers.values():
        by_dtype.update(header.bytes_by_dtype())
    weights_bytes = by_dtype.total()
    if weights_bytes == 0:
        raise malformed("the safetensors files hold no weights")
    dtype = _DTYPE_NAMES[max(by_dtype, key=lambda name: (by_dtype[name], DTYPE_BITS[name], name))]
    # Models of several modalities keep the language model's numbers in a part of their own.
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise malformed("text_config in config.json is not an object")
    layer_count = _setting(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return ModelProfile(
        architecture=read_architecture(config),
        parameter_count=sum(tensor.element_count for header in headers.values() for tensor in header.tensors),
        weights_bytes=weights_bytes,
        dtype=dtype,
        kv_bytes_per_token=layer_count * _kv_values_per_layer(text) * _kv_value_bytes(dtype, text, config),
        max_context_tokens=_optional_setting(
            text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"
        )
        or 0,
        layer_count=layer_count,
        vocabulary_size=_setting(text, "vocab_size", "n_vocab"),
    )


def check_shards(weight_map: Mapping[str, str] | None, headers: Mapping[str, SafetensorsHeader]) -> None:
    """Checks that shards hold each tensor once, and where there is an index, exactly the tensors it names.

    Args:
        weight_map: ``weight_map`` of model.safetensors.index.json: tensor to path. None without an index.
        headers: Header of each shard, by path.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT.
    """
    found: dict[str, str] = {}
    for path, header in sorted(headers.items()):
        for tensor in header.tensors:
            other = found.setdefault(tensor.name, path)
            if other != path:
                raise malformed(f"tensor {tensor.name[:100]!r} is in {other} and in {path}")
    if weight_map is None:
        return
    for name, path in weight_map.items():
        if found.get(name) != path:
            raise malformed(
                f"the index says that tensor {name[:100]!r} is in {path}; it is in {found.get(name, 'none')}"
            )
    extra = found.keys() - weight_map.keys()
    if extra:
        raise malformed(f"tensor {min(extra)[:100]!r} is in {found[min(extra)]} and not in the index")


def read_weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Returns the weight map of model.safetensors.index.json.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when it is missing, empty, or names anything but file names.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise malformed("model.safetensors.index.json has no weight_map")
    for path in weight_map.values():
        if not isinstance(path, str) or "/" in path or not path.endswith(".safetensors"):
            raise malformed(f"the index names {str(path)[:100]!r}, which is not the name of a safetensors file")
    return weight_map


def read_architecture(config: Mapping[str, Any]) -> str:
    """Returns the model class that config.json names first. Raises InvalidRequest (UNSUPPORTED_FORMAT)."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise malformed("config.json does not say which architecture the model has ('architectures')")
    name: str = names[0]
    if not name.isidentifier() or len(name) > 200:
        raise malformed(f"{name[:100]!r} in config.json is not an architecture")
    return name


def _kv_values_per_layer(config: Mapping[str, Any]) -> int:
    """Returns how many numbers one token adds to one layer's KV cache."""
    latent = _optional_setting(config, "kv_lora_rank")
    if latent:
        # Multi-head latent attention caches one compressed vector and the rotary part of the key.
        return latent + (_optional_setting(config, "qk_rope_head_dim") or 0)
    heads = _setting(config, "num_attention_heads", "n_head", "n_heads")
    hidden = _setting(config, "hidden_size", "n_embd", "d_model")
    kv_heads = _optional_setting(config, "num_key_value_heads", "num_kv_heads", "n_head_kv")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query") is True else heads
    head_dim = _optional_setting(config, "head_dim") or hidden // heads
    if heads % kv_heads or not head_dim:
        raise malformed(f"config.json contradicts itself: {heads} heads, {kv_heads} KV heads, hidden size {hidden}")
    return 2 * kv_heads * head_dim


def _kv_value_bytes(weights_dtype: str, *configs: Mapping[str, Any]) -> int:
    names = [weights_dtype, *(config.get(key) for config in configs for key in ("dtype", "torch_dtype"))]
    return next((_KV_BYTES[name] for name in names if isinstance(name, str) and name in _KV_BYTES), _DEFAULT_KV_BYTES)


def _setting(config: Mapping[str, Any], *names: str) -> int:
    value = _optional_setting(config, *names)
    if value is None:
        raise malformed(f"config.json lacks {names[0]!r}")
    return value


def _optional_setting(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 < value < _MAX_SETTING:
            raise malformed(f"{name!r} in config.json is {str(value)[:50]}, not a positive whole number")
        return value
    return None
