"""The registry's advice on how warm models are kept, and what this proxy makes of it.

Advice expires: without news for two hours nothing is kept warm for a forecast any more. What is followed is bounded by
what the proxy does anyway: a model that is to be ready counts as used, so that it is started where there is room and
not drained as idle; one that is to be in memory is staged where nothing has to make way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

import structlog

from helios.registry.client import Rung, Target, UsageClient

log = structlog.get_logger()


class WarmPoolMode(StrEnum):
    """What is made of advice."""

    OFF = "off"
    ADVISE = "advise"
    ON = "on"


class Kept(Protocol):
    """What can be done to keep a model warm. Both are harmless where it is as warm already."""

    def keep_ready(self, model: str, now: float) -> None:
        """Has a replica started where there is room, and not drained as idle."""
        ...

    def keep_staged(self, model: str, now: float) -> None:
        """Has weights brought to host memory that is free."""
        ...


class Advice:
    """The newest targets; none that has expired is ever given."""

    def __init__(self, mode: WarmPoolMode, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.mode = mode
        self._now = now
        self._targets: dict[str, Target] = {}

    @property
    def is_followed(self) -> bool:
        """Whether anything is done about it."""
        return self.mode is WarmPoolMode.ON

    def take(self, targets: Iterable[Target]) -> None:
        """Replaces the targets; what changed is logged."""
        found = {target.model: target for target in targets} if self.mode is not WarmPoolMode.OFF else {}
        for name in sorted(found.keys() | self._targets.keys()):
            old, new = self._targets.get(name), found.get(name)
            if new is None:
                log.info("model need not be kept warm", model=name)
            elif old is None or (old.rung, old.replica_count) != (new.rung, new.replica_count):
                log.info(
                    "model is best kept warm",
                    model=name,
                    rung=new.rung.name,
                    replicas=new.replica_count,
                    reason=new.reason,
                    is_followed=self.is_followed,
                )
        self._targets = found

    def of(self, model: str) -> Target | None:
        """Returns a model's target."""
        target = self._targets.get(model)
        return target if target is not None and target.expires_at > self._now() else None

    def follow(self, kept: Kept, now: float) -> None:
        """Keeps warm what is to be, where the mode says so."""
        if not self.is_followed:
            return
        for name in self._targets:
            target = self.of(name)
            if target is None:
                continue
            if target.rung is Rung.READY:
                kept.keep_ready(name, now)
            elif target.rung is Rung.MEMORY:
                kept.keep_staged(name, now)


async def watch_advice(client: UsageClient, advice: Advice) -> None:
    """Feeds advice until the watch breaks. Raises HeliosError then; call it again."""
    async with aclosing(client.watch_targets()) as watched:
        async for targets in watched:
            advice.take(targets)
