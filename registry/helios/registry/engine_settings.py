"""A model's engine settings: kept as the contract's JSON, and looked at only for their shape.

The registry knows no engine. What it can say is whether a number lies in a range that any engine has, whether a name is
one, and whether the models that the settings lean on exist; all mistakes are told at once. Whether the engine can be
run with them is for the worker to say, which asks the engine itself.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from helios.mesh.errors import InvalidRequest
from helios.registry.names import check_name

INVALID_ENGINE_SETTINGS: Final = "INVALID_ENGINE_SETTINGS"
ENGINES: Final = ("vllm", "transformers", "simulated", "custom")
DTYPES: Final = ("auto", "float16", "bfloat16", "float32")

# Names of quantisations, parsers and backends; the engine knows which there are.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_NAMES: Final = (
    "quantization",
    "kv_cache_dtype",
    "tool_call_parser",
    "reasoning_parser",
    "structured_output_backend",
    "attention_backend",
)
# A typing error should not ask for a thousand devices or a petabyte; the bounds are far above what there is.
_DEVICES: Final = (1, 1 << 10)
_TOKENS: Final = (1, 1 << 30)
_BYTES: Final = (0, 1 << 50)
_RANGES: Final[Mapping[str, tuple[int, int]]] = {
    # 0: as many as it takes, where it is placed.
    "tensor_parallel_size": (0, _DEVICES[1]),
    "pipeline_parallel_size": _DEVICES,
    "max_context_tokens": _TOKENS,
    # Below a mebibyte there is not one block of any model.
    "kv_cache_bytes": (1 << 20, 1 << 50),
    "max_running_requests": (1, 1 << 16),
    "max_batched_tokens": _TOKENS,
    "speculative_decoding.token_count": (1, 64),
    "speculative_decoding.prompt_lookup_max": (0, 64),
    "lora.max_rank": (0, 1 << 12),
    "lora.max_active_count": (0, 1 << 10),
    "kv_offload.host_bytes": _BYTES,
    "kv_offload.disk_bytes": _BYTES,
}
# Longer than any model's own template (the longest have 20 KiB); it is sent with the model to every watcher.
_TEMPLATE_CHARS: Final = 128 << 10
_OPTION_CHARS: Final = 4 << 10
_MAX_OPTIONS: Final = 64
_MAX_ADAPTERS: Final = 64
_MAX_GRAPH_SIZES: Final = 256


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings in their canonical form: two that say the same are equal.

    Attributes:
        document: JSON of the contract's EngineSettings with the contract's field names, keys sorted.
    """

    document: str = "{}"

    @property
    def required_models(self) -> dict[str, str]:
        """Models that the settings lean on: field → name."""
        values = json.loads(self.document)
        found = {}
        if draft := values.get("speculative_decoding", {}).get("draft_model"):
            found["speculative_decoding.draft_model"] = draft
        for index, adapter in enumerate(values.get("lora", {}).get("adapters", ())):
            found[f"lora.adapters[{index}].model"] = adapter.get("model", "")
        return found

    @property
    def adapter_names(self) -> dict[str, str]:
        """Names that requests use for adapters: field → name."""
        adapters = json.loads(self.document).get("lora", {}).get("adapters", ())
        return {f"lora.adapters[{index}].name": adapter.get("name", "") for index, adapter in enumerate(adapters)}

    def check(self) -> "EngineSettings":
        """Returns itself. Raises InvalidRequest (INVALID_ENGINE_SETTINGS) that names every field that can't be."""
        refuse(dict(_problems(json.loads(self.document))))
        return self


NO_SETTINGS: Final = EngineSettings()


def refuse(problems: Mapping[str, str]) -> None:
    """Raises InvalidRequest (INVALID_ENGINE_SETTINGS) where there is a problem: field → what is wrong with it."""
    if problems:
        raise InvalidRequest(
            "engine settings: " + "; ".join(f"{field}: {message}" for field, message in problems.items()),
            reason=INVALID_ENGINE_SETTINGS,
            metadata={"param": next(iter(problems)), "fields": ",".join(problems)},
        )


def _problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    engine = values.get("engine", "")
    if engine and engine.partition(":")[0] not in ENGINES:
        yield "engine", f"{engine!r} is not one of {', '.join(ENGINES)}"
    if values.get("dtype", "auto") not in DTYPES:
        yield "dtype", f"{values['dtype']!r} is not one of {', '.join(DTYPES)}"
    for field in _NAMES:
        if field in values and not _NAME.fullmatch(values[field]):
            yield field, f"{values[field]!r} is not a name"
    for field, (least, most) in _RANGES.items():
        number = _find(values, field)
        if number is not None and not least <= int(number) <= most:
            yield field, f"{number} does not lie between {least} and {most}"
    yield from _list_problems(values)
    if "speculative_decoding" in values:
        yield from _speculation_problems(values["speculative_decoding"])
    yield from _adapter_problems(values.get("lora", {}).get("adapters", ()))


def _list_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes = values.get("cuda_graph_sizes", [])
    if sizes != sorted(set(sizes)) or 0 in sizes or len(sizes) > _MAX_GRAPH_SIZES:
        yield "cuda_graph_sizes", f"must be ascending, from 1, and at most {_MAX_GRAPH_SIZES} of them"
    if len(values.get("chat_template", "")) > _TEMPLATE_CHARS:
        yield "chat_template", f"has more than {_TEMPLATE_CHARS} characters"
    options = values.get("options", {})
    if len(options) > _MAX_OPTIONS:
        yield "options", f"there are more than {_MAX_OPTIONS}"
    for name, value in options.items():
        if not _NAME.fullmatch(name) or len(value) > _OPTION_CHARS:
            yield "options", f"{name[:64]!r} is not a name, or its value has more than {_OPTION_CHARS} characters"


def _speculation_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not _NAME.fullmatch(values.get("method", "")):
        yield "speculative_decoding.method", "is missing; such as ngram, draft_model or eagle"
    if "token_count" not in values:
        yield "speculative_decoding.token_count", "is missing: how many tokens are guessed at once"
    if values.get("draft_revision"):
        yield "speculative_decoding.draft_revision", "is filled in when a replica is started; leave it out"


def _adapter_problems(adapters: Any) -> Iterator[tuple[str, str]]:
    if len(adapters) > _MAX_ADAPTERS:
        yield "lora.adapters", f"there are more than {_MAX_ADAPTERS}"
    names: set[str] = set()
    for index, adapter in enumerate(adapters):
        field = f"lora.adapters[{index}]"
        name = adapter.get("name", "")
        try:
            check_name(name)
        except InvalidRequest as error:
            yield f"{field}.name", error.message
        if name in names:
            yield f"{field}.name", f"{name!r} is there twice"
        names.add(name)
        if not adapter.get("model"):
            yield f"{field}.model", "is missing: the adapter's name in the registry"
        if adapter.get("revision"):
            yield f"{field}.revision", "is filled in when a replica is started; leave it out"


def _find(values: Mapping[str, Any], field: str) -> Any:
    part, _, rest = field.partition(".")
    value = values.get(part)
    return _find(value, rest) if rest and value is not None else value
