"""One answer, token by token, on stock model code with its own KV cache. Runs in a thread; knows no event loop."""

from typing import Any, Final

import torch
from transformers import DynamicCache

from helios.worker.engines.endings import AnswerEnd
from helios.worker.engines.transformers.drawing import Drawer
from helios.worker.engines.transformers.model import LoadedModel
from helios.worker.replica.engine import Logprob, Piece, Sampling, TokenLogprobs

# A prompt is computed in parts of this many tokens, so that a cancel need not wait for a long one.
_PREFILL_TOKENS: Final = 256
# Text of the prompt's end that a tokenizer needs to put spaces right at the beginning of an answer.
_CONTEXT_TOKENS: Final = 5
# What a decoder shows for bytes that are not a whole character yet.
_INCOMPLETE: Final = "\ufffd"


class Decoding:
    """One answer under way. Call ``step`` until ``is_over``."""

    def __init__(
        self, model: LoadedModel, prompt_ids: list[int], sampling: Sampling, *, choice_index: int, limit: int
    ) -> None:
        """``limit`` is the most tokens of the answer."""
        self._model = model
        self._choice_index = choice_index
        self._logprob_count = sampling.logprobs
        self._end = AnswerEnd(sampling, limit=limit, end_ids=model.end_ids)
        self._drawer = Drawer(model, sampling, prompt_tokens=len(prompt_ids), choice_index=choice_index)
        self._text = _TextStream(model, prompt_ids[-_CONTEXT_TOKENS:])
        self._ids = torch.tensor([prompt_ids], device=model.device)
        self._prompt_tokens = len(prompt_ids)
        self._cache = DynamicCache(config=model.model.config)
        self._computed = 0

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended."""
        return self._end.finish is not None

    def step(self) -> Piece | None:
        """Computes the next part of the prompt (None) or the next token."""
        until = min(self._ids.shape[1], self._computed + _PREFILL_TOKENS)
        logits = self._forward(self._ids[:, self._computed : until])
        self._computed = until
        if until < self._ids.shape[1]:
            return None
        index = until - self._prompt_tokens
        token_id = self._drawer.draw(self._ids, logits)
        self._ids = torch.cat([self._ids, torch.tensor([[token_id]], device=self._ids.device)], dim=1)
        text = self._end.feed(token_id, self._text.push(token_id))
        return Piece(
            self._choice_index,
            index,
            text,
            [token_id],
            self._logprobs(logits[0], token_id),
            self._end.finish,
            self._end.stop,
        )

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits after the last of ``ids`` [1, new], as [1, vocabulary] float32."""
        output: Any = self._model.model(ids, past_key_values=self._cache, use_cache=True, **self._model.forward_options)
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _logprobs(self, logits: torch.Tensor, token_id: int) -> tuple[TokenLogprobs, ...]:
        if self._logprob_count is None:
            return ()
        values = logits.log_softmax(-1)
        chosen = self._entry(values, token_id)
        likeliest = values.topk(self._logprob_count).indices.tolist() if self._logprob_count else []
        # The drawn one is told even where it is none of the likeliest.
        top = [self._entry(values, other) for other in likeliest]
        return (TokenLogprobs(chosen, tuple(top if token_id in likeliest else [*top, chosen])),)

    def _entry(self, values: torch.Tensor, token_id: int) -> Logprob:
        text = self._model.text_of([token_id], skip_special_tokens=False)
        return Logprob(token_id, text, float(values[token_id]))


class _TextStream:
    """Text of tokens as it becomes certain: a character may need several tokens, a space depends on what is before it.

    Source: the algorithm of Hugging Face's text-generation-inference, and of vLLM.
    """

    def __init__(self, model: LoadedModel, before: list[int]) -> None:
        self._model = model
        self._ids = list(before)
        self._start = 0
        self._read = len(before)

    def push(self, token_id: int) -> str:
        """Returns the text that a token completes."""
        self._ids.append(token_id)
        known = self._model.text_of(self._ids[self._start : self._read], skip_special_tokens=True)
        text = self._model.text_of(self._ids[self._start :], skip_special_tokens=True)
        if len(text) <= len(known) or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]
