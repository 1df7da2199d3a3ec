"""What vLLM would refuse of a model's settings, asked of vLLM itself before anything is started.

Each setting goes by itself through vLLM's own argument parser, registries and configuration classes, so that every
mistake is found at once and is told by Helios's name of the setting. What depends on the model (heads that do not
divide, a context beyond its limit) vLLM finds when it makes its configuration; ``failures`` puts that into words.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NoReturn

import jinja2
from pydantic import ValidationError

from helios.worker.engines.vllm import compat_config as vllm
from helios.worker.replica.settings import EngineSettings, KvOffload, LoraSettings, Role, SpeculativeDecoding

# Long enough to see the near misses, short enough for an error message; vLLM has 37 tool parsers.
_SHOWN_NAMES: Final = 60

# Helios's name → vLLM's flag, for what vLLM's parser checks by itself.
_FLAGS: Final[Mapping[str, str]] = {
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_running_requests": "--max-num-seqs",
    "max_batched_tokens": "--max-num-batched-tokens",
    "cuda_graph_sizes": "--cudagraph-capture-sizes",
}
# Names that vLLM's parser takes as they are, and looks up later.
_NAMES: Final[Mapping[str, Callable[[], Sequence[str]]]] = {
    "quantization": vllm.quantization_methods,
    "tool_call_parser": vllm.tool_parsers,
    "reasoning_parser": vllm.reasoning_parsers,
    "attention_backend": vllm.attention_backends,
    "structured_output_backend": vllm.structured_output_backends,
}
# What vLLM finds out when the engine has started.
_GPU_METHODS: Final = frozenset({"ngram_gpu"})
# Methods that need no model of their own.
_WITHOUT_DRAFT: Final = frozenset({"ngram", "ngram_gpu", "suffix", "mtp"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One setting that can't be: its name in Helios, and what is wrong, with what to do where that is known."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def find_problems(settings: EngineSettings) -> list[Problem]:
    """Returns everything that vLLM refuses of ``settings`` whatever the model is; in the order of the settings.

    Costs nothing for settings that are not set, and 0.02 s for the first that is: vLLM's parser is made.
    """
    problems = [*_by_flag(settings), *_by_name(settings), *_by_value(settings)]
    if settings.speculative_decoding is not None:
        problems += _in_speculation(settings.speculative_decoding)
    if settings.lora is not None:
        problems += _in_lora(settings.lora)
    problems += _in_role(settings)
    if settings.kv_offload is not None:
        problems += _in_offload(settings.kv_offload)
    return problems


class _RefusedError(Exception):
    """What vLLM's parser says where it would end the process."""


@lru_cache(maxsize=1)
def _parser() -> Any:
    class Parser(vllm.FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _RefusedError(message)

    return vllm.AsyncEngineArgs.add_cli_args(Parser(add_help=False))


def _parse(flag: str, values: Sequence[str]) -> str | None:
    """Returns what vLLM's parser says against a flag, None where it takes it."""
    try:
        # With `=`, so that a value that looks like a flag is a value.
        _parser().parse_args([f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values])
    except _RefusedError as refusal:
        return str(refusal).partition(": ")[2] or str(refusal)
    return None


def _by_flag(settings: EngineSettings) -> Iterator[Problem]:
    for field, flag in _FLAGS.items():
        value = getattr(settings, field)
        if value in (None, "", ()):
            continue
        message = _parse(flag, [str(part) for part in (value if isinstance(value, tuple) else (value,))])
        if message is not None:
            yield Problem(field, message)


def _by_name(settings: EngineSettings) -> Iterator[Problem]:
    for field, names in _NAMES.items():
        value = getattr(settings, field)
        if value and value not in names():
            yield Problem(field, _unknown(value, names()))


def _by_value(settings: EngineSettings) -> Iterator[Problem]:
    for field in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_running_requests",
        "max_batched_tokens",
    ):
        if getattr(settings, field) == 0:
            yield Problem(field, "must be at least 1; unset it for the default")
    sizes = settings.cuda_graph_sizes
    if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        yield Problem("cuda_graph_sizes", f"must be ascending batch sizes from 1, got {list(sizes)}")
    if settings.chat_template:
        try:
            vllm.compile_chat_template(settings.chat_template)
        except jinja2.TemplateError as error:
            yield Problem("chat_template", f"is not a Jinja template: {error}")
    tokens, requests = settings.max_batched_tokens, settings.max_running_requests
    if tokens and requests and tokens < requests:
        yield Problem("max_batched_tokens", f"{tokens} is less than max_running_requests ({requests}): raise it")


def _in_speculation(speculative: SpeculativeDecoding) -> Iterator[Problem]:
    methods = vllm.speculative_methods()
    if speculative.method not in methods:
        yield Problem("speculative_decoding.method", _unknown(speculative.method, methods))
    if speculative.token_count < 1:
        yield Problem("speculative_decoding.token_count", "must be at least 1: how many tokens are guessed at once")
    if vllm.is_cpu() and speculative.method in _GPU_METHODS:
        yield Problem("speculative_decoding.method", f"{speculative.method} runs on GPUs only; on a CPU: ngram")
    is_alone = speculative.method in _WITHOUT_DRAFT
    if is_alone and speculative.draft_model:
        yield Problem("speculative_decoding.draft_model", f"{speculative.method} guesses without a model: unset it")
    if not is_alone and speculative.method in methods and not speculative.draft_model:
        yield Problem("speculative_decoding.draft_model", f"{speculative.method} needs a model in the registry")
    if speculative.method == "ngram" and not speculative.prompt_lookup_max:
        yield Problem("speculative_decoding.prompt_lookup_max", "ngram needs the longest piece to look up, such as 4")


def _in_lora(lora: LoraSettings) -> Iterator[Problem]:
    for field, flag, value in (
        ("lora.max_rank", "--max-lora-rank", lora.max_rank),
        ("lora.max_active_count", "--max-loras", lora.max_active_count),
    ):
        message = _parse(flag, [str(value)])
        if message is not None:
            yield Problem(field, message)
    try:
        vllm.LoRAConfig(max_loras=lora.max_active_count)
    except ValidationError as error:
        yield Problem("lora.max_active_count", error.errors()[0]["msg"])


def _in_offload(offload: KvOffload) -> Iterator[Problem]:
    if offload.disk_bytes and not offload.host_bytes:
        yield Problem("kv_offload.host_bytes", "blocks go to disk through host memory: set it too")
    if vllm.is_cpu() and (offload.host_bytes or offload.disk_bytes):
        yield Problem("kv_offload", "on a CPU the KV cache is in host memory already: unset it, raise kv_cache_bytes")


def _in_role(settings: EngineSettings) -> Iterator[Problem]:
    if settings.role is Role.BOTH:
        return
    if settings.kv_offload is not None:
        yield Problem("role", "a replica that does one part of a request keeps no blocks beside it: unset kv_offload")
    if vllm.is_cpu() and settings.rank_count > 1:
        yield Problem("role", "on a CPU KV caches travel through files, which several ranks can't share")
    if vllm.is_cpu() and settings.role is Role.PREFILL and settings.chunked_prefill:
        yield Problem("chunked_prefill", "a prompt that travels through files is computed in one step")


def _unknown(value: str, names: Sequence[str]) -> str:
    shown = ", ".join(sorted(map(str, names))[:_SHOWN_NAMES])
    return f"{value!r} is not known to vLLM; there are: {shown}"
