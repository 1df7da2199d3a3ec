"""Which requests may be decoded now: so many at once, and so many tokens of KV cache among them. In order of arrival.

A request books its prompt and the longest answer that it may get, so that what is under way always fits.
"""

import asyncio
from collections import deque
from collections.abc import Callable


class Admission:
    """Books tokens and a place for each request. One event loop uses it."""

    def __init__(self, *, request_count: int, token_count: int, on_change: Callable[[], None]) -> None:
        """``on_change`` is called when a request was let in, left, or began to wait."""
        self._places = request_count
        self._tokens = self._free = token_count
        self._on_change = on_change
        self._running = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def running_count(self) -> int:
        """Requests that were let in."""
        return self._running

    @property
    def waiting_count(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def usage_ratio(self) -> float:
        """Share of the tokens that is booked."""
        return 1 - self._free / self._tokens

    async def enter(self, tokens: int) -> None:
        """Waits for room; ``leave`` with the same number afterwards. Cancel-safe. ``tokens`` fit alone."""
        assert tokens <= self._tokens
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((tokens, turn))
        self._let_in()
        self._on_change()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(tokens)
            else:
                self._queue.remove((tokens, turn))
                self._let_in()
                self._on_change()
            raise

    def leave(self, tokens: int) -> None:
        """Gives back what a request had."""
        self._running -= 1
        self._free += tokens
        self._let_in()
        self._on_change()

    def _let_in(self) -> None:
        while self._queue and self._running < self._places and self._queue[0][0] <= self._free:
            tokens, turn = self._queue.popleft()
            if turn.done():
                continue
            self._running += 1
            self._free -= tokens
            turn.set_result(None)
