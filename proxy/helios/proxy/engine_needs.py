"""What a model's engine settings mean here: which engine, how much memory, which other models. Pure.

The settings are the contract's JSON, as the registry keeps it; the proxy hands them on and reads only what it decides
by. A settings document of a newer registry is read as far as it is understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from helios.proxy.fleet.state import Form

# Bytes of one value, by type. Integers of four bits are kept in bytes by some engines: rather too much than too little.
_ELEMENT_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
_FORMS: Final = {f"COMPILATION_MODE_{form.name}": form for form in (Form.EAGER, Form.COMPILED)}
_BOTH_FORMS: Final = "COMPILATION_MODE_EAGER_THEN_COMPILED"
# The contract's, where nobody says otherwise.
_ADAPTER_RANK: Final = 16
_SMALL_ELEMENTS: Final = ("fp8", "int8", "int4", "nvfp4", "turboquant", "ultraquant")


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """What the proxy reads of engine settings; empty, 0 and 1 where they do not say.

    Attributes:
        engine: engine to run it with, as the worker is told.
        dtype: type of weights and activations, where one is forced.
        kv_cache_dtype: type of the KV cache, where one is forced.
        rank_count: devices that one replica takes: tensor times pipeline parallelism.
        max_context_tokens: longest prompt plus answer.
        kv_cache_bytes: KV cache of a replica.
        max_running_requests: requests that are worked on at once.
        max_batched_tokens: tokens of one step.
        draft_model: model that guesses tokens.
        adapters: models with adapters.
        adapter_names: what requests call them.
        role: "prefill" or "decode"; "both" and empty are the same.
        adapter_rank: largest rank of an adapter; 0: it is run without adapters.
        adapter_count: adapters that a batch may use at once, and that the engine keeps.
        offload_bytes: host memory for KV blocks.
        form: how replicas run it, where they are told.
        has_both_forms: replicas start eager, and give their place to compiled ones.
        is_split_open: into how many ranks its layers are split is left to placement.
        stage_count: groups of layers that are asked for; 0: nobody says.
    """

    engine: str = ""
    dtype: str = ""
    kv_cache_dtype: str = ""
    rank_count: int = 1
    max_context_tokens: int = 0
    kv_cache_bytes: int = 0
    max_running_requests: int = 0
    max_batched_tokens: int = 0
    draft_model: str = ""
    adapters: tuple[str, ...] = ()
    adapter_names: tuple[str, ...] = ()
    role: str = ""
    adapter_rank: int = 0
    adapter_count: int = 0
    offload_bytes: int = 0
    form: Form = Form.UNKNOWN
    has_both_forms: bool = False
    is_split_open: bool = False
    stage_count: int = 0

    @property
    def named_adapters(self) -> tuple[tuple[str, str], ...]:
        """What requests call each adapter, and its model."""
        return tuple(zip(self.adapter_names, self.adapters, strict=True))

    @property
    def models(self) -> tuple[str, ...]:
        """Other models whose bytes a replica needs."""
        return tuple(name for name in (self.draft_model, *self.adapters) if name)

    def weights_bytes(self, stored_bytes: int, stored_dtype: str) -> int:
        """Bytes of weights of this type as they are loaded."""
        stored, forced = _ELEMENT_BYTES.get(stored_dtype), _ELEMENT_BYTES.get(self.dtype)
        # Quantised weights stay as they are, whatever the activations' type.
        return stored_bytes if stored is None or forced is None else stored_bytes * forced // stored

    def element_bytes(self, stored_dtype: str) -> int:
        """Bytes of one value of activations, and of adapters."""
        return _ELEMENT_BYTES.get(self.dtype) or _ELEMENT_BYTES.get(stored_dtype, 2)

    def kv_bytes_per_token(self, stored_bytes: int, stored_dtype: str) -> int:
        """Bytes of KV cache of one token, from those at the weights' type."""
        stored = _ELEMENT_BYTES.get(stored_dtype, 2)
        if self.kv_cache_dtype.startswith(_SMALL_ELEMENTS):
            return -(-stored_bytes // stored)
        forced = _ELEMENT_BYTES.get(self.kv_cache_dtype) or _ELEMENT_BYTES.get(self.dtype) or stored
        return stored_bytes * forced // stored


@lru_cache(maxsize=4096)
def needs_of(settings: str) -> EngineNeeds:
    """Reads a settings document; an empty one says nothing."""
    values: Mapping[str, Any] = json.loads(settings) if settings else {}
    # Settings that name no adapter yet say that there may be some.
    lora = values.get("lora")
    adapters = [adapter for adapter in (lora or {}).get("adapters", ()) if adapter.get("name")]
    tensor, stages = int(values.get("tensor_parallel_size", 1)), int(values.get("pipeline_parallel_size", 0))
    return EngineNeeds(
        engine=values.get("engine", ""),
        dtype=values.get("dtype", ""),
        kv_cache_dtype=values.get("kv_cache_dtype", ""),
        rank_count=max(1, tensor) * max(1, stages),
        is_split_open=not tensor,
        stage_count=stages,
        max_context_tokens=int(values.get("max_context_tokens", 0)),
        # JSON has no integers of 64 bits: the contract's form writes them as text.
        kv_cache_bytes=int(values.get("kv_cache_bytes", 0)),
        max_running_requests=int(values.get("max_running_requests", 0)),
        max_batched_tokens=int(values.get("max_batched_tokens", 0)),
        draft_model=values.get("speculative_decoding", {}).get("draft_model", ""),
        adapters=tuple(adapter.get("model", "") for adapter in adapters),
        form=_FORMS.get(values.get("compilation", ""), Form.UNKNOWN),
        has_both_forms=values.get("compilation") == _BOTH_FORMS,
        adapter_rank=(lora.get("max_rank") or _ADAPTER_RANK) if lora is not None else 0,
        adapter_count=(lora.get("max_active_count") or 1) if lora is not None else 0,
        offload_bytes=int(values.get("kv_offload", {}).get("host_bytes", 0)),
        role=values.get("role", "").removeprefix("DISAGGREGATION_ROLE_").lower(),
        adapter_names=tuple(adapter["name"] for adapter in adapters),
    )


@lru_cache(maxsize=4096)
def with_form(settings: str, form: Form) -> str:
    """The settings with which one form is ordered, of a model that is to have both; of another one, its settings."""
    if not settings or not needs_of(settings).has_both_forms:
        return settings
    return json.dumps(json.loads(settings) | {"compilation": f"COMPILATION_MODE_{form.name}"}, sort_keys=True)


@lru_cache(maxsize=4096)
def with_split(settings: str, tensor: int, stages: int) -> str:
    """The settings with which so many ranks and stages are ordered, where they leave that open; else the settings."""
    if not settings or not needs_of(settings).is_split_open:
        return settings
    split = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    return json.dumps(json.loads(settings) | split, sort_keys=True)


def with_revisions(settings: str, revisions: Mapping[str, str]) -> str:
    """Fills in which revision each model that the settings name has now: name → digest."""
    if not revisions:
        return settings
    values = json.loads(settings)
    speculation = values.get("speculative_decoding", {})
    if speculation.get("draft_model") in revisions:
        speculation["draft_revision"] = revisions[speculation["draft_model"]]
    for adapter in values.get("lora", {}).get("adapters", ()):
        if adapter.get("model") in revisions:
            adapter["revision"] = revisions[adapter["model"]]
    return json.dumps(values, sort_keys=True)
