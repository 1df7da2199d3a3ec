"""How much memory a replica books: weights, KV cache, activations and what its processes need. Pure.

A prediction first, from the model's profile; then what its replicas were measured to hold, by revision and settings. A
measure counts for everything but the KV cache and what adapters take, which are given and not predicted; and never
below the predicted overhead, because what nothing has touched yet takes no memory.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import EngineNeeds, needs_of

_MIB: Final = 1 << 20
# What the engine works on in one step where nobody says otherwise: helios.worker.engines.vllm and ReplicaSpec.
_BATCHED_TOKENS: Final = 1024
_RUNNING_REQUESTS: Final = 64
# Arrays of hidden size that are alive at once at the widest place of a layer: residual, normed, gate, up, their
# product, the last three wider than the hidden size by the feed-forward's factor.
_ACTIVATION_ARRAYS: Final = 20
# Arrays of logits in 32 bits that sampling holds at once: as computed, penalised, sorted, and their probabilities.
_LOGIT_ARRAYS: Final = 4
# Inputs and outputs of a layer's seven products, in widths of the model: an adapter has a row of each for each rank.
# Four of attention (two each), three of a feed-forward layer that is 8/3 as wide (1 + 8/3 each). Of these, ranks have
# their own part of twelve, and each of them all of seven: inputs of what is split by columns, outputs of the others.
_SPLIT_ADAPTER_WIDTHS: Final = 12
_WHOLE_ADAPTER_WIDTHS: Final = 7
# What a replica is given, and takes as it is used: no measure of a young one says how much that will be.
GIVEN: Final = frozenset({"KV_CACHE", "ADAPTERS", "HOST_ADAPTERS"})
# What a measure is of: revision, sha256 of the engine settings, on a GPU or not.
Measured: TypeAlias = tuple[str, str, bool]
# A measure says what was; the next replica may serve longer prompts.
_HEADROOM: Final = 1.03


@dataclass(frozen=True, slots=True)
class SizingPolicy:
    """How replicas are sized.

    Attributes:
        overhead_bytes: processes and engine of one rank, beside weights, KV cache and activations.
        context_count: full contexts that the KV cache should hold.
        min_kv_cache_bytes: lower bound of the KV cache.
        max_kv_cache_bytes: upper bound of the KV cache; one full context is granted above it.
        gpu_overhead_bytes: `overhead_bytes` of a rank on a GPU, on the device.
    """

    overhead_bytes: int
    context_count: int
    min_kv_cache_bytes: int
    max_kv_cache_bytes: int
    gpu_overhead_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """What one replica books, and the share of it that is KV cache. `items` add up to it.

    `host_items` is what a replica on a GPU has in host memory beside.
    """

    memory_bytes: int
    kv_cache_bytes: int
    items: tuple[tuple[str, int], ...] = ()
    host_items: tuple[tuple[str, int], ...] = ()

    @property
    def host_bytes(self) -> int:
        """What it books in host memory beside its device's."""
        return sum(size for _, size in self.host_items)


class MeasuredSizes:
    """What replicas were measured to hold beside what they were given (`GIVEN`).

    The largest by revision, settings, and GPU or not: of what this proxy has seen, and of what it was told by the
    registry, where settings go by their sha256.
    """

    def __init__(self) -> None:
        self._fixed_bytes: dict[Measured, int] = {}
        self._told: dict[Measured, int] = {}
        self._news: dict[Measured, int] = {}

    def record(
        self, revision: str, settings: str, *, measured_bytes: int, given_bytes: int, is_gpu: bool = False
    ) -> None:
        """Takes in what one replica holds, all of it, and what it was given."""
        key = (revision, _hash(settings), is_gpu)
        fixed_bytes = max(0, measured_bytes - given_bytes)
        known = self._known(key)
        self._fixed_bytes[key] = max(fixed_bytes, self._fixed_bytes.get(key, 0))
        if fixed_bytes and (known is None or fixed_bytes > known):
            self._news[key] = fixed_bytes

    def fixed_bytes(self, revision: str, settings: str, *, is_gpu: bool = False) -> int | None:
        """What a replica holds beside what it was given; None where none was measured."""
        return self._known((revision, _hash(settings), is_gpu))

    def keep_only(self, served: set[tuple[str, str]]) -> None:
        """Forgets what no model has any more; `served` are revisions with their settings."""
        kept = {(revision, _hash(settings)) for revision, settings in served}
        self._fixed_bytes = {key: value for key, value in self._fixed_bytes.items() if key[:2] in kept}
        self._told = {key: value for key, value in self._told.items() if key[:2] in kept}

    def tell(self, key: Measured, fixed_bytes: int) -> None:
        """Takes in what others have measured."""
        self._told[key] = max(fixed_bytes, self._told.get(key, 0))

    def take_news(self, count: int) -> dict[Measured, int]:
        """Returns what was measured since the last call and is more than anybody knew; at most so many."""
        return {key: self._news.pop(key) for key in list(self._news)[:count]}

    def put_back(self, news: dict[Measured, int]) -> None:
        """Nobody took these."""
        for key, fixed_bytes in news.items():
            self._news[key] = max(fixed_bytes, self._news.get(key, 0))

    def _known(self, key: Measured) -> int | None:
        own, told = self._fixed_bytes.get(key), self._told.get(key)
        return max(own or 0, told or 0) if own is not None or told is not None else None


