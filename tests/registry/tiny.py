"""A tiny Llama, made without torch: as a directory of safetensors, as shards, and as a GGUF file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, CONTEXT = 2, 32, 4, 2, 64, 128
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "ab", "cd"]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": CONTEXT,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "vocab_size": len(WORDS),
}
# Keys and values of two heads of eight values each, two bytes a value, two layers.
KV_BYTES_PER_TOKEN = 2 * KV_HEADS * (HIDDEN // HEADS) * 2 * LAYERS


def tensors(seed: int = 0) -> dict[str, NDArray[np.float16]]:
    """Returns the weights; the same for the same seed."""
    random = np.random.default_rng(seed)
    kv = KV_HEADS * (HIDDEN // HEADS)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(WORDS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return {name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def write_model(directory: Path, *, seed: int = 0) -> Path:
    """Writes the model as hubs have it; returns the directory."""
    directory.mkdir(parents=True)
    save_file(tensors(seed), directory / "model.safetensors")
    write_small_files(directory)
    return directory


def write_small_files(directory: Path) -> None:
    """Writes config and tokenizer."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_sharded(directory: Path, count: int = 2, *, noise_bytes: int = 0, seed: int = 0) -> Path:
    """Writes the model in so many shards with an index; returns the directory.

    Each shard gets so many bytes of noise, which depends on the seed, so that fetching it lasts.
    """
    directory.mkdir(parents=True)
    weights = tensors()
    names = sorted(weights)
    cuts = [len(names) * number // count for number in range(count + 1)]
    parts = {
        f"model-{number + 1:05}-of-{count:05}.safetensors": names[cuts[number] : cuts[number + 1]]
        for number in range(count)
    }
    random = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for number, (file, part) in enumerate(parts.items()):
        shard: dict[str, NDArray[np.float16] | NDArray[np.uint8]] = {name: weights[name] for name in part}
        if noise_bytes:
            shard[f"noise.{number}"] = random.integers(0, 256, noise_bytes, dtype=np.uint8)
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_small_files(directory)
    return directory


def write_big(directory: Path, size_bytes: int) -> Path:
    """Writes the model with one more tensor of this size, a hole in the file, so that an ingest lasts."""
    directory.mkdir(parents=True)
    content = save(tensors())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin = len(content) - 8 - length
    header["filler"] = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [begin, begin + size_bytes]}
    document = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(document).to_bytes(8, "little") + document + content[8 + length :])
    os.truncate(path, path.stat().st_size + size_bytes)
    write_small_files(directory)
    return directory


def write_gguf(path: Path, *, tokenizer: bool = True, merges: tuple[str, ...] = ("a b", "c d")) -> Path:
    """Writes the model as a GGUF file; returns the path."""
    # It brings OpenCV and others along: a third of what all fast tests import, in each process.
    import gguf  # noqa: PLC0415

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_file_type(1)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(WORDS)
        writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
        writer.add_token_merges(list(merges))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, value in tensors().items():
        base = name.removesuffix(".weight")
        data = value.astype(np.float32) if value.ndim == 1 else value
        writer.add_tensor(f"{names.get_name(base)}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sha256(path: Path) -> str:
    """Returns a file's sha256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
