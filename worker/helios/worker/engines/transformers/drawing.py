"""Drawing a token from a model's logits, with the processors that transformers' ``generate`` uses, in vLLM's order:
penalties, minimum length, temperature, then what cuts the tail off.
"""

from dataclasses import fields
from typing import Any, Final

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helios.worker.engines.transformers.model import LoadedModel
from helios.worker.replica.engine import Sampling

# Below this vLLM takes the likeliest token.
_GREEDY_TEMPERATURE: Final = 1e-5


class Drawer:
    """Draws the tokens of one answer. With a seed, the same logits give the same tokens."""

    def __init__(self, model: LoadedModel, sampling: Sampling, *, prompt_tokens: int, choice_index: int) -> None:
        values = dict(model.defaults)
        values |= {
            field.name: value for field in fields(sampling) if (value := getattr(sampling, field.name)) is not None
        }
        self._prompt_tokens = prompt_tokens
        self._is_greedy = values.get("temperature", 1.0) < _GREEDY_TEMPERATURE
        self._presence_penalty: float = values.get("presence_penalty") or 0.0
        self._frequency_penalty: float = values.get("frequency_penalty") or 0.0
        self._processors = _processors(values, model, prompt_tokens, is_greedy=self._is_greedy)
        self._chance = torch.Generator(device=model.device)
        if sampling.seed is None:
            self._chance.seed()
        else:
            # Answers of one request differ; each is the same again with the same seed.
            self._chance.manual_seed((sampling.seed + choice_index) % (1 << 63))

    def draw(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Returns a token. ``ids`` [1, prompt and answer so far] int64; ``logits`` [1, vocabulary] float32."""
        scores = self._processors(ids, self._penalized(ids, logits))
        if self._is_greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._chance))

    def _penalized(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not self._presence_penalty and not self._frequency_penalty:
            return logits
        counts = torch.bincount(ids[0, self._prompt_tokens :], minlength=logits.shape[-1])[: logits.shape[-1]]
        return logits - self._frequency_penalty * counts - self._presence_penalty * (counts > 0)


def _processors(values: dict[str, Any], model: LoadedModel, prompt_tokens: int, *, is_greedy: bool) -> Any:
    processors = LogitsProcessorList()
    if (repetition := values.get("repetition_penalty", 1.0)) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition))
    if minimum := values.get("min_tokens"):
        ends = [*model.end_ids, *values["stop_token_ids"]]
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, minimum, ends, device=str(model.device)))
    if is_greedy:
        return processors
    if (temperature := values.get("temperature", 1.0)) != 1.0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if (top_k := values.get("top_k", 0)) > 0:
        processors.append(TopKLogitsWarper(top_k))
    if (top_p := values.get("top_p", 1.0)) < 1.0:
        processors.append(TopPLogitsWarper(float(top_p)))
    if min_p := values.get("min_p", 0.0):
        processors.append(MinPLogitsWarper(float(min_p)))
    return processors