def replica_size(
    entry: ModelEntry,
    policy: SizingPolicy,
    draft: ModelEntry | None = None,
    *,
    measured: MeasuredSizes | None = None,
    is_gpu: bool = False,
) -> ReplicaSize:
    """Sizes a replica of a model, with the one that guesses its tokens where it has one; whole MiB."""
    needs = needs_of(entry.engine_settings)
    weights_bytes = needs.weights_bytes(entry.weights_bytes, entry.dtype)
    token_bytes = needs.kv_bytes_per_token(entry.kv_bytes_per_token, entry.dtype)
    activation_bytes = _activation_bytes(entry, needs)
    if draft is not None:
        weights_bytes += draft.weights_bytes
        token_bytes += draft.kv_bytes_per_token
        activation_bytes += _activation_bytes(draft, needs)
    context_bytes = token_bytes * (needs.max_context_tokens or entry.max_context_tokens)
    wanted = min(context_bytes * policy.context_count, policy.max_kv_cache_bytes)
    kv_cache_bytes = _round_up(needs.kv_cache_bytes or max(wanted, context_bytes, policy.min_kv_cache_bytes))
    # Each rank has processes of its own.
    overhead_bytes = (policy.gpu_overhead_bytes if is_gpu else policy.overhead_bytes) * needs.rank_count
    fixed_bytes = _round_up(weights_bytes + activation_bytes + overhead_bytes)
    held = measured.fixed_bytes(entry.revision, entry.engine_settings, is_gpu=is_gpu) if measured is not None else None
    if held is not None:
        fixed_bytes = _round_up(max(int(held * _HEADROOM), activation_bytes + overhead_bytes))
    # Where the weights turn out to be the page cache's, a measured replica holds less than they take.
    own_weights = min(weights_bytes, fixed_bytes)
    own_activations = min(activation_bytes, fixed_bytes - own_weights)
    # On a CPU what no adapter fills of the engine's buffers is never touched, and takes no memory.
    adapter_bytes = _adapter_bytes(entry, needs, needs.rank_count, has_vocabulary=is_gpu)
    on_device = (("ADAPTERS", adapter_bytes),) if adapter_bytes else ()
    # Those that are loaded, in host memory: as many as there are buffers, whole for each rank. There is room for what
    # adapters have, and few change embeddings or the output layer.
    host_adapter_bytes = _adapter_bytes(entry, needs, 1, has_vocabulary=False) * needs.rank_count
    on_host: tuple[tuple[str, int], ...] = (("HOST_ADAPTERS", host_adapter_bytes),) if host_adapter_bytes else ()
    if is_gpu:
        offload_bytes = _round_up(needs.offload_bytes)
        on_host += (("KV_OFFLOAD", offload_bytes),) if offload_bytes else ()
    items = (
        ("WEIGHTS", own_weights),
        ("KV_CACHE", kv_cache_bytes),
        ("ACTIVATIONS", own_activations),
        ("OVERHEAD", fixed_bytes - own_weights - own_activations),
        *on_device,
        *(() if is_gpu else on_host),
    )
    return ReplicaSize(sum(size for _, size in items), kv_cache_bytes, items, on_host if is_gpu else ())


def _adapter_bytes(entry: ModelEntry, needs: EngineNeeds, rank_count: int, *, has_vocabulary: bool) -> int:
    """What adapters take: a pair of matrices for each product there is.

    The engine's buffers have such a pair for embeddings and output layer, too, and each rank all of it.
    """
    hidden = _hidden_size(entry)
    widths = _SPLIT_ADAPTER_WIDTHS + _WHOLE_ADAPTER_WIDTHS * rank_count
    values = widths * hidden * entry.layer_count
    if has_vocabulary:
        values += 2 * (entry.vocabulary_size + hidden) * rank_count
    count = values * needs.adapter_rank * needs.adapter_count
    return _round_up(count * needs.element_bytes(entry.dtype))


def _activation_bytes(entry: ModelEntry, needs: EngineNeeds) -> int:
    """What a step of the largest kind takes: activations, logits, and the packed copy of the output layer."""
    hidden = _hidden_size(entry)
    batched = needs.max_batched_tokens or _BATCHED_TOKENS
    running = needs.max_running_requests or _RUNNING_REQUESTS
    activations = batched * hidden * _ACTIVATION_ARRAYS * 2
    logits = running * entry.vocabulary_size * _LOGIT_ARRAYS * 4
    # Kernels want the output layer in another order than embeddings, which have the same weights. Where there may be
    # adapters, it is multiplied as it is.
    packed_head = 0 if needs.adapter_rank else entry.vocabulary_size * hidden * 2
    return activations + logits + packed_head


def _hidden_size(entry: ModelEntry) -> int:
    """Guesses the width from the number of parameters: twelve squares of it a layer, and the embeddings."""
    if not entry.layer_count or not entry.parameter_count:
        return 0
    square, linear = 12 * entry.layer_count, entry.vocabulary_size
    return int((math.sqrt(linear * linear + 4 * square * entry.parameter_count) - linear) / (2 * square))


def _round_up(count: int) -> int:
    return -(-count // _MIB) * _MIB


@lru_cache(maxsize=4096)
def _hash(settings: str) -> str:
    """Returns what settings go by between processes."""
    return hashlib.sha256(settings.encode()).hexdigest()
