"""Models that tests make: small ones of nothing but a seed, and the embedded one in eight bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_llama(directory: Path, tokenizer: Path, *, heads: int = 8, layers: int = 2) -> Path:
    """Writes a Llama that two, four or eight ranks can share; returns where.

    Args:
        directory: An empty directory.
        tokenizer: A model whose tokenizer it takes.
        heads: Heads of attention, and of the KV cache.
        layers: How many layers.
    """
    config = transformers.LlamaConfig(
        hidden_size=32 * heads,
        intermediate_size=512,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        vocab_size=49152,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        # Larger than a trained model's, so that the likeliest token is clear of the next.
        initializer_range=0.2,
    )
    torch.manual_seed(7)
    # Its bars come with a thread that never ends.
    disable_progress_bar()
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.float32).save_pretrained(directory)
    for name in _TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, directory / name)
    return directory


def quantise(source: Path, directory: Path) -> Path:
    """Writes a model with weights and activations of its layers in int8 (compressed-tensors' W8A8); returns where.

    A scale for each output channel, and one for each token at run time.
    """
    directory.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory / file.name)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


ATTENTION = ("q_proj", "v_proj")
# Every product that an adapter can have.
ALL_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    source: Path, directory: Path, *, seed: int = 1, rank: int = 4, products: tuple[str, ...] = ATTENTION
) -> Path:
    """Writes a LoRA adapter of a Llama as PEFT does, with random weights that change its answers; returns where."""
    directory.mkdir()
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.endswith(tuple(f"{product}.weight" for product in products))
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_size, in_size) in shapes.items():
        for part, shape in (("A", (rank, in_size)), ("B", (out_size, rank))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = 0.1 * torch.randn(shape, generator=random)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(products),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
