"""What replicas were measured to hold, told to the registry, and what it knows from others.

A proxy that starts has measured nothing, and sizes by prediction until the first replica of each model is ready. The
registry keeps what all proxies have seen, so the first one is sized by that already.
"""

import asyncio
from typing import Final, Protocol

from helios.mesh.errors import HeliosError
from helios.proxy.catalogue import Catalogue
from helios.proxy.sizing import MeasuredSizes
from helios.registry.client import Measure

# The registry takes no more in a call.
_MAX_COUNT: Final = 1_000
# A start that comes sooner is sized by prediction, as all were.
_INTERVAL_SECONDS: Final = 15.0


class MeasureKeeper(Protocol):
    """Who keeps measures; ``helios.registry.client.ProfileClient`` is one."""

    async def exchange(self, measured: list[Measure], revisions: list[str]) -> list[Measure]:
        """Tells what was measured; returns what is known of some revisions. Idempotent. Raises HeliosError."""
        ...


class MeasureExchange:
    """Keeps the sizes of this proxy and those of the registry in step."""

    def __init__(
        self,
        sizes: MeasuredSizes,
        catalogue: Catalogue,
        keeper: MeasureKeeper,
        *,
        interval_seconds: float = _INTERVAL_SECONDS,
    ) -> None:
        self._sizes = sizes
        self._catalogue = catalogue
        self._keeper = keeper
        self._interval_seconds = interval_seconds
        self._asked: set[str] = set()

    async def run(self) -> None:
        """Exchanges for ever. Raises HeliosError; what was not told is told by the next run."""
        while True:
            await self.exchange()
            await asyncio.sleep(self._interval_seconds)

    async def exchange(self) -> None:
        """Tells what is new, and asks about revisions that are new. Raises HeliosError."""
        served = {entry.revision for entry in self._catalogue.models() if not entry.is_adapter}
        self._asked &= served
        wanted = sorted(served - self._asked)[:_MAX_COUNT]
        news = self._sizes.take_news(_MAX_COUNT)
        if not wanted and not news:
            return
        told = [Measure(revision, settings, is_gpu, size) for (revision, settings, is_gpu), size in news.items()]
        try:
            known = await self._keeper.exchange(told, wanted)
        except HeliosError:
            self._sizes.put_back(news)
            raise
        self._asked.update(wanted)
        for measure in known:
            self._sizes.tell((measure.revision, measure.settings_sha256, measure.is_gpu), measure.fixed_bytes)
