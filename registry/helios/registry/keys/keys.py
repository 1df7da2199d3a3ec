"""The keys of a registry: changes, each with a line in the audit log, and those who watch."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Final

from helios.mesh.audit import audit
from helios.mesh.errors import Draining
from helios.registry.keys.records import ApiKey, KeySpec, StoredKey, hash_secret, key_of, new_secret
from helios.registry.keys.store import KeyStore

# Changes of a script come together; whoever revokes a key does not wait for more than this beside the wire.
_SETTLE_SECONDS: Final = 0.05
# How soon an expired key is told; proxies know the moment themselves and don't wait for it.
_LOOK_AGAIN_SECONDS: Final = 60.0


class Keys:
    """Creates, revokes and tells. ``poll_seconds`` is how often another registry's changes are looked for; 0: never."""

    def __init__(
        self,
        store: KeyStore,
        *,
        poll_seconds: float = 0.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._wait_seconds = poll_seconds or _LOOK_AGAIN_SECONDS
        self._now = now
        self._changed = asyncio.Event()
        self._is_closed = False
        # What all watchers are told, the state of the table that it is of, and when it is looked at next.
        self._alive: tuple[StoredKey, ...] = ()
        self._seen: tuple[int, int] | None = None
        self._next_look = 0.0
        self._looking = asyncio.Lock()

    async def create(self, spec: KeySpec, actor: str) -> tuple[ApiKey, str]:
        """Makes a key; returns it with its secret. Raises InvalidRequest, PreconditionFailed."""
        now = self._now()
        key, secret = key_of(spec, now), new_secret()
        await self._store.create(key, hash_secret(secret), now)
        audit("create key", actor=actor, key=key.id, name=key.name, tenant=key.tenant, models=list(key.models))
        self._announce()
        return key, secret

    async def revoke(self, name: str, actor: str) -> ApiKey:
        """Ends a key, by id or name. Raises NotFound."""
        key = await self._store.revoke(name, self._now())
        audit("revoke key", actor=actor, key=key.id, name=key.name, tenant=key.tenant)
        self._announce()
        return key

    async def list(self, *, show_ended: bool) -> list[ApiKey]:
        """Returns keys, the newest first; of ended ones the newest 10,000."""
        return await self._store.list(self._now(), show_ended=show_ended)

    async def watch(self) -> AsyncGenerator[tuple[StoredKey, ...], None]:
        """Yields the keys that count, whenever they are others than before. Raises Draining when the process stops."""
        told: tuple[StoredKey, ...] | None = None
        # Whoever comes is told what is so now.
        self._next_look = 0.0
        while not self._is_closed:
            changed = self._changed
            keys = await self._look()
            if keys != told:
                told = keys
                yield keys
            try:
                async with asyncio.timeout_at(self._next_look):
                    await changed.wait()
                await asyncio.sleep(_SETTLE_SECONDS)
            except TimeoutError:
                pass
        raise Draining("the registry stops; watch again")

    def close(self) -> None:
        """Ends all watches, now and later."""
        self._is_closed = True
        self._announce()

    async def _look(self) -> tuple[StoredKey, ...]:
        """Returns the keys that count. One look is all watchers', and reads keys only where they are others."""
        clock = asyncio.get_running_loop().time
        async with self._looking:
            if clock() >= self._next_look:
                # Before it is looked: a change that comes meanwhile has it looked at again.
                self._next_look = clock() + self._wait_seconds
                try:
                    await self._read()
                except BaseException:
                    self._next_look = 0.0
                    raise
        return self._alive

    async def _read(self) -> None:
        now, seen = self._now(), await self._store.changes()
        if seen != self._seen:
            self._alive, self._seen = await self._store.alive(now), seen
        elif not all(stored.key.is_alive(now) for stored in self._alive):
            self._alive = tuple(stored for stored in self._alive if stored.key.is_alive(now))

    def _announce(self) -> None:
        self._next_look = 0.0
        self._changed.set()
        self._changed = asyncio.Event()
