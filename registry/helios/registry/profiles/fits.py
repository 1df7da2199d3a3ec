"""How a model can be split, and on which devices it fits then. Pure.

The rules are vLLM's, of a model's shape and of its class (`splits`); contract tests hold them to it. Tensor parallelism
splits heads, the feed-forward layers and the padded vocabulary, each into equal parts; heads of keys and values either
evenly, or each is kept by several ranks. Pipeline parallelism gives each stage a run of layers. Source: vLLM 0.32,
ModelConfig.verify_with_parallel_config, QKVParallelLinear, VocabParallelEmbedding, distributed.utils.get_pp_indices.
"""

from dataclasses import dataclass
from typing import Final

from helios.registry.profiles.shape import Layout, Shape

_GIB: Final = 1 << 30
# Ranks of one node, and of two.
MAX_TENSOR_PARALLEL: Final = 16
_STAGES: Final = (1, 2, 4, 8, 16)
# A gang larger than that is nothing that a profile should propose by itself.
_MAX_RANKS: Final = 16
# vLLM pads the vocabulary to a multiple of it.
_VOCABULARY_PADDING: Final = 64
# Share of a device that vLLM takes (gpu_memory_utilization), the rest is the driver's and its neighbours'.
_USABLE: Final = 0.9
# Context, graphs and activations of a rank; proxy.sizing measures, this is for choosing hardware.
_OVERHEAD_BYTES: Final = 3 * _GIB // 2
# A cache below that serves nobody: a prompt and an answer.
_MIN_TOKENS: Final = 2048

# Memory of devices, by what people call them; slices are MIG's of 40, 80 and 141 GB devices.
DEVICES: Final[dict[str, int]] = {
    "MIG 1g.5gb": 5 * _GIB, "MIG 1g.10gb": 10 * _GIB, "MIG 1g.18gb": 18 * _GIB, "MIG 2g.20gb": 20 * _GIB,
    "MIG 2g.35gb": 35 * _GIB, "MIG 3g.40gb": 40 * _GIB, "MIG 3g.71gb": 71 * _GIB,
    "16 GiB": 16 * _GIB, "24 GiB": 24 * _GIB, "40 GiB": 40 * _GIB, "48 GiB": 48 * _GIB, "80 GiB": 80 * _GIB,
    "141 GiB": 141 * _GIB, "192 GiB": 192 * _GIB,
}  # fmt: skip
# Slices don't reach each other: no model is split over them.
_SLICE: Final = "MIG"


@dataclass(frozen=True, slots=True)
class Fit:
    """A device that a model fits, and the smallest gang of it.

    Attributes:
        needed_bytes: Of the fullest rank, without KV cache.
        kv_bytes: What that leaves each rank for its KV cache.
        kv_tokens: What all ranks together have room for, in tokens.
    """

    device: str
    device_bytes: int
    tensor_parallel: int
    pipeline_parallel: int
    needed_bytes: int
    kv_bytes: int
    kv_tokens: int


def tensor_parallel_options(shape: Shape) -> tuple[int, ...]:
    """Returns into how many ranks a layer can be split; 1 always."""
    padded = -(-shape.vocabulary_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    widths = [width for width in (shape.feed_forward_width, shape.expert_width) if width]

    def is_possible(ranks: int) -> bool:
        heads, kv_heads = shape.head_count, shape.kv_head_count
        if not heads or heads % ranks or padded % ranks or any(width % ranks for width in widths):
            return False
        return shape.is_latent or not kv_heads % ranks or not ranks % kv_heads

    if not shape.splits.has_ranks:
        return (1,)
    return (1, *(ranks for ranks in range(2, MAX_TENSOR_PARALLEL + 1) if is_possible(ranks)))


def pipeline_parallel_options(shape: Shape) -> tuple[int, ...]:
    """Returns into how many stages the layers can be cut; a stage has one at least, and not every class has stages."""
    if not shape.splits.has_stages:
        return (1,)
    return tuple(stages for stages in _STAGES if stages <= max(1, shape.layer_count))


def rank_bytes(layout: Layout, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Returns the weights of the fullest rank.

    Stages get equal runs of layers, what is left over goes to the stages before the last ones, as vLLM does it.
    Embeddings are the first stage's, the output layer the last one's, which has a copy of tied embeddings.
    """
    stages: list[int] = []
    begin = 0
    for count in _stage_counts(len(layout.blocks), pipeline_parallel):
        stages.append(sum(layout.blocks[begin : begin + count]))
        begin += count
    stages[0] += layout.embedding_bytes
    copy = layout.embedding_bytes if layout.is_tied and pipeline_parallel > 1 else 0
    stages[-1] += layout.head_bytes + copy
    # Norms, other towers: kept whole by whoever has them, at worst by all.
    return max(-(-stage // tensor_parallel) for stage in stages) + layout.other_bytes


def fits_of(shape: Shape, layout: Layout, *, kv_bytes_per_token: int, max_context_tokens: int) -> tuple[Fit, ...]:
    """Returns the devices that a model fits, each with the smallest gang; the smallest device first.

    Of gangs of one size the one with fewer stages: they add no latency of their own.
    """
    options = sorted(
        ((tp, pp) for tp in tensor_parallel_options(shape) for pp in pipeline_parallel_options(shape)),
        key=lambda option: (option[0] * option[1], option[1]),
    )
    enough = min(max_context_tokens or _MIN_TOKENS, _MIN_TOKENS)
    found: list[Fit] = []
    for device, device_bytes in sorted(DEVICES.items(), key=lambda item: (item[1], item[0])):
        for tp, pp in options:
            if tp * pp > (1 if device.startswith(_SLICE) else _MAX_RANKS):
                break
            fit = _fit(shape, layout, (device, device_bytes), (tp, pp), kv_bytes_per_token)
            if fit.kv_bytes > 0 and fit.kv_tokens >= enough:
                found.append(fit)
                break
    return tuple(found)


def kv_rank_bytes(shape: Shape, kv_bytes_per_token: int, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Returns what one token adds to the fullest rank's KV cache."""
    layers = max(1, shape.layer_count)
    stage = -(-kv_bytes_per_token * max(_stage_counts(layers, pipeline_parallel)) // layers)
    if shape.is_latent:
        # One compressed vector for all heads: every rank has it whole.
        return stage
    return -(-stage // min(tensor_parallel, max(1, shape.kv_head_count)))


def _fit(shape: Shape, layout: Layout, device: tuple[str, int], split: tuple[int, int], kv_bytes_per_token: int) -> Fit:
    needed_bytes = rank_bytes(layout, *split) + _OVERHEAD_BYTES
    kv_bytes = max(0, int(device[1] * _USABLE) - needed_bytes)
    token_bytes = kv_rank_bytes(shape, kv_bytes_per_token, *split)
    # A model without a cache has room for any prompt.
    kv_tokens = kv_bytes // token_bytes if token_bytes else (1 << 31) - 1
    return Fit(device[0], device[1], split[0], split[1], needed_bytes, kv_bytes, kv_tokens)


def _stage_counts(layer_count: int, stages: int) -> list[int]:
    """Returns how many layers each stage has; what is left over goes to those before the last, the later the sooner."""
    counts = [layer_count // stages] * stages
    for index in range(layer_count % stages):
        # The last stage has the output layer, so the one before it is the first to get one more.
        counts[-2 - index if stages > 1 else 0] += 1
    return counts
