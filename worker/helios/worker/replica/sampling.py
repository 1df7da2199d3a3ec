"""Ranges of sampling parameters, checked before a request costs anything. Pure.

The engine checks too, but later and in its own words; here each refusal names the field of the contract.
"""

import math
from collections.abc import Callable
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.engine import Sampling

# As many answers as one step of the engine can hold; each is a request of its own to it.
_ANSWERS_LIMIT: Final = 128
# vLLM's own bound of alternatives for one token.
_LOGPROBS_LIMIT: Final = 20
_STOP_LIMIT: Final = 64
_SEED_LIMIT: Final = 1 << 63

_RANGES: Final[tuple[tuple[str, str, Callable[[float], bool]], ...]] = (
    ("temperature", "at least 0", lambda value: value >= 0),
    ("top_p", "in (0, 1]", lambda value: 0 < value <= 1),
    ("top_k", "0 or -1 for all, else at least 1", lambda value: value >= -1),
    ("min_p", "in [0, 1]", lambda value: 0 <= value <= 1),
    ("presence_penalty", "in [-2, 2]", lambda value: -2 <= value <= 2),
    ("frequency_penalty", "in [-2, 2]", lambda value: -2 <= value <= 2),
    ("repetition_penalty", "above 0", lambda value: value > 0),
    ("seed", "a signed 64-bit number", lambda value: -_SEED_LIMIT <= value < _SEED_LIMIT),
    ("max_tokens", "at least 1", lambda value: value >= 1),
    ("min_tokens", "at least 0", lambda value: value >= 0),
    ("logprobs", f"at most {_LOGPROBS_LIMIT}", lambda value: 0 <= value <= _LOGPROBS_LIMIT),
    ("n", f"in [1, {_ANSWERS_LIMIT}]", lambda value: 1 <= value <= _ANSWERS_LIMIT),
)


def check_sampling(sampling: Sampling, *, vocabulary_size: int, prefix: str = "sampling.") -> None:
    """Raises InvalidRequest that names the first field out of its range (``param`` in the metadata).

    ``prefix`` is what leads to the fields in the caller's message.
    """
    problem = _first_problem(sampling, vocabulary_size)
    if problem is not None:
        field, text = problem
        raise InvalidRequest(f"{prefix}{field}: {text}", metadata={"param": f"{prefix}{field}"})


def _first_problem(sampling: Sampling, vocabulary_size: int) -> tuple[str, str] | None:
    for name, rule, is_allowed in _RANGES:
        value = getattr(sampling, name)
        if value is not None and not (math.isfinite(value) and is_allowed(value)):
            return name, f"{value} is not {rule}"
    if sampling.min_tokens and sampling.max_tokens and sampling.min_tokens > sampling.max_tokens:
        return "min_tokens", f"{sampling.min_tokens} is above max_tokens ({sampling.max_tokens})"
    if len(sampling.stop) > _STOP_LIMIT or len(sampling.stop_token_ids) > _STOP_LIMIT:
        return "stop", f"at most {_STOP_LIMIT}"
    if "" in sampling.stop:
        return "stop", "an empty text can't end an answer"
    for token_id in sampling.stop_token_ids:
        if not 0 <= token_id < vocabulary_size:
            return "stop_token_ids", f"{token_id} is not in the model's vocabulary"
    if sampling.n > 1 and sampling.temperature == 0:
        return "n", "greedy answers (temperature 0) are all the same: ask for 1"
    return None
