"""Followed sources in SQL. Each method is one transaction. Time is passed in.

What people ask for changes the model's version, and so does a source that changed or began to fail; that it was looked
at does not: nobody who watches models wants to hear of each look.
"""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import Conflict, HeliosError, NotFound
from helios.registry.changes import ChangeLog
from helios.registry.database import Database
from helios.registry.events import PLAIN, EventKind, Mutation
from helios.registry.follow.following import MAX_ERROR_CHARS, Following, Policy, Wish
from helios.registry.model_rows import resolve
from helios.registry.moments import from_us, to_us
from helios.registry.tables import followed

FOLLOWED_OTHERWISE: Final = "FOLLOWED_OTHERWISE"
"""Reason of a Conflict: the model is gone, or follows something else, or in another way, than when a look began."""


@dataclass(frozen=True, slots=True)
class StillFollows:
    """A guard: what a look leads to is written only while its model follows the source, and in the way, that it began
    with. How often it is looked at may change.
    """

    model: str
    wish: Wish

    async def require(self, connection: AsyncConnection) -> None:
        """Raises Conflict (FOLLOWED_OTHERWISE)."""
        query = select(literal(1)).where(_is_followed(self.model, _manner_of(self.wish)))
        if (await connection.execute(query)).one_or_none() is None:
            raise Conflict(
                f"{self.model!r} is gone, or does not follow {self.wish.source} in this way any more",
                reason=FOLLOWED_OTHERWISE,
                metadata={"model": self.model},
            )


class FollowStore:
    """What models follow."""

    def __init__(self, database: Database, changes: ChangeLog) -> None:
        self._database = database
        self._changes = changes

    async def put(self, name: str, wish: Wish, now: datetime, mutation: Mutation = PLAIN) -> Following:
        """Makes a model follow a source, beginning with a look; the same one is only looked at anew.

        Raises:
            InvalidRequest: As ``Wish.check``.
            ModelNotFound: No such model.
            Conflict: STALE_VERSION.
        """
        wish.check()
        asked = ("put_following", json.dumps(_values_of(wish)))
        async with self._changes.write_model(name, now, mutation, *asked) as (write, model):
            if not write.is_repeat:
                before = await _find(write.connection, model.name)
                await write.connection.execute(delete(followed).where(followed.c.model == model.name))
                is_same_place = before is not None and _place_of(before.wish) == _place_of(wish)
                row = _values_of(wish) | {
                    "model": model.name,
                    "fingerprint": before.fingerprint if before is not None and is_same_place else "",
                    "changed_at_us": _optional_us(before.changed_at) if before is not None else None,
                    "error": "",
                    "error_reason": "",
                    "failure_count": 0,
                    "next_at_us": to_us(now),
                }
                await write.connection.execute(insert(followed).values(row))
                if before is None or before.wish != wish:
                    detail = {"source": wish.source, "policy": wish.policy.value}
                    await write.record(EventKind.SOURCE_FOLLOWED, model.name, **detail)
            return await _require(write.connection, model.name)

    async def remove(self, name: str, now: datetime, mutation: Mutation = PLAIN) -> None:
        """Ends it; a model that follows nothing is no error. Raises ModelNotFound, Conflict (STALE_VERSION)."""
        async with self._changes.write_model(name, now, mutation, "delete_following") as (write, model):
            if not write.is_repeat:
                gone = await write.connection.execute(delete(followed).where(followed.c.model == model.name))
                if gone.rowcount:
                    await write.record(EventKind.SOURCE_UNFOLLOWED, model.name)

    async def get(self, name: str) -> Following:
        """Returns what a model follows. Raises ModelNotFound, NotFound (NOT_FOLLOWED)."""
        async with self._database.snapshot() as connection:
            return await _require(connection, await resolve(connection, name))

    async def look_now(self, name: str, now: datetime) -> Following:
        """Makes the next look due; returns what was before. Raises as ``get``."""
        async with self._database.transaction() as connection:
            found = await _require(connection, await resolve(connection, name))
            is_it = followed.c.model == found.model
            await connection.execute(update(followed).where(is_it).values(next_at_us=to_us(now)))
            return found

    async def claim_due(self, now: datetime, hold: timedelta) -> Following | None:
        """Returns the model whose look has been due for longest, None where none is; no other registry takes it then.

        Who dies over one lets another registry, or itself, take it again when ``hold`` is over; see ``keep``.
        """
        query = select(followed).where(followed.c.next_at_us <= to_us(now)).order_by(followed.c.next_at_us).limit(1)
        async with self._database.snapshot() as connection:
            # Writers queue: they are not held up by a question to which the answer is no.
            if (await connection.execute(query)).one_or_none() is None:
                return None
        async with self._database.transaction() as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                return None
            held = update(followed).where(followed.c.model == row.model).values(next_at_us=to_us(now + hold))
            await connection.execute(held)
            return _following_of(row)

    async def keep(self, seen: Following, until: datetime) -> bool:
        """Has no other registry take a model that is still being looked at; returns whether it follows that still."""
        is_it = _is_followed(seen.model, _manner_of(seen.wish))
        async with self._database.transaction() as connection:
            kept = await connection.execute(update(followed).where(is_it).values(next_at_us=to_us(until)))
            return bool(kept.rowcount)

    async def looked(self, seen: Following, fingerprint: str, now: datetime, pause: timedelta) -> None:
        """Notes a look that found nothing new, or what was known already."""
        values = {"fingerprint": fingerprint, "error": "", "error_reason": "", "failure_count": 0}
        async with self._database.transaction() as connection:
            await _note(connection, seen, now, pause, values)

    async def postponed(self, seen: Following, now: datetime, pause: timedelta) -> None:
        """Notes a look whose ingest another one keeps from starting."""
        async with self._database.transaction() as connection:
            await _note(connection, seen, now, pause, {})

    async def changed(self, seen: Following, fingerprint: str, digest: str, now: datetime, pause: timedelta) -> None:
        """Notes that the source was ingested as a revision."""
        values = {"fingerprint": fingerprint, "error": "", "error_reason": "", "failure_count": 0}
        async with self._changes.write(PLAIN, now, "source_changed") as write:
            if await _note(write.connection, seen, now, pause, values | {"changed_at_us": to_us(now)}):
                detail = {"source": seen.wish.source, "revision": digest}
                await write.record(EventKind.SOURCE_CHANGED, seen.model, **detail)

    async def failed(self, seen: Following, error: HeliosError, now: datetime, pause: timedelta) -> None:
        """Notes that a look, or the ingest after it, failed; tells watchers of the first one in a row."""
        values = {
            "error": error.message[:MAX_ERROR_CHARS],
            "error_reason": error.reason,
            "failure_count": seen.failure_count + 1,
        }
        async with self._changes.write(PLAIN, now, "source_failed") as write:
            is_there = await _note(write.connection, seen, now, pause, values)
            if is_there and not seen.failure_count:
                detail = {"source": seen.wish.source, "reason": error.reason}
                await write.record(EventKind.SOURCE_FAILED, seen.model, **detail)


