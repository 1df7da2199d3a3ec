"""Changes of models: numbered, remembered for watchers, refused where they are stale, made once however often asked.

Every change of a model takes the next number in the transaction that makes it, writes an event under it, and leaves it
on the model as its ``version``. Writers queue (``database``), so whoever has read up to a number has missed none below
it. Events are kept by count: a watcher that asks for older ones begins anew with all models. What somebody asked for is
in the audit log, too, which has no end.
"""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.audit import audit
from helios.mesh.errors import InvalidRequest
from helios.registry.database import Database
from helios.registry.events import Event, EventKind, Mutation
from helios.registry.model_rows import find_model
from helios.registry.moments import from_us, to_us
from helios.registry.records import Model
from helios.registry.tables import events, head, models, requests

# Some megabytes; at a change a second, three hours in which a watcher may be away.
DEFAULT_KEPT_EVENTS: Final = 10_000
# A client that does not know whether its request arrived asks again within minutes, a person within a day.
REQUEST_LIFE: Final = timedelta(days=1)
# How many changes lie between two clearings of what is too old: each costs a scan of an index.
_CLEARING_STEP: Final = 64


class _TakenBack(Exception):
    """Rolls a dry run back."""


class Write:
    """A transaction that changes models. Where ``is_repeat`` it was carried out before, and there is nothing to do."""

    def __init__(self, connection: AsyncConnection, mutation: Mutation, now: datetime, kept_events: int) -> None:
        self.connection = connection
        self.now = now
        self.is_repeat = False
        self._changes: list[tuple[EventKind, str, dict[str, str]]] = []
        self._mutation = mutation
        self._kept_events = kept_events

    @property
    def actor(self) -> str:
        """Who asked for it."""
        return self._mutation.actor

    async def require_version(self, model: str) -> None:
        """Raises Conflict (STALE_VERSION) if a model has changed since the caller looked; one that is gone passes."""
        if not self._mutation.expected_version:
            return
        query = select(models.c.version).where(models.c.name == model)
        found = (await self.connection.execute(query)).scalar_one_or_none()
        if found is not None:
            self._mutation.check_version(model, found)

    async def record(self, kind: EventKind, model: str, **detail: str) -> int:
        """Numbers a change, and tells of it from the moment of the commit; returns the number."""
        number = update(head).values(version=head.c.version + 1).returning(head.c.version)
        version: int = (await self.connection.execute(number)).scalar_one()
        row = {
            "version": version,
            "kind": kind.value,
            "model": model,
            "detail": json.dumps(detail, sort_keys=True),
            "actor": self.actor,
            "at_us": to_us(self.now),
        }
        self._changes.append((kind, model, detail))
        await self.connection.execute(insert(events).values(row))
        await self.connection.execute(update(models).where(models.c.name == model).values(version=version))
        if version % _CLEARING_STEP == 0:
            await self.connection.execute(delete(events).where(events.c.version <= version - self._kept_events))
        return version

    def audit(self) -> None:
        """Has what was recorded in the audit log, once it is committed; what the registry does by itself is not."""
        for kind, model, detail in self._changes if self.actor else ():
            audit(kind.value.replace("_", " "), actor=self.actor, model=model, **detail)


@dataclass(frozen=True, slots=True)
class Since:
    """What changed after a number: models that are to be read again, in the order of their last change."""

    models: tuple[str, ...]
    version: int


