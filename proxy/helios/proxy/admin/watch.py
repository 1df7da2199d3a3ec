"""WatchEvents: what happens to workers and replicas, as it comes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.mesh.errors import Draining, Overloaded, Unavailable
from helios.proxy.events.log import EventLog, Numbered
from helios.proxy.fleet.wire import timestamp
from helios.proxy.runtime import Runtime

# Each holds a stream of the control server, which workers' sessions share.
_MOST_WATCHERS: Final = 64
_LOOK_SECONDS: Final = 1.0


class EventWatches:
    """The watches that run, and their bound."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._count = 0

    async def watch(
        self, after: str | None, model: str, *, until_now: bool
    ) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        """Yields events after a cursor; None is from now on, empty all that is known. Ends only where `until_now`.

        Raises:
            InvalidRequest: INVALID_CURSOR.
            Overloaded: TOO_MANY_WATCHERS.
            Draining: This process stops, which would wait for its watches else.
            Unavailable: LEADER_MOVED: another proxy decides from now on, and what it does begins there.
        """
        log, leadership = self._runtime.events, self._runtime.core.leadership
        has_led = leadership.epoch > 0
        number, is_missed = log.position(after)
        if self._count >= _MOST_WATCHERS:
            raise Overloaded(
                f"{_MOST_WATCHERS} watches run already", reason="TOO_MANY_WATCHERS", retry_after_seconds=30
            )
        self._count += 1
        try:
            if is_missed:
                yield _missed(log, number)
            while True:
                changed = self._runtime.events_changed
                page = log.after(number, model)
                if page.is_missed:
                    yield _missed(log, page.events[0].number - 1 if page.events else page.number)
                for each in page.events:
                    yield pb.WatchEventsResponse(event=self._to_proto(log, each))
                if page.number == number:
                    if until_now:
                        return
                    if self._runtime.is_stopping:
                        raise Draining("the proxy is stopping; watch another one, or this one when it is back")
                    if has_led and not leadership.epoch:
                        raise Unavailable(
                            "another proxy leads now; watch again, and it is that one's events",
                            reason="LEADER_MOVED",
                            retry_after_seconds=1,
                        )
                    await _wait(changed)
                number = page.number
                # One that is far behind lets requests have their turn.
                await asyncio.sleep(0)
        finally:
            self._count -= 1

    def _to_proto(self, log: EventLog, each: Numbered) -> pb.FleetEvent:
        event = each.event
        return pb.FleetEvent(
            cursor=log.cursor(each.number),
            at=timestamp(each.at + self._runtime.journal.wall_offset),
            kind=pb.FleetEventKind.ValueType(event.kind.value),
            model=event.model,
            replica_id=event.replica_id,
            worker_id=event.worker_id,
            reason=event.reason,
            message=event.message,
        )


async def _wait(changed: asyncio.Event) -> None:
    """Returns with the next event, or after a moment: who leads changes without one."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LOOK_SECONDS):
            await changed.wait()


def _missed(log: EventLog, number: int) -> pb.WatchEventsResponse:
    return pb.WatchEventsResponse(missed=pb.EventsMissed(cursor=log.cursor(number)))