async def _note(
    connection: AsyncConnection, seen: Following, now: datetime, pause: timedelta, values: dict[str, Any]
) -> bool:
    """Notes a look, unless the model has followed something else, or otherwise, since; returns whether it was noted."""
    is_it = _is_followed(seen.model, _values_of(seen.wish))
    times = {"checked_at_us": to_us(now), "next_at_us": to_us(now + pause)}
    return bool((await connection.execute(update(followed).where(is_it).values(values | times))).rowcount)


async def _find(connection: AsyncConnection, model: str) -> Following | None:
    row = (await connection.execute(select(followed).where(followed.c.model == model))).one_or_none()
    return _following_of(row) if row is not None else None


async def _require(connection: AsyncConnection, model: str) -> Following:
    found = await _find(connection, model)
    if found is None:
        raise NotFound(f"{model!r} follows no source", reason="NOT_FOLLOWED", metadata={"model": model})
    return found


def _values_of(wish: Wish) -> dict[str, Any]:
    return {
        "source": wish.source,
        "patterns": json.dumps([wish.include, wish.exclude]),
        "interval_seconds": wish.interval.total_seconds(),
        "policy": wish.policy.value,
        "weight_percent": wish.weight_percent,
    }


def _manner_of(wish: Wish) -> dict[str, Any]:
    """Returns what is followed and what becomes of it, however often it is looked at."""
    values = _values_of(wish)
    del values["interval_seconds"]
    return values


def _is_followed(model: str, values: dict[str, Any]) -> ColumnElement[bool]:
    return and_(followed.c.model == model, *(followed.c[name] == value for name, value in values.items()))


def _place_of(wish: Wish) -> tuple[object, ...]:
    return wish.source, wish.include, wish.exclude


def _following_of(row: Any) -> Following:
    include, exclude = json.loads(row.patterns)
    interval = timedelta(seconds=row.interval_seconds)
    wish = Wish(row.source, tuple(include), tuple(exclude), interval, Policy(row.policy), row.weight_percent)
    return Following(
        model=row.model,
        wish=wish,
        next_at=from_us(row.next_at_us),
        fingerprint=row.fingerprint,
        checked_at=from_us(row.checked_at_us) if row.checked_at_us is not None else None,
        changed_at=from_us(row.changed_at_us) if row.changed_at_us is not None else None,
        error=row.error,
        error_reason=row.error_reason,
        failure_count=row.failure_count,
    )


def _optional_us(moment: datetime | None) -> int | None:
    return to_us(moment) if moment is not None else None