class ChangeLog:
    """The tables of changes as operations."""

    def __init__(self, database: Database, *, kept_events: int = DEFAULT_KEPT_EVENTS) -> None:
        self._database = database
        self._kept_events = kept_events

    @asynccontextmanager
    async def write(self, mutation: Mutation, now: datetime, call: str, *arguments: str) -> AsyncIterator[Write]:
        """Yields a transaction for one call. A call of the same request id, and the same arguments, is a repeat.

        A dry run is rolled back: whoever asks reads in the transaction what would be.

        Raises:
            InvalidRequest: INVALID_REQUEST_ID; REQUEST_ID_REUSED, the id was another call's.
        """
        mutation.check()
        with suppress(_TakenBack):
            async with self._database.transaction() as connection:
                write = Write(connection, mutation, now, self._kept_events)
                if mutation.request_id and not mutation.is_dry_run:
                    fingerprint = _fingerprint(mutation, call, arguments)
                    write.is_repeat = await _is_known(connection, mutation.request_id, fingerprint)
                    if not write.is_repeat:
                        await _remember(connection, mutation.request_id, fingerprint, now)
                yield write
                if mutation.is_dry_run:
                    raise _TakenBack
            write.audit()

    async def is_known(self, mutation: Mutation, call: str, *arguments: str) -> bool:
        """Returns whether a call was carried out before, for those that have much to do before they write.

        Raises:
            InvalidRequest: As ``write``.
        """
        mutation.check()
        if not mutation.request_id:
            return False
        async with self._database.snapshot() as connection:
            return await _is_known(connection, mutation.request_id, _fingerprint(mutation, call, arguments))

    @asynccontextmanager
    async def write_model(
        self, name: str, now: datetime, mutation: Mutation, call: str, *arguments: str
    ) -> AsyncIterator[tuple[Write, Model]]:
        """Yields a transaction and the model as it is, once its version is found to be the expected one.

        Raises:
            ModelNotFound: No model has this name or alias.
            Conflict: STALE_VERSION.
            InvalidRequest: As ``write``.
        """
        async with self.write(mutation, now, call, name, *arguments) as write:
            model = await find_model(write.connection, name)
            if not write.is_repeat:
                await write.require_version(model.name)
            yield write, model

    async def version(self) -> int:
        """Returns the number of the last change."""
        async with self._database.snapshot() as connection:
            return await read_version(connection)

    async def list_events(self, *, after: int, limit: int) -> list[Event] | None:
        """Returns the changes after a number, the oldest first; None where some of them are not kept any more."""
        async with self._database.snapshot() as connection:
            if not await _is_kept(connection, after):
                return None
            query = select(events).where(events.c.version > after).order_by(events.c.version).limit(limit)
            return [
                Event(
                    row.version, EventKind(row.kind), row.model, json.loads(row.detail), row.actor, from_us(row.at_us)
                )
                for row in await connection.execute(query)
            ]


async def read_version(connection: AsyncConnection) -> int:
    """Returns the number of the last change that the connection's transaction sees."""
    version: int = (await connection.execute(select(head.c.version))).scalar_one()
    return version


async def changed_since(connection: AsyncConnection, after: int) -> Since | None:
    """Returns which models changed after a number; None where that is not known any more."""
    if not await _is_kept(connection, after):
        return None
    last = func.max(events.c.version)
    query = select(events.c.model).where(events.c.version > after).group_by(events.c.model).order_by(last)
    names = tuple((await connection.execute(query)).scalars())
    return Since(names, await read_version(connection))


async def _is_kept(connection: AsyncConnection, after: int) -> bool:
    version = await read_version(connection)
    if after >= version:
        # A higher number than the last one is another database's, such as one that was brought back from a backup.
        return after == version
    oldest: int | None = (await connection.execute(select(func.min(events.c.version)))).scalar_one_or_none()
    return oldest is not None and oldest <= after + 1


def _fingerprint(mutation: Mutation, call: str, arguments: tuple[str, ...]) -> str:
    text = json.dumps([call, mutation.expected_version, *arguments])
    return hashlib.sha256(text.encode()).hexdigest()


async def _is_known(connection: AsyncConnection, request_id: str, fingerprint: str) -> bool:
    """Returns whether a request was carried out before. Raises InvalidRequest (REQUEST_ID_REUSED)."""
    query = select(requests.c.fingerprint).where(requests.c.request_id == request_id)
    found = (await connection.execute(query)).scalar_one_or_none()
    if found is not None and found != fingerprint:
        raise InvalidRequest(
            f"request_id {request_id!r} was another request's",
            reason="REQUEST_ID_REUSED",
            metadata={"param": "request_id"},
        )
    return found is not None


async def _remember(connection: AsyncConnection, request_id: str, fingerprint: str, now: datetime) -> None:
    await connection.execute(delete(requests).where(requests.c.at_us < to_us(now - REQUEST_LIFE)))
    row = {"request_id": request_id, "fingerprint": fingerprint, "at_us": to_us(now)}
    await connection.execute(insert(requests).values(row))
