"""What requests were found to take: tokens a byte of body, and tokens of answers by model and key. Pure.

Exponentially weighted, so that a change of use shows within some ten requests; bounded in memory, the pairs that were
used longest ago go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import sqrt
from typing import Final

# English text in JSON has some four bytes a token.
_TOKENS_PER_BYTE: Final = 0.25
# A model's first answers: a paragraph.
_FIRST_ANSWER_TOKENS: Final = 256.0
_SHARE: Final = 0.1
_MAX_PAIRS: Final = 4096


@dataclass(slots=True)
class _Answers:
    mean: float
    variance: float


class History:
    """Estimates of prompts and answers."""

    def __init__(self) -> None:
        self._tokens_per_byte: OrderedDict[str, float] = OrderedDict()
        self._answers: OrderedDict[tuple[str, str], _Answers] = OrderedDict()

    def prompt_tokens(self, model: str, body_bytes: int) -> int:
        """What a body of this length is likely to hold."""
        return max(1, round(body_bytes * self.tokens_per_byte(model)))

    def tokens_per_byte(self, model: str) -> float:
        """How many tokens a byte of a body is likely to be."""
        return self._tokens_per_byte.get(model, _TOKENS_PER_BYTE)

    def answer_tokens(self, model: str, key: str) -> int:
        """What an answer is likely to take: the mean."""
        answers = self._answers.get((model, key))
        return max(1, round(answers.mean if answers is not None else _FIRST_ANSWER_TOKENS))

    def long_answer_tokens(self, model: str, key: str) -> int:
        """What few answers exceed: the mean and two deviations."""
        answers = self._answers.get((model, key))
        if answers is None:
            return round(_FIRST_ANSWER_TOKENS)
        return max(1, round(answers.mean + 2 * sqrt(answers.variance)))

    def learn(self, model: str, key: str, body_bytes: int, prompt_tokens: int, answer_tokens: int) -> None:
        """Takes in what a request took."""
        if body_bytes and prompt_tokens:
            ratio = prompt_tokens / body_bytes
            known = self._tokens_per_byte.pop(model, ratio)
            self._tokens_per_byte[model] = known + _SHARE * (ratio - known)
        answers = self._answers.pop((model, key), None) or _Answers(float(answer_tokens), 0.0)
        difference = answer_tokens - answers.mean
        answers.mean += _SHARE * difference
        # West's form: the variance of an exponentially weighted mean.
        answers.variance = (1 - _SHARE) * (answers.variance + _SHARE * difference * difference)
        self._answers[model, key] = answers
        for known_pairs in (self._tokens_per_byte, self._answers):
            if len(known_pairs) > _MAX_PAIRS:
                known_pairs.popitem(last=False)
