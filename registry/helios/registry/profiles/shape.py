"""The shape of a model, from its config.json, and where its bytes are, from the headers of its weights. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from helios.registry.profile import ModelProfile
from helios.registry.profiles.splits import ANY_SPLIT, Splits, splits_of
from helios.registry.safetensors_header import SafetensorsHeader

# The names that libraries give to a stack of layers; the number is the layer's.
_BLOCK: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
# What is not the language model's, in models of several modalities: their layers have numbers of their own.
_OTHER_TOWER: Final = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|speech)[^.]*\.")
_EMBEDDING: Final = re.compile(r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings|embed_in)\.")
_HEAD: Final = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.")


@dataclass(frozen=True, slots=True)
class Shape:
    """How a model is built, as far as splitting it goes. 0 where config.json does not say.

    Attributes:
        kv_head_count: Heads of keys and values; with a latent cache (MLA) 1, which every rank keeps whole.
        expert_width: Width of an expert's feed-forward layer; 0 without experts.
        splits: What the engine's class can do.
    """

    head_count: int
    kv_head_count: int
    layer_count: int
    vocabulary_size: int
    feed_forward_width: int
    expert_count: int = 0
    expert_width: int = 0
    is_latent: bool = False
    splits: Splits = ANY_SPLIT


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes of a model's weights.

    Attributes:
        blocks: Of each layer, in order.
        embedding_bytes: Of the input embeddings.
        head_bytes: Of the output layer; 0 where it is the embeddings' (tied).
        other_bytes: Of everything else: norms, other towers.
        by_dtype: All of it, by type, in safetensors' words.
    """

    blocks: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    by_dtype: tuple[tuple[str, int], ...]

    @property
    def is_tied(self) -> bool:
        """Whether the output layer has the embeddings' weights."""
        return self.embedding_bytes > 0 and self.head_bytes == 0

    @property
    def total_bytes(self) -> int:
        """All weights."""
        return sum(self.blocks) + self.embedding_bytes + self.head_bytes + self.other_bytes


def shape_of(config: Mapping[str, Any], profile: ModelProfile) -> Shape:
    """Returns a model's shape; ``profile`` is what its ingest made of the same config."""
    text = config.get("text_config", config)
    text = text if isinstance(text, Mapping) else config
    is_latent = bool(_number(text, "kv_lora_rank"))
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _number(text, "num_key_value_heads", "num_kv_heads", "n_head_kv")
    if not kv_heads:
        kv_heads = 1 if text.get("multi_query") is True else heads
    experts = _number(text, "num_local_experts", "n_routed_experts", "num_experts")
    width = _number(text, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    expert_width = _number(text, "moe_intermediate_size") or width
    return Shape(
        head_count=heads,
        kv_head_count=1 if is_latent else kv_heads,
        layer_count=profile.layer_count,
        vocabulary_size=profile.vocabulary_size,
        feed_forward_width=width,
        expert_count=experts,
        expert_width=expert_width if experts else 0,
        is_latent=is_latent,
        splits=splits_of(profile.architecture),
    )


def layout_of(headers: Iterable[SafetensorsHeader]) -> Layout:
    """Returns where a model's bytes are."""
    blocks: Counter[int] = Counter()
    by_dtype: Counter[str] = Counter()
    embedding_bytes = head_bytes = other_bytes = 0
    for header in headers:
        by_dtype.update(header.bytes_by_dtype())
        for tensor in header.tensors:
            size = tensor.end - tensor.begin
            found = None if _OTHER_TOWER.search(tensor.name) else _BLOCK.search(tensor.name)
            if found is not None:
                blocks[int(found[1])] += size
            elif _EMBEDDING.search(tensor.name):
                embedding_bytes += size
            elif _HEAD.search(tensor.name):
                head_bytes += size
            else:
                other_bytes += size
    sizes = tuple(blocks[index] for index in sorted(blocks))
    return Layout(sizes, embedding_bytes, head_bytes, other_bytes, tuple(sorted(by_dtype.items())))


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    return 0
