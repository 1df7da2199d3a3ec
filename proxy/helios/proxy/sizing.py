"""How much memory a replica books: weights, KV cache and what the process itself needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class SizingPolicy:
    """How replicas are sized.

    Attributes:
        overhead_bytes: processes, engine and activations of one replica, beside weights and KV cache.
        context_count: full contexts that the KV cache should hold.
        min_kv_cache_bytes: lower bound of the KV cache.
        max_kv_cache_bytes: upper bound of the KV cache; one full context is granted above it.
    """

    overhead_bytes: int
    context_count: int
    min_kv_cache_bytes: int
    max_kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """What one replica books, and the share of it that is KV cache."""

    memory_bytes: int
    kv_cache_bytes: int


def replica_size(entry: ModelEntry, policy: SizingPolicy, draft: ModelEntry | None = None) -> ReplicaSize:
    """Sizes a replica of a model, with the one that guesses its tokens where it has one; whole MiB."""
    needs = needs_of(entry.engine_settings)
    weights_bytes = needs.weights_bytes(entry.weights_bytes, entry.dtype)
    token_bytes = needs.kv_bytes_per_token(entry.kv_bytes_per_token, entry.dtype)
    if draft is not None:
        weights_bytes += draft.weights_bytes
        token_bytes += draft.kv_bytes_per_token
    context_bytes = token_bytes * (needs.max_context_tokens or entry.max_context_tokens)
    wanted = min(context_bytes * policy.context_count, policy.max_kv_cache_bytes)
    kv_cache_bytes = _round_up(needs.kv_cache_bytes or max(wanted, context_bytes, policy.min_kv_cache_bytes))
    # Each rank has processes of its own.
    fixed_bytes = _round_up(weights_bytes + policy.overhead_bytes * needs.rank_count)
    return ReplicaSize(fixed_bytes + kv_cache_bytes, kv_cache_bytes)


def _round_up(count: int) -> int:
    return -(-count // _MIB) * _MIB
