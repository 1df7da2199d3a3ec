"""One simulated request: its answers, and what of them waits to be read."""

import asyncio
from collections.abc import Sequence

from helios.mesh.errors import Bug, HeliosError
from helios.worker.engines.endings import AnswerEnd
from helios.worker.engines.simulated.faults import Fate, Fault
from helios.worker.replica.engine import FinishReason, Logprob, Piece, Sampling, TokenLogprobs

VOCABULARY_SIZE = 1 << 16


def token_id_of(word: str) -> int:
    """Returns the number that stands for a word."""
    return sum(word.encode()) % VOCABULARY_SIZE


class _Answer:
    """One answer: the prompt's words, again and again."""

    def __init__(self, index: int, words: Sequence[str], sampling: Sampling, limit: int) -> None:
        self._index = index
        self._words = words
        self._has_logprobs = sampling.logprobs is not None
        self._has_own_end = sampling.max_tokens is None and not sampling.ignore_eos
        self._end = AnswerEnd(sampling, limit=limit)
        self.token_count = 0

    @property
    def is_over(self) -> bool:
        return self._end.finish is not None

    def next_piece(self) -> Piece:
        """Makes one token."""
        word = self._words[self.token_count % len(self._words)]
        token_id = token_id_of(word)
        text = self._end.feed(token_id, word)
        entry = Logprob(token_id, word, 0.0)
        finish = self._end.finish
        if finish is FinishReason.LENGTH and self._has_own_end:
            finish = FinishReason.STOP
        piece = Piece(
            self._index,
            self.token_count,
            text,
            [token_id],
            (TokenLogprobs(entry, (entry,)),) if self._has_logprobs else (),
            finish,
            self._end.stop,
        )
        self.token_count += 1
        return piece


class Request:
    """A request under way. One event loop uses it.

    Attributes:
        keys: Its sequences in the scheduler, one for each answer.
    """

    def __init__(self, keys: range, words: Sequence[str], sampling: Sampling, *, limit: int, fate: Fate) -> None:
        """``limit`` is the most tokens of an answer."""
        self.keys = keys
        self._answers = {key: _Answer(index, words, sampling, limit) for index, key in enumerate(keys)}
        self._fate = fate
        self._ready: list[Piece] = []
        self._error: HeliosError | None = None
        self._changed = asyncio.Event()

    def faults_at_next_token(self, key: int) -> frozenset[Fault]:
        """Returns what happens at the token that a sequence is about to make."""
        if key != self.keys[0]:
            return frozenset()
        return frozenset(fault for fault, at in self._fate.items() if at == self._answers[key].token_count)

    def make_token(self, key: int) -> bool:
        """Makes a token of an answer; returns whether that answer is over."""
        answer = self._answers[key]
        self._ready.append(answer.next_piece())
        self._changed.set()
        return answer.is_over

    def replay(self, step: Sequence[int]) -> list[Piece]:
        """Makes tokens of the only answer again, which were made elsewhere. Raises Bug where they were others."""
        (answer,) = self._answers.values()
        pieces = [answer.next_piece() for _ in step]
        if [token_id for piece in pieces for token_id in piece.token_ids] != list(step):
            raise Bug("these are not the tokens that this model makes")
        return pieces

    def fail(self, error: HeliosError) -> None:
        """Ends the request; what was made before is still read."""
        self._error = error
        self._changed.set()

    async def read(self) -> list[Piece]:
        """Waits for pieces; empty when all answers are over. Raises what the request failed with."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if all(answer.is_over for answer in self._answers.values()):
                return []
            self._changed.clear()
            await self._changed.wait()
        ready, self._ready = self._ready, []
        return ready
