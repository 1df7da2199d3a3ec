"""How an answer ends: by its length, by a text, or by a token. Pure; for engines that decode by themselves."""

from collections.abc import Sequence

from helios.mesh.errors import ContextLengthExceeded, InvalidRequest
from helios.worker.replica.engine import FinishReason, Sampling


def answer_limit(prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> int:
    """Returns how many tokens an answer may have: what was asked for, or all that fit, as vLLM does.

    Raises:
        InvalidRequest: Less than one was asked for.
        ContextLengthExceeded: The prompt leaves no room for one.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}", metadata={"param": "max_tokens"})
    room = context_tokens - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {context_tokens} tokens; the prompt has {prompt_tokens}"
        )
    return room if max_tokens is None else min(room, max_tokens)


class AnswerEnd:
    """Watches one answer, token by token, and says when it is over and which text may be handed out.

    Text that may be the beginning of a stop text is held back until the next tokens decide; a stop text itself is
    never handed out. Feed nothing more once ``finish`` is set.

    Attributes:
        finish: Why the answer is over; None while it is not.
        stop: The stop text or token id that ended it, if one did.
    """

    def __init__(self, sampling: Sampling, *, limit: int, end_ids: Sequence[int] = ()) -> None:
        """``limit`` is the most tokens it may have; by ``end_ids`` the model says that it is done."""
        self.finish: FinishReason | None = None
        self.stop: str | int | None = None
        self._stop_texts = sampling.stop
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._end_ids = frozenset() if sampling.ignore_eos else frozenset(end_ids)
        self._min_tokens = sampling.min_tokens or 0
        self._limit = limit
        self._count = 0
        self._held = ""
        self._held_limit = max(map(len, self._stop_texts), default=1) - 1

    def feed(self, token_id: int, text: str) -> str:
        """Takes a token and the text that it completed; returns the text to hand out now."""
        self._count += 1
        is_free_to_stop = self._count >= self._min_tokens
        if is_free_to_stop and token_id in self._stop_ids:
            self.stop = token_id
        if is_free_to_stop and (token_id in self._stop_ids or token_id in self._end_ids):
            self.finish = FinishReason.STOP
            # Such a token has no text for the reader.
            return self._release()
        self._held += text
        if is_free_to_stop and (found := self._find()) is not None:
            position, self.stop = found
            self.finish = FinishReason.STOP
            self._held = self._held[:position]
        elif self._count >= self._limit:
            self.finish = FinishReason.LENGTH
        return self._release() if self.finish else self._release(self._held_limit)

    def feed_text(self, text: str) -> str:
        """Takes text of an answer whose tokens are not known; returns what to hand out now."""
        self._held += text
        if (found := self._find()) is not None:
            position, self.stop = found
            self.finish = FinishReason.STOP
            self._held = self._held[:position]
            return self._release()
        return self._release(self._held_limit)

    def flush(self) -> str:
        """Returns what is still held back, at the end of an answer that ended by itself."""
        return self._release()

    def _release(self, keep: int = 0) -> str:
        cut = max(0, len(self._held) - keep)
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _find(self) -> tuple[int, str] | None:
        hits = [(position, stop) for stop in self._stop_texts if (position := self._held.find(stop)) >= 0]
        return min(hits) if hits else None
