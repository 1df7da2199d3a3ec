"""What the ends of sessions share: when something may have to be told, and who waits for a slice.

Whatever the core does ends in `Runtime.apply`, which calls `look`. It may be called thousands of times a second, so
sessions look a moment later, once for all that happened.
"""

import asyncio
import time
from typing import Final

from helios.proxy.runtime import Runtime

REPORT_SECONDS: Final = 0.5
"""How often something is said at least: what was granted is good for four seconds."""
_GATHER_SECONDS: Final = 0.01
"""How long after the first thing that happens sessions look: a slice that a request waits for takes so much longer."""


class PeerLink:
    """The way from the runtime to the sessions. Made once; without it, one proxy alone pays nothing."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._waiting: set[asyncio.Event] = set()
        self._told: dict[asyncio.Future[None], None] = {}
        runtime.peers = self

    def look(self) -> None:
        """Something happened; never blocks."""
        for event in self._waiting:
            event.set()

    def flush(self) -> None:
        """Carries out what follows from what the leadership was told."""
        self.runtime.apply(self.runtime.core.follow_up(time.monotonic()))

    async def happened(self) -> None:
        """Returns a moment after something happened, or when something is to be said anyway. Cancel-safe."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout(REPORT_SECONDS):
                await event.wait()
                await asyncio.sleep(_GATHER_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(event)

    def told(self) -> None:
        """The leader said something: who waits for a slice looks."""
        waiting, self._told = self._told, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait_told(self, deadline: float) -> bool:
        """Waits until the leader says something; False at the deadline (monotonic seconds). Cancel-safe."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._told[future] = None
        self.look()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await future
        except TimeoutError:
            return False
        finally:
            self._told.pop(future, None)
        return True
