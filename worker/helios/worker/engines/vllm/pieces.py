"""From vLLM's request outputs to pieces of answers."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from helios.mesh.errors import Bug
from helios.worker.replica.engine import FinishReason, Logprob, Piece, TokenLogprobs

_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
    "repetition": FinishReason.STOP,
}


class PieceCutter:
    """Turns the outputs of one request, in order, into pieces; keeps each answer's position."""

    def __init__(self) -> None:
        self._positions: dict[int, int] = {}

    def cut(self, output: Any) -> Sequence[Piece]:
        """Returns the pieces of one RequestOutput of kind DELTA. Raises Bug where the engine reports an error."""
        return [
            self._piece(choice) for choice in output.outputs if choice.token_ids or choice.finish_reason is not None
        ]

    def _piece(self, choice: Any) -> Piece:
        token_ids = list(choice.token_ids)
        position = self._positions.get(choice.index, 0)
        self._positions[choice.index] = position + len(token_ids)
        finish = None
        if choice.finish_reason is not None:
            finish = _REASONS.get(choice.finish_reason)
            if finish is None:
                raise Bug(f"the engine ended a request with {choice.finish_reason!r}")
        logprobs: tuple[TokenLogprobs, ...] = ()
        if choice.logprobs:
            logprobs = tuple(
                _token_logprobs(token_id, entries) for token_id, entries in zip(token_ids, choice.logprobs, strict=True)
            )
        return Piece(choice.index, position, choice.text, token_ids, logprobs, finish, choice.stop_reason)


def _token_logprobs(token_id: int, entries: Mapping[int, Any]) -> TokenLogprobs:
    """``entries`` holds the likeliest tokens and the drawn one, which may be none of them; rank 1 is the likeliest."""
    everything = {key: Logprob(key, entry.decoded_token or "", entry.logprob) for key, entry in entries.items()}
    ranked = sorted(entries, key=lambda key: entries[key].rank or 0)
    return TokenLogprobs(everything[token_id], tuple(everything[key] for key in ranked))
