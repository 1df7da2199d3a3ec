"""Why a start failed, in words that help: exceptions of vLLM, torch and transformers by reason.

They come as ValueError, RuntimeError or OSError with a text for people, so the texts are what there is to go by; the
table is small, and what it does not know is passed on as it is. Needs no vLLM: it runs in every process of a replica.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from helios.mesh.errors import HeliosError, InvalidRequest, PreconditionFailed

INVALID_ENGINE_SETTINGS: Final = "INVALID_ENGINE_SETTINGS"
UNSUPPORTED_ARCHITECTURE: Final = "UNSUPPORTED_ARCHITECTURE"
BAD_CHECKPOINT: Final = "BAD_CHECKPOINT"
OUT_OF_MEMORY: Final = "OUT_OF_MEMORY"
ENGINE_START_FAILED: Final = "ENGINE_START_FAILED"

# What vLLM and its libraries raise while a model is being made ready. KeyError and AssertionError: weights whose names
# or shapes are not the architecture's.
START_ERRORS: Final = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    ImportError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
)

# First match wins; each is looked for in "<class>: <text>" of the exception and of all that it came from.
_REASONS: Final[Mapping[str, tuple[str, ...]]] = {
    UNSUPPORTED_ARCHITECTURE: (
        r"architectures? .{0,200}(not supported|failed to be inspected)",
        r"does not recognize this architecture|Unrecognized model in|No model architectures are specified",
        r"model type .{0,80}not recognize|has no vLLM implementation",
    ),
    OUT_OF_MEMORY: (
        r"OutOfMemoryError|MemoryError|out of memory|([Cc]annot|can't) allocate memory",
        r"No available memory for the cache blocks|Free memory on device|Available memory on node",
    ),
    BAD_CHECKPOINT: (
        r"SafetensorError|HeaderTooLarge|InvalidHeader|MetadataIncompleteBuffer|JSONDecodeError|not a valid JSON",
        r"There is no module or parameter|weights were not initialized|Attempted to load weight|size mismatch",
        r"[Cc]annot find any model weights|shape mismatch|Can't load (tokenizer|the configuration)",
        r"KeyError: '[\w.]*(weight|bias|layers?\.)|safetensors|Invalid repository ID or local directory",
    ),
    INVALID_ENGINE_SETTINGS: (
        r"max seq len|KV cache|must be divisible by|max_model_len|max_num_|dtype|[Qq]uantization",
        r"Cannot find the config file for|CompressedTensorsConfig|reasoning parser|tool parser|structured output",
        r"tensor.parallel|[Pp]ipeline.[Pp]arallel|attention.backend|[Ss]peculative|suffix decoding",
        r"[Ll]o[Rr][Aa]|[Cc]hunked",
    ),
}
# vLLM's names of what Helios's users set, as they stand in vLLM's texts.
_NAMES: Final = (
    (r"`?--?max[-_]model[-_]len`?|`?\bmax_model_len\b`?", "max_context_tokens"),
    (r"`?--max-num-batched-tokens`?|`?\bmax_num_batched_tokens\b`?", "max_batched_tokens"),
    (r"`?--max-num-seqs`?|`?\bmax_num_seqs\b`?", "max_running_requests"),
    (r"`?--kv-cache-memory-bytes`?|`?\bkv_cache_memory_bytes\b`?|`?\bgpu_memory_utilization\b`?", "kv_cache_bytes"),
    (r"\btensor parallel size\b", "tensor_parallel_size"),
    (r"\bpipeline parallel size\b", "pipeline_parallel_size"),
    (r"\bnum_speculative_tokens\b", "speculative_decoding.token_count"),
    (r"\benable_prefix_caching\b", "prefix_caching"),
    (r"\benable_chunked_prefill\b", "chunked_prefill"),
    (r"\bcudagraph_capture_sizes\b", "cuda_graph_sizes"),
    (r"\bmax_lora_rank\b", "lora.max_rank"),
    (r"\bmax_loras\b", "lora.max_active_count"),
)
_HINTS: Final = {
    UNSUPPORTED_ARCHITECTURE: "the engine does not know this kind of model",
    OUT_OF_MEMORY: "the model needs more memory than there is",
    BAD_CHECKPOINT: "the checkpoint can't be loaded",
    INVALID_ENGINE_SETTINGS: "the engine refuses the settings",
    ENGINE_START_FAILED: "the engine did not start",
}
# Long enough for one of vLLM's sentences; with the rest of the line well below the 4 KiB that a pipe takes at once.
_TEXT_LENGTH: Final = 1500
_CHAIN_LENGTH: Final = 8
# Pydantic's and vLLM's notes to developers.
_NOISE: Final = re.compile(
    r"\s*\[type=.*?\]|\s*For further information visit \S+|^\d+ validation errors? for \w+\s*", re.DOTALL
)


def classify(error: BaseException) -> tuple[str, str]:
    """Returns the stable reason of a failed start, and what people are told."""
    if isinstance(error, HeliosError):
        return error.reason, error.message
    links = list(_chain(error))
    texts = [f"{type(link).__name__}: {link}" for link in links]
    for reason, patterns in _REASONS.items():
        pattern = "|".join(patterns)
        for link, text in zip(links, texts, strict=True):
            if re.search(pattern, text, re.DOTALL):
                return reason, _tell(reason, link)
    return ENGINE_START_FAILED, _tell(ENGINE_START_FAILED, links[0])


def start_error(error: BaseException) -> HeliosError:
    """Returns the HeliosError of a failed start."""
    reason, message = classify(error)
    kind = InvalidRequest if reason == INVALID_ENGINE_SETTINGS else PreconditionFailed
    return kind(message, reason=reason)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(_CHAIN_LENGTH):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _tell(reason: str, error: BaseException) -> str:
    text = _NOISE.sub("", str(error)).strip() or "no reason given"
    # Pydantic's prefix of what a validator raised.
    text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    for pattern, name in _NAMES:
        text = re.sub(pattern, name, text)
    return f"{_HINTS[reason]}: {kind}{text}"[:_TEXT_LENGTH]
