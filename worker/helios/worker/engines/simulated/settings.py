"""Options of the simulated engine."""

from pydantic import Field

from helios.worker.engines.options import Options


class SimulatedOptions(Options):
    """What can be set with ``options`` of a model whose engine is "simulated". Ratios are from 0 to 1."""

    seed: int = 0
    """All chance comes from it: the same seed and the same order of requests give the same failures."""
    start_seconds: float = Field(default=0.0, ge=0)
    """How long a start loads."""
    compile_seconds: float = Field(default=0.0, ge=0)
    """How much longer a start takes where the model's ``compilation`` asks for a compiled replica."""
    prefill_seconds_per_token: float = Field(default=0.0001, ge=0)
    """What a step takes for each token of a prompt in it. 0.1 ms: a small model on two cores."""
    decode_seconds_per_token: float = Field(default=0.005, ge=0)
    """What a step takes that makes tokens, one for each answer in it."""
    decode_seconds_per_sequence: float = Field(default=0.0, ge=0)
    """What such a step takes on top for each of its answers: how a batch slows everybody down."""
    jitter_ratio: float = Field(default=0.0, ge=0, lt=1)
    """By how much a step may be shorter or longer."""
    max_batch: int = Field(default=0, ge=0)
    """Answers that are worked on at once; more wait. 0: the replica's ``max_running_requests``."""
    max_batched_tokens: int = Field(default=1024, ge=1)
    """Tokens of one step; longer prompts take several (chunked prefill)."""
    kv_bytes_per_token: int = Field(default=23_040, ge=1)
    """KV cache of a token; the replica's ``kv_cache_bytes`` holds that many. 23,040: SmolLM2-135M in bf16."""
    kv_block_tokens: int = Field(default=16, ge=1)
    """Tokens of one block."""
    context_tokens: int = Field(default=4096, ge=2)
    """Longest prompt plus answer where the replica's order names none; cut to what the KV cache holds."""
    answer_tokens: int = Field(default=16, ge=1)
    """Length of an answer whose request names none: the simulated model then says that it is done."""
    start_failure_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of starts that fail. Drawn from the seed and the replica's id; 1: every start."""
    compile_failure_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of starts of compiled replicas that fail when they compile."""
    death_after_requests: int = Field(default=0, ge=0)
    """The engine dies in the middle of this request, counted from 1. 0: never."""
    stall_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of requests at one of whose tokens the whole engine stands still for ``stall_seconds``."""
    stall_seconds: float = Field(default=5.0, ge=0)
    """How long such a stop is."""
    can_sleep: bool = False
    """Whether it can sleep, as an engine on a GPU can."""
    sleep_seconds: float = Field(default=0.0, ge=0)
    """How long it takes to fall asleep, and to wake."""
    left_bytes: int = Field(default=0, ge=0)
    """What it says that it leaves on its device while it sleeps. 0: not measured."""
    wake_failure_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of wakes that fail."""
    wrong_weights_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of wakes after which it answers with other words: wrong weights."""
    error_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of requests that fail at one of their tokens."""
