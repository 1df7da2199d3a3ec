"""How a model's engine is set: the worker's own words for the contract's EngineSettings, free of wire types.

None, an empty text and an empty tuple mean "not set": what is not set comes from the replica's spec (the profile's
sizes), then from the engine's defaults. Nothing is checked here; an engine checks against its own parser when it
builds its arguments.
"""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

_Part = TypeVar("_Part")


class Compilation(enum.StrEnum):
    """Whether a replica's model is compiled. DEFAULT: on a GPU; on a CPU that takes a minute and a half."""

    DEFAULT = "default"
    EAGER = "eager"
    COMPILED = "compiled"


class Task(enum.StrEnum):
    """What a model makes. DEFAULT: as its architecture says."""

    DEFAULT = "default"
    GENERATE = "generate"
    EMBED = "embed"


class Role(enum.StrEnum):
    """Which part of a request a replica does: prompts, answers, or both."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SpeculativeDecoding:
    """Guessing several tokens at once and verifying them in one step.

    Attributes:
        method: As vLLM names it: "ngram", "draft_model", "eagle", "eagle3", "mtp".
        draft_model: Name of the model that guesses, for the methods that need one.
        draft_revision: Digest of that model's revision.
        token_count: How many tokens are guessed at once.
        prompt_lookup_max: For "ngram": the longest piece of the prompt that is looked up; 0: the engine's default.
    """

    method: str
    draft_model: str = ""
    draft_revision: str = ""
    token_count: int = 0
    prompt_lookup_max: int = 0


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter that requests address by ``name``; ``model`` is its name in the registry, ``revision`` its digest."""

    name: str
    model: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A model's adapters. ``max_active_count`` is how many a batch may use at once."""

    adapters: tuple[LoraAdapter, ...] = ()
    max_rank: int = 16
    max_active_count: int = 1


@dataclass(frozen=True, slots=True)
class KvOffload:
    """Room for KV blocks that fall out of the device's memory; 0: none. Disk lies below host memory."""

    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a model's engine is set; names and meanings are the contract's (helios.api.engine.v1.EngineSettings).

    Engine and options, KV cache and context of the contract are fields of the ReplicaSpec: others have a word in them.

    Attributes:
        dtype: Type of weights and activations; empty: as the checkpoint says.
        quantization: How the checkpoint is quantised; empty: as config.json says.
        tensor_parallel_size: How many devices each layer is split over.
        pipeline_parallel_size: How many groups of layers there are, each on devices of its own.
        kv_cache_dtype: Type of the KV cache; empty: the activations'.
        prefix_caching: Keep KV blocks of prompts for requests that begin alike.
        chunked_prefill: Cut long prompts into pieces, so that running answers go on.
        max_running_requests: How many requests the engine works on at once.
        max_batched_tokens: How many tokens one step may hold.
        speculative_decoding: How tokens are guessed; None: they are not.
        lora: Adapters; None: none.
        kv_offload: Where KV blocks go that the device has no room for; None: nowhere.
        tool_call_parser: Parser of tool calls; empty: none.
        reasoning_parser: Parser of reasoning; empty: none.
        structured_output_backend: Backend of structured output; empty: the engine chooses.
        attention_backend: Backend of attention; empty: the engine chooses.
        compilation: Whether the model is compiled.
        cuda_graph_sizes: Batch sizes that CUDA graphs are captured for, ascending; empty: the engine chooses.
        task: What the model makes.
        role: Which part of a request the replica does.
        chat_template: Jinja template in place of the model's own; empty: the model's own.
    """

    dtype: str = ""
    quantization: str = ""
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    kv_cache_dtype: str = ""
    prefix_caching: bool | None = None
    chunked_prefill: bool | None = None
    max_running_requests: int | None = None
    max_batched_tokens: int | None = None
    speculative_decoding: SpeculativeDecoding | None = None
    lora: LoraSettings | None = None
    kv_offload: KvOffload | None = None
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    structured_output_backend: str = ""
    attention_backend: str = ""
    compilation: Compilation = Compilation.DEFAULT
    cuda_graph_sizes: tuple[int, ...] = ()
    task: Task = Task.DEFAULT
    role: Role = Role.BOTH
    chat_template: str = ""

    @property
    def rank_count(self) -> int:
        """How many devices, and engine processes that compute, the replica has."""
        return (self.tensor_parallel_size or 1) * (self.pipeline_parallel_size or 1)

    @property
    def draft_revision(self) -> str:
        """Revision of the model that guesses tokens; empty: there is none."""
        return self.speculative_decoding.draft_revision if self.speculative_decoding is not None else ""

    @property
    def revisions(self) -> tuple[str, ...]:
        """Revisions of other models that a replica needs on its node: adapters, and a draft model."""
        adapters = self.lora.adapters if self.lora is not None else ()
        return tuple(dict.fromkeys(name for name in (self.draft_revision, *(one.revision for one in adapters)) if name))

    def to_document(self) -> dict[str, Any]:
        """Returns the settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Reads what ``to_document`` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        values = dict(document)
        values["compilation"] = Compilation(values["compilation"])
        values["task"] = Task(values["task"])
        values["role"] = Role(values["role"])
        values["cuda_graph_sizes"] = tuple(values["cuda_graph_sizes"])
        values["speculative_decoding"] = _read(SpeculativeDecoding, values["speculative_decoding"])
        values["kv_offload"] = _read(KvOffload, values["kv_offload"])
        if values["lora"] is not None:
            adapters = tuple(LoraAdapter(**adapter) for adapter in values["lora"]["adapters"])
            values["lora"] = LoraSettings(**values["lora"] | {"adapters": adapters})
        return cls(**values)


def _read(kind: type[_Part], document: Mapping[str, Any] | None) -> _Part | None:
    return None if document is None else kind(**document)
