"""A key's limits on the wire: what bounds an answer, and OpenAI's headers. Pure."""

from collections.abc import Mapping
from typing import Any

from helios.mesh.names import ANSWER_FIELDS, RATE_LIMIT_HEADERS
from helios.proxy.admission.quotas import Standing

# What no model's context holds; a body that asks for more is the replica's to refuse.
_MOST_TOKENS = 1 << 30


def answer_bound(fields: Mapping[str, Any]) -> int:
    """The longest answer, of all choices together, that Envoy lifted from a JSON body; 0 where it does not say.

    ``fields`` is a map of protobuf Values, which answers for a key that it has not with an empty one.
    """
    count = _whole(fields[ANSWER_FIELDS[-1]])
    return min(longest_answer(fields) * max(1, count), _MOST_TOKENS)


def longest_answer(fields: Mapping[str, Any]) -> int:
    """The longest answer of one choice, as `answer_bound` has it of all."""
    largest, newer = (_whole(fields[name]) for name in ANSWER_FIELDS[:-1])
    return newer or largest


def rate_limit_headers(standing: Standing) -> dict[str, str]:
    """The x-ratelimit headers of a key; what it has no limit of has none."""
    values = [
        str(standing.request_limit),
        str(standing.request_remaining),
        duration(standing.request_reset),
        str(standing.token_limit),
        str(standing.token_remaining),
        duration(standing.token_reset),
    ]
    has_limit = [bool(standing.request_limit)] * 3 + [bool(standing.token_limit)] * 3
    return {
        name: value for name, value, is_there in zip(RATE_LIMIT_HEADERS, values, has_limit, strict=True) if is_there
    }


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: "120ms", "1.5s", "6m0s"."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def _whole(value: Any) -> int:
    """A number of at least 1; 0 for anything else."""
    number = value.number_value if value.WhichOneof("kind") == "number_value" else 0.0
    return int(min(number, _MOST_TOKENS)) if number >= 1 else 0
