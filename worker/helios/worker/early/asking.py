"""A load's side of the door: which bytes it may read, in processes where there are no threads of gRPC. Blocks."""

import time
from pathlib import Path
from typing import Any, Final

from helios.mesh.errors import Corrupted, InvalidRequest, Unavailable
from helios.mesh.transfer.spans import Spans
from helios.worker.early.view import is_growing
from helios.worker.line_door import ask, encode_line

GROWTH: Final = "growth"
"""What is here; answered when that is more than is known, or after a while."""
LOADED: Final = "loaded"
"""A load has ended."""
POLL_SECONDS: Final = 5.0
"""How long an answer may take where there is no news: whoever died is noticed by then."""
_GRACE_SECONDS: Final = 10.0
EARLY_LOST: Final = "EARLY_LOAD_LOST"


class BytesLost(Corrupted):
    """What was read does not count: the fetch began anew. What is lent is to be loaded."""

    default_reason = "EARLY_BYTES_LOST"


class Arrivals:
    """What is here of one replica's model, as far as this process knows. For one thread.

    Attributes:
        waited_seconds: How long was waited for bytes.
    """

    def __init__(self, door: str, replica_id: str, model_path: str) -> None:
        self.waited_seconds = 0.0
        self._door = door
        self._replica_id = replica_id
        self._model_path = model_path
        self._known: dict[str, Any] = {"version": None, "is_lost": False, "is_lent": False, "weights": []}
        self._spans: dict[str, Spans] = {}

    @property
    def is_whole(self) -> bool:
        """Whether the model's directory shows what is lent."""
        return bool(self._known["is_lent"]) or not is_growing(self._model_path)

    @property
    def weights(self) -> list[str]:
        """Names of the files that tensors are in."""
        return list(self._known["weights"])

    def covers(self, path: str, start: int, end: int) -> bool:
        """Whether a range of a file may be read."""
        spans = self._spans.get(path)
        return self.is_whole or (spans is not None and spans.covers(start, end))

    def wait_more(self) -> None:
        """Waits until more is here than is known.

        Raises:
            BytesLost: What was read does not count.
            Unavailable: EARLY_LOAD_LOST, the supervisor or the replica is at its end.
        """
        began_at = time.monotonic()
        self._ask_growth()
        self.waited_seconds += time.monotonic() - began_at
        if self._known["is_lost"]:
            raise BytesLost("the fetch of the model began anew while it was loaded")

    def wait_whole(self) -> None:
        """Waits until the revision is lent. Raises Unavailable as ``wait_more``."""
        began_at = time.monotonic()
        while not self.is_whole:
            self._ask_growth()
        if not Path(self._model_path).exists():
            # Taken away before it was asked about, it looks as if it grew no more.
            raise _unwanted()
        self.waited_seconds += time.monotonic() - began_at

    def end(self) -> bool:
        """Tells that the load has ended; returns whether it counts. Raises Unavailable as ``wait_more``."""
        return bool(self._ask({"ask": LOADED}).get("counts"))

    def _ask_growth(self) -> None:
        self._known = self._ask({"ask": GROWTH, "version": self._known["version"]})
        self._spans = {path: Spans(map(tuple, spans)) for path, spans in self._known["spans"].items()}

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        line = encode_line({**asked, "replica_id": self._replica_id})
        try:
            answer = ask(self._door, line, timeout_seconds=POLL_SECONDS + _GRACE_SECONDS)
        except (OSError, InvalidRequest) as error:
            raise Unavailable(f"nobody says how far the model's fetch is: {error}", reason=EARLY_LOST) from error
        if answer.get("is_over"):
            raise _unwanted()
        return answer


def _unwanted() -> Unavailable:
    return Unavailable("the model that is loaded is not wanted any more", reason=EARLY_LOST)
