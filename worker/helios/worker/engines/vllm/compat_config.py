"""What Helios leans on in vLLM's configuration: its parser, its lists of names, its configuration classes.

The other half of ``compat``, which is about running; pinned and tested with it.
"""

from typing import get_args

from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.config import KVTransferConfig, LoRAConfig, SpeculativeConfig, StructuredOutputsConfig
from vllm.config.lora import MaxLoRARanks
from vllm.config.speculative import SpeculativeMethod
from vllm.config.structured_outputs import StructuredOutputsBackend
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

__all__ = [
    "AsyncEngineArgs",
    "FlexibleArgumentParser",
    "KVTransferConfig",
    "LoRAConfig",
    "SpeculativeConfig",
    "StructuredOutputsConfig",
    "attention_backends",
    "compile_chat_template",
    "is_cpu",
    "lora_rank_for",
    "quantization_methods",
    "reasoning_parsers",
    "speculative_methods",
    "structured_output_backends",
    "tool_parsers",
]


def is_cpu() -> bool:
    """Returns whether models run on a CPU here."""
    return bool(current_platform.is_cpu())


def quantization_methods() -> list[str]:
    """Returns vLLM's names of quantisations."""
    return list(QUANTIZATION_METHODS)


def tool_parsers() -> list[str]:
    """Returns vLLM's names of parsers of tool calls."""
    return list(ToolParserManager.list_registered())


def reasoning_parsers() -> list[str]:
    """Returns vLLM's names of parsers of reasoning."""
    return list(ReasoningParserManager.list_registered())


def attention_backends() -> list[str]:
    """Returns vLLM's names of attention backends."""
    return ["auto", *AttentionBackendEnum.__members__]


def structured_output_backends() -> list[str]:
    """Returns vLLM's names of backends of structured output."""
    return list(get_args(StructuredOutputsBackend))


def lora_rank_for(rank: int) -> int:
    """Returns the smallest bound of ranks that vLLM takes and that an adapter fits; the largest where none fits."""
    bounds: tuple[int, ...] = get_args(MaxLoRARanks)
    return next((bound for bound in sorted(bounds) if bound >= rank), max(bounds))


def speculative_methods() -> list[str]:
    """Returns vLLM's names of methods of speculative decoding."""
    return _flat(SpeculativeMethod)


def compile_chat_template(template: str) -> None:
    """Compiles a chat template as it will be. Raises jinja2.TemplateError."""
    _compile_jinja_template(template)


def _flat(literal: object) -> list[str]:
    """Returns the values of a Literal that has Literals in it."""
    names: list[str] = []
    for value in get_args(literal):
        names += [value] if isinstance(value, str) else _flat(value)
    return names
