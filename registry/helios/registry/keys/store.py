"""The keys' rows. Only hashes of secrets are stored; revoked keys stay, so that a log's id can be looked up."""

import json
from datetime import datetime
from typing import Any, Final

from sqlalchemy import func, insert, not_, or_, select, update

from helios.mesh.errors import InvalidRequest, NotFound, PreconditionFailed
from helios.registry import offload
from helios.registry.database import Database
from helios.registry.keys.records import ApiKey, Priority, StoredKey
from helios.registry.moments import from_us, to_us
from helios.registry.tables import api_keys

# All of them are told to each proxy in one message: 10,000 are some two megabytes.
MAX_KEYS: Final = 10_000
# Ended ones that a list has, the newest; nothing deletes them.
_MAX_ENDED: Final = 10_000


class KeyStore:
    """Operations on the table of keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, key: ApiKey, sha256: bytes, now: datetime) -> None:
        """Adds a key. Raises InvalidRequest (INVALID_KEY: the name is taken), PreconditionFailed (TOO_MANY_KEYS)."""
        async with self._database.transaction() as connection:
            alive = _alive(now)
            count = (await connection.execute(select(func.count()).select_from(api_keys).where(alive))).scalar_one()
            if count >= MAX_KEYS:
                raise PreconditionFailed(f"there are {count} keys; revoke some", reason="TOO_MANY_KEYS")
            taken = select(api_keys.c.id).where(alive, api_keys.c.name == key.name)
            if (await connection.execute(taken)).first() is not None:
                raise InvalidRequest(
                    f"there is a key {key.name!r}; revoke it first, or choose another name",
                    reason="INVALID_KEY",
                    metadata={"param": "name"},
                )
            row = {
                "id": key.id,
                "name": key.name,
                "sha256": sha256,
                "tenant": key.tenant,
                "models": json.dumps(key.models),
                "requests_per_minute": key.requests_per_minute,
                "tokens_per_minute": key.tokens_per_minute,
                "priority": int(key.priority),
                "weight": key.weight,
                "created_at_us": to_us(key.created_at),
                "expires_at_us": to_us(key.expires_at) if key.expires_at else None,
            }
            await connection.execute(insert(api_keys).values(row))

    async def revoke(self, name: str, now: datetime) -> ApiKey:
        """Ends a key, by its id or its name. Raises NotFound (KEY_NOT_FOUND)."""
        async with self._database.transaction() as connection:
            found = (await connection.execute(select(api_keys).where(api_keys.c.id == name))).first()
            if found is None:
                is_it = (api_keys.c.name == name) & api_keys.c.revoked_at_us.is_(None)
                newest = select(api_keys).where(is_it).order_by(api_keys.c.created_at_us.desc())
                found = (await connection.execute(newest)).first()
            if found is None:
                raise NotFound(f"there is no key {name!r}", reason="KEY_NOT_FOUND", metadata={"key": name[:64]})
            if found.revoked_at_us is None:
                statement = update(api_keys).where(api_keys.c.id == found.id).values(revoked_at_us=to_us(now))
                await connection.execute(statement)
            row = (await connection.execute(select(api_keys).where(api_keys.c.id == found.id))).one()
            return _key_of(row)

    async def list(self, now: datetime, *, show_ended: bool) -> list[ApiKey]:
        """Returns the keys that requests may use, and those that ended last where they are wanted; the newest first."""
        newest = api_keys.c.created_at_us.desc()
        async with self._database.snapshot() as connection:
            rows = list(await connection.execute(select(api_keys).where(_alive(now)).order_by(newest)))
            if show_ended:
                ended = select(api_keys).where(not_(_alive(now))).order_by(newest).limit(_MAX_ENDED)
                rows += await connection.execute(ended)
        rows.sort(key=lambda row: (-row.created_at_us, row.id))
        return await offload.run(lambda _: [_key_of(row) for row in rows])

    async def alive(self, now: datetime) -> tuple[StoredKey, ...]:
        """Returns the keys that requests may use, by id."""
        query = select(api_keys).where(_alive(now)).order_by(api_keys.c.id)
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(query)).all()
        return await offload.run(lambda _: tuple(StoredKey(_key_of(row), row.sha256) for row in rows))

    async def changes(self) -> tuple[int, int]:
        """Returns what is another after each change: how many keys were made, and how many revoked. None is deleted."""
        query = select(func.count(), func.count(api_keys.c.revoked_at_us)).select_from(api_keys)
        async with self._database.snapshot() as connection:
            made, revoked = (await connection.execute(query)).one()
        return made, revoked


def _alive(now: datetime) -> Any:
    is_unexpired = or_(api_keys.c.expires_at_us.is_(None), api_keys.c.expires_at_us > to_us(now))
    return api_keys.c.revoked_at_us.is_(None) & is_unexpired


def _key_of(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        models=tuple(json.loads(row.models)),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        priority=Priority(row.priority),
        weight=row.weight,
        created_at=from_us(row.created_at_us),
        expires_at=from_us(row.expires_at_us) if row.expires_at_us is not None else None,
        revoked_at=from_us(row.revoked_at_us) if row.revoked_at_us is not None else None,
    )
